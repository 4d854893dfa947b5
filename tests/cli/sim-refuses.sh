# kv-sim: policies, parameters, budgets, traces, databases and options that cannot be used. Nothing is computed; a database, when one was
# made already, is whole and holds nothing.
. "$CLI/lib.sh"

synth t.kvt
synth prompt-only.kvt --tokens 160 --prompt-tokens 160
run() { # run CODE WORD [options]
    code=$1 word=$2
    shift 2
    refused "$code" "$word" kv-sim run "$@" --db new.db
    no_runs new.db
}
keep() {
    code=$1 word=$2
    shift 2
    refused "$code" "$word" kv-sim keep "$@" -o out.npy
}

for c in run keep; do
    $c 2 "did you mean 'snapkv'" t.kvt -p snapvk -b 10%
    $c 2 "did you mean 'kvf.snapkv'" t.kvt -p kvf.snapvk -b 10%
    $c 2 'unknown policy' t.kvt -p zzzzzzzz -b 10%
    $c 2 "did you mean 'window'" t.kvt -p snapkv:windw=3 -b 10%
    $c 2 window= t.kvt -p snapkv:window=x -b 10%
    $c 2 window= t.kvt -p snapkv:window=-3 -b 10%
    $c 2 window= t.kvt -p 'snapkv:window=16|x' -b 10%
    $c 2 '10,000 points' t.kvt -p "snapkv:window=$(seq -s '|' 101),kernel=$(seq -s '|' 1 2 199)" -b 10%
    $c 2 'policy' t.kvt -p '' -b 10%
    $c 2 -p t.kvt -b 10%
    $c 2 -b t.kvt -p snapkv
    $c 2 trace -p snapkv -b 10%
    for b in '' x 5x -5% 5%% 101% 1.5 64XiB ratio=2 ratio=x autox nan 10%,x 99999999999999999999; do
        $c 2 "budget '${b#10%,}'" t.kvt -p snapkv -b "$b"
    done
    $c 1 missing.kvt missing.kvt -p snapkv -b 10%
    $c 1 missing.npy t.kvt -p mask:missing.npy -b 10%
    $c 2 mask t.kvt -p mask: -b 10%
    $c 2 importance t.kvt -p headkv -b 10%
    $c 1 missing.npy t.kvt -p headkv:importance=missing.npy -b 10%
    $c 1 t.kvt t.kvt -p expected-attention -b 10% # synth has no RoPE
    $c 2 "'twice'" t.kvt -p snapkv -b 10% --granularity twice
    $c 2 "'foo'" t.kvt -p snapkv -b 10% --protect foo
    $c 2 sink t.kvt -p snapkv -b 10% --protect sink=x
    $c 2 "'never'" t.kvt -p snapkv -b 10% --cut never
    $c 1 t.kvt t.kvt -p snapkv -b 10% --cut context
    $c 2 --decode-rows prompt-only.kvt -p snapkv -b 10% --decode-rows 160
    $c 2 "did you mean '--budget'" t.kvt -p snapkv --bugdet 10%
done
run 1 prompt-only.kvt prompt-only.kvt -p snapkv -b 10%
run 2 "did you mean 'recall'" t.kvt -p snapkv -b 10% --metrics recal
run 2 "'fine'" t.kvt -p snapkv -b 10% --detail fine
run 2 "'tpu'" t.kvt -p snapkv -b 10% --backend tpu
run 2 "'-1'" t.kvt -p snapkv -b 10% -j -1
for s in 0/2 3/2 1 x 1/0 1/2x; do run 2 "'$s'" t.kvt -p snapkv -b 10% --shard $s; done
keep 2 --at-step t.kvt -p snapkv -b 10% --at-step 41
keep 2 'one trace' t.kvt t.kvt -p snapkv -b 10%
keep 2 DIR/ t.kvt -p snapkv,cake -b 10%
keep 2 DIR/ t.kvt -p snapkv -b 10%,20%
refused 2 -o kv-sim keep t.kvt -p snapkv -b 10%
refused 1 missing/out.npy kv-sim keep t.kvt -p snapkv -b 10% -o missing/out.npy
refused 1 /dev/full kv-sim keep t.kvt -p snapkv -b 10% -o /dev/full
refused 2 "did you mean 'keep'" kv-sim kep t.kvt
refused 2 "did you mean 'cake'" kv-sim policies caek
refused 2 'trace' kv-sim selftest

# --db: something else, a folder that is not there, a folder, a damaged database
on() { # on FILE: as refused, and FILE is not touched
    if [ -f "$1" ]; then cp "$1" before; else rm -f before; fi
    refused 1 "$1" kv-sim run t.kvt -p snapkv -b 10% --db "$1"
    if [ -e before ]; then check "$1 is not touched" cmp "$1" before; fi
}
echo 'dear diary' >text.db
synth trace.db
mkdir folder.db
for d in text.db trace.db folder.db missing/results.db; do on $d; done
ok kv-sim run t.kvt -p snapkv,recency,random -b auto --db cut.db
head -c 20000 cut.db >head.db
on head.db
if have python3; then
    python3 -c 'import sqlite3; d = sqlite3.connect("other.db"); d.execute("create table x (a)"); d.commit()'
    on other.db
fi
if [ "$(id -u)" != 0 ]; then
    mkdir locked && chmod 555 locked
    on locked/results.db
elif [ -d /proc/self ]; then
    on /proc/results.db
fi

# one bad trace among good ones: said before anything is computed or made
exits 1 kv-sim run t.kvt missing.kvt -p snapkv -b 10% --db part.db
check 'it names the bad one' grep -q "'missing.kvt'" .err
check 'no database is made' test ! -e part.db
