# Equal input, equal bytes; what is written is what is read; the file is ordinary zstd frames.
. "$CLI/lib.sh"

synth a.kvt
synth b.kvt
synth c.kvt --seed 2
check 'synth twice: the same bytes' cmp a.kvt b.kvt
ok kv-trace diff a.kvt b.kvt
exits 1 kv-trace diff a.kvt c.kvt
check 'another seed differs in q, k, v and W_O' test "$(grep -cE '^(q|k|v|wo) .*beyond' .out)" = 4
synth long.kvt --tokens 240 --prompt-tokens 160
refused 1 long.kvt kv-trace diff a.kvt long.kvt

# slice: a layer, a KV head with its query heads, a prefix
ok kv-trace slice a.kvt part.kvt --layers 1 --heads 1 --tokens 0:170
ok kv-trace verify --deep part.kvt
kv-trace cat a.kvt --stream q --layer 1 --head 3 --rows 0:170 >whole.txt
kv-trace cat part.kvt --stream q --layer 1 --head 1 --rows 0:170 >part.txt
check 'slice keeps the numbers' cmp whole.txt part.txt
check 'slice keeps the numbers (and there are some)' test "$(bytes whole.txt)" -gt 1000
ok kv-trace slice a.kvt all.kvt
ok kv-trace diff a.kvt all.kvt

# a file under the final name survives a run that fails, and is replaced by one that succeeds
cp c.kvt keep.kvt
exits 1 kv-trace slice missing.kvt keep.kvt --layers 0
exits 2 kv-trace slice a.kvt keep.kvt --layers 7
check 'an existing file survives a failure' cmp c.kvt keep.kvt
ok kv-trace slice keep.kvt keep.kvt --layers 0
ok kv-trace verify --deep keep.kvt
ok kv-trace synth --tokens 32 -o /dev/null
check 'no leftovers beside the files' test -z "$(find . -name '*.partial' -o -name '*.recovered')"

if have zstd; then
    ok zstd -tq a.kvt
else
    skip 'zstd is not installed: "zstd -t FILE.kvt" was not tried'
fi
