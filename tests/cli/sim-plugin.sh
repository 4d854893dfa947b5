# A policy from a shared object: into results.db under a name and a hash of its own, the same sets from the spec the database
# keeps, and one line when it cannot be used.
. "$CLI/lib.sh"

BIN=$(dirname "$(command -v kv-sim)")
EXAMPLE=$BIN/plugins/example_vnorm.so
if [ ! -f "$EXAMPLE" ]; then
    skip "no $EXAMPLE (make tests builds it)"
    exit 0
fi
cp "$EXAMPLE" mine.so
synth a.kvt

ok kv-sim policies plugin:./mine.so
check 'policies names the paper' grep -q 'VATP' .out
check 'policies says that nobody checked it' grep -q 'verified  not verified: plug-in' .out
ok kv-sim policies plugin:./mine.so --json
check 'JSON' python3 -c 'import json; p = json.load(open(".out"))[0]; assert p["name"] == "plugin.vnorm" and p["parameters"]["window"] == "32"'

ok kv-sim run a.kvt -p plugin:./mine.so -p plugin:./mine.so:heads=ada,layers=cake,window=16 -p snapkv -b 20%,50% --db a.db
check '6 runs' grep -q '6 new runs' .err
ok kv-sim run a.kvt -p plugin:./mine.so -b 20%,50% --db a.db
check 'nothing twice' grep -q '0 new runs' .err
ok kv-analyze export --db a.db
check 'the policy has its name' grep -q 'plugin\.vnorm' .out
check 'and its hash' grep -q "sha256=$(sha256sum mine.so | cut -c1-64)" .out
check 'and says who vouches for it' grep -q 'not verified: plug-in' .out

# the spec in the database is a policy like any other, as long as the file is the same
ok kv-sim keep a.kvt -p plugin:./mine.so -b 20% -o one.npy
spec=$(sed 's/.*"spec":"\([^"]*\)".*/\1/' .out)
ok kv-sim keep a.kvt -p "$spec" -b 20% -o two.npy
check 'same sets from the canonical spec' cmp one.npy two.npy
ok kv-sim keep a.kvt -p snapkv:pooling=none,value=norm -b 20% -o three.npy
check 'same sets as the same arithmetic inside' cmp one.npy three.npy
printf x >>mine.so
refused 2 'SHA-256' kv-sim keep a.kvt -p "$spec" -b 20% -o out.npy
ok kv-sim run a.kvt -p plugin:./mine.so -b 20% --db a.db
check 'another file is another run' grep -q '1 new run' .err

refused 1 'none.so' kv-sim keep a.kvt -p plugin:./none.so -b 20% -o out.npy
refused 2 "'/'" kv-sim keep a.kvt -p plugin:mine.so -b 20% -o out.npy
refused 1 'shared object' kv-sim keep a.kvt -p plugin:./a.kvt -b 20% -o out.npy
refused 1 'ABI 99' kv-sim keep a.kvt -p "plugin:$BIN/tests/plugins/bad_abi.so" -b 20% -o out.npy
refused 1 'position 3' kv-sim keep a.kvt -p "plugin:$BIN/tests/plugins/fails.so" -b 20% -o out.npy
refused 1 'singular' kv-sim run a.kvt -p "plugin:$BIN/tests/plugins/fails.so:how=text" -b 20% --db new.db
no_runs new.db
refused 2 "'widow'" kv-sim keep a.kvt -p plugin:./mine.so:widow=3 -b 20% -o out.npy
