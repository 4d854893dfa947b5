# Models with weights at random: what they record passes its own checks, depends on shape, seed and tokens alone, and
# attention is neither flat nor a lookup.
. "$CLI/lib.sh"

for t in 1 2; do ok kv-capture run -m synthetic:tiny --tokens random:300 --decode 0 --threads $t -o t$t.kvt; done
ok kv-trace verify --deep t1.kvt
ok kv-trace diff t1.kvt t2.kvt
ok kv-capture run -m synthetic:tiny:2 --tokens random:300 -o seed.kvt
check 'another seed, another model' test "$(kv-trace info --json t1.kvt | grep model_sha256)" != "$(kv-trace info --json seed.kvt | grep model_sha256)"
ok kv-capture run -m synthetic:tiny-qwen --tokens random:300:9 --prompt-tokens 290 --record obs -o qwen.kvt
ok kv-trace verify --deep qwen.kvt
if python3 -c 'import numpy' 2>/dev/null; then
    ok kv-trace cat t1.kvt --stream rowstat -o stat.npy
    check 'the largest probability of a row is 0.1 to 0.5 on average' python3 -c '
import numpy as np
p = np.load("stat.npy")[:, :, 100:, 0].mean()
assert 0.1 < p < 0.5, p'
else
    skip 'python3 with numpy is not installed'
fi
refused 2 'tiny-qwen' kv-capture run -m synthetic:tinny --tokens random:5 -o out.kvt
refused 2 'seed' kv-capture run -m synthetic:tiny:x --tokens random:5 -o out.kvt
refused 2 'random:N' kv-capture run -m synthetic:tiny --tokens random:0 -o out.kvt
refused 1 'vocabulary' kv-capture run -m synthetic:tiny --text hello -o out.kvt
