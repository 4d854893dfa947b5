# Traces that are cut off, changed in one bit, something else, or not there: every command that reads one says so and writes nothing.
. "$CLI/lib.sh"

synth good.kvt
n=$(bytes good.kvt)
: >empty.kvt
head -c $((n / 2)) good.kvt >truncated.kvt
head -c 20 good.kvt >stub.kvt
echo 'dear diary, this is no trace at all' >text.kvt
head -c "$n" good.kvt | gzip >gzipped.kvt
(cat good.kvt && echo x) >longer.kvt
cp good.kvt magic.kvt && flip magic.kvt 0
cp good.kvt footer.kvt && flip footer.kvt $((n - 1))
mkdir folder.kvt

for t in empty truncated stub text gzipped longer magic footer folder missing; do
    t=$t.kvt
    refused 1 $t kv-trace info $t
    refused 1 $t kv-trace info $t --json
    refused 1 $t kv-trace verify $t
    refused 1 $t kv-trace verify --deep $t
    refused 1 $t kv-trace cat $t --stream q -o out.npy
    refused 1 $t kv-trace slice $t out.kvt --layers 0
    refused 1 $t kv-trace diff good.kvt $t
    refused 1 $t kv-trace diff $t good.kvt
    refused 1 $t kv-sim keep $t -p snapkv -b 10% -o out.npy
    refused 1 $t kv-sim selftest $t
    refused 1 $t kv-analyze plot attention --trace-file $t -p snapkv -b 10% -o attention
    refused 1 $t kv-sim run $t -p snapkv -b 10% --db results.db
done
check 'no figure of a trace that cannot be read' test -z "$(find . -name 'attention.*')"
check 'what has no footer is sent to recover' grep -q "kv-trace recover" <<W
$(kv-trace info truncated.kvt 2>&1)
W

# One bit anywhere in the file: verify notices, and nobody crashes.
i=0
while [ $i -lt 48 ]; do
    cp good.kvt flipped.kvt
    flip flipped.kvt $((n * i / 48 + i % 7))
    refused 1 flipped.kvt kv-trace verify flipped.kvt
    i=$((i + 1))
done

# Cut off anywhere.
for i in 1 7 8 47 48 100 1000 $((n / 3)) $((n - 300)) $((n - 49)) $((n - 1)); do
    head -c "$i" good.kvt >cut.kvt
    refused 1 cut.kvt kv-trace verify cut.kvt
done

# verify goes on behind a bad one
exits 1 kv-trace verify good.kvt missing.kvt good.kvt
check 'verify reports the good ones' test "$(kv-trace verify good.kvt missing.kvt good.kvt 2>/dev/null | grep -c 'ok')" = 2
ok kv-trace verify good.kvt
ok kv-trace verify --deep good.kvt good.kvt
