# The closed loop on the command line: what it needs, what it refuses, that it resumes and gives the same numbers again.
. "$CLI/lib.sh"

M="$ROOT/tests/golden/models/gguf/llama256/llama256.F16.gguf"
ok kv-capture run -m "$M" --text 'The quick brown fox jumps over the lazy dog, and the dog sleeps on and on.' --decode 12 -o t.kvt
ok kv-sim run t.kvt -p full,snapkv,h2o:decode=h2o -b 10,20 --model "$M" --generate --db r.db
cp .err first.err
check 'six runs' grep -q '6 new runs' first.err
ok kv-sim run t.kvt -p full,snapkv,h2o:decode=h2o -b 10,20 --model "$M" --generate --db r.db
check 'nothing is computed twice' grep -q '0 new runs' .err
ok kv-sim run t.kvt -p full,snapkv -b 10 --db r.db
check 'and less is asked for: nothing either' grep -q '0 new runs' .err
ok kv-sim run t.kvt -p full,snapkv,h2o:decode=h2o -b 10,20 --model "$M" --generate --db s.db -j 1
if have sqlite3; then
    q="SELECT policy, budget, metric, layer, value FROM v_metric WHERE metric IN ('delta_nll','kl','top1_agree','top5_overlap','stream_error','closed_head_error','answer_found','first_divergence') ORDER BY 1,2,3,4"
    sqlite3 r.db "$q" >a
    sqlite3 s.db "$q" >b
    check 'the same numbers with one thread' cmp a b
    check 'a full cache loses nothing' test "$(sqlite3 r.db "SELECT count(*) FROM v_metric WHERE policy='full' AND metric IN ('delta_nll','kl') AND value = 0")" = 4
    check 'an evicted one does' test "$(sqlite3 r.db "SELECT count(*) FROM v_metric WHERE policy='snapkv' AND metric='kl' AND value > 0")" = 2
else
    skip 'no sqlite3: the numbers are not looked at'
fi

if have gnuplot; then
    ok kv-analyze plot nll --db r.db -o fig
    check 'nll.svg is one' grep -q '</svg>' fig/nll.svg
else
    skip 'gnuplot is not installed: nll is not drawn'
fi

ok kv-sim run t.kvt -p snapkv -b 10 --model "$M" --detail step --metrics delta_nll,kl --db steps.db
if have sqlite3; then
    check 'a value for every step, and their mean' test "$(sqlite3 steps.db "SELECT count(*), abs(avg(CASE WHEN step IS NOT NULL THEN value END) - avg(CASE WHEN step IS NULL THEN value END)) < 1e-9 FROM v_metric WHERE metric='delta_nll'")" = '13|1'
fi

refused 1 'decides row by row' kv-sim run t.kvt -p h2o:decode=h2o -b 10 --model "$M" --backend cuda --db out.db
refused 2 'runs on the CPU' kv-sim run t.kvt -p snapkv -b 10 --model "$M" --generate --backend cuda --db out.db
refused 2 'needs --model' kv-sim run t.kvt -p snapkv -b 10 --generate --db out.db
refused 2 'need --model' kv-sim run t.kvt -p snapkv -b 10 --metrics delta_nll --db out.db
refused 2 'need --generate' kv-sim run t.kvt -p snapkv -b 10 --metrics answer_found --model "$M" --db out.db
refused 1 'none.gguf' kv-sim run t.kvt -p snapkv -b 10 --model none.gguf --db out.db
refused 2 'another model' kv-sim run t.kvt -p snapkv -b 10 --model "$ROOT/tests/golden/models/gguf/llama256/llama256.Q2_K.gguf" --db out.db
ok kv-trace slice t.kvt part.kvt --layers 0
refused 2 'needs all of them' kv-sim run part.kvt -p snapkv -b 10 --model "$M" --db out.db
synth imported.kvt
refused 2 "--model" kv-sim run imported.kvt -p snapkv -b 10 --model "$M" --db out.db
