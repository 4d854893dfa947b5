# kv-analyze: databases, names and selections that cannot be used.
. "$CLI/lib.sh"

synth t.kvt
synth u.kvt --seed 2
kv-sim run t.kvt u.kvt -p snapkv,recency -b 10%,50% --db r.db 2>/dev/null || fail 'cannot make r.db'

: >empty.db
echo 'dear diary, this is no database' >text.db
head -c 20000 r.db >cut.db
mkdir folder.db
for d in empty text cut folder missing; do
    for c in summary curve layers export 'plot curve -o figures'; do
        # shellcheck disable=SC2086 # the words of a command
        refused 1 $d.db kv-analyze $c --db $d.db
    done
done
check 'nobody made missing.db' test ! -e missing.db
refused 1 t.kvt kv-analyze summary --db t.kvt
if have python3; then
    python3 -c 'import sqlite3; d = sqlite3.connect("other.db"); d.execute("create table x (a)"); d.commit()'
    refused 1 other.db kv-analyze summary --db other.db
    python3 -c 'import sqlite3; d = sqlite3.connect("new.db"); d.executescript(open("'"$ROOT"'/sim/schema.sql").read())'
    for c in summary curve layers export; do refused 1 'no runs' kv-analyze $c --db new.db; done
fi

refused 2 "'sumary'" kv-analyze sumary --db r.db
refused 2 "did you mean '--metric'" kv-analyze summary --db r.db --metrc recall
refused 1 "'recal'" kv-analyze summary --db r.db --metric recal
refused 1 "'snapvk'" kv-analyze summary --db r.db -p snapvk
refused 1 "'7%'" kv-analyze summary --db r.db -b 7%
refused 1 "'nope'" kv-analyze summary --db r.db --trace nope
refused 1 "'nope'" kv-analyze curve --db r.db --category nope
refused 1 "'nope'" kv-analyze layers --db r.db --model nope
refused 2 "'things'" kv-analyze export --db r.db --what things
refused 2 --csv kv-analyze summary --db r.db --csv --json
refused 2 "'curvy'" kv-analyze plot curvy --db r.db -o out
refused 2 "'../curve'" kv-analyze plot ../curve --db r.db -o out
refused 2 -o kv-analyze plot all --db r.db
refused 1 t.kvt kv-analyze plot curve --db r.db -o t.kvt
refused 1 "'recal'" kv-analyze plot curve --db r.db -o figures --metric recal
refused 1 "'recal'" kv-analyze plot all --db r.db -o figures --metric recal
refused 1 "'snapvk'" kv-analyze plot all --db r.db -o figures -p snapvk
check 'no figures' test -z "$(find . -name 'curve*')"

attention() {
    code=$1 word=$2
    shift 2
    refused "$code" "$word" kv-analyze plot attention "$@" -o figures
    check 'no figure' test -z "$(find . -name 'attention.*')"
}
attention 1 missing.kvt --trace-file missing.kvt -p snapkv -b 10%
attention 1 "'snapkv'" --trace-file t.kvt -p snapvk -b 10%
attention 1 "'10x'" --trace-file t.kvt -p snapkv -b 10x
attention 1 'layer 9' --trace-file t.kvt -p snapkv -b 10% --layer 9
attention 1 'head 9' --trace-file t.kvt -p snapkv -b 10% --head 9
attention 2 --trace-file -p snapkv -b 10%
