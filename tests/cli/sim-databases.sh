# Databases that two programs write at once, that may only be read, that are of another time or of something else, and that are damaged.
. "$CLI/lib.sh"
if ! python3 -c 'import sqlite3' 2>/dev/null; then
    skip 'python3 is not installed: databases cannot be compared'
    exit 0
fi
sql() { # sql DB STATEMENT
    python3 -c 'import sqlite3, sys; d = sqlite3.connect(sys.argv[1]); d.executescript(sys.argv[2]); d.commit()' "$@"
}

# Two, then four writers on one database that is not there yet: all finish, and it holds what one after the other would have written.
for i in 1 2 3 4 5 6; do synth $i.kvt --seed $i; done
sweep() { # sweep DB POLICIES TRACE..
    db=$1 p=$2
    shift 2
    kv-sim run "$@" -p "$p" -b 5%,20% --detail head -j 1 --db "$db"
}
ok sweep one.db snapkv,h2o,recency [1-6].kvt
ok sweep one.db knorm,cake,recency [1-6].kvt
python3 "$CLI/dump.py" one.db >one.txt
for round in 1 2; do
    rm -f both.db*
    sweep both.db snapkv,h2o,recency [1-6].kvt 2>first.err &
    first=$!
    sweep both.db knorm,cake,recency [1-6].kvt 2>second.err &
    second=$!
    wait $first
    rc=$?
    wait $second
    check "two writers: both finish ($round)" test "$rc/$?" = 0/0
    python3 "$CLI/dump.py" both.db >both.txt
    check "and the database is the union ($round)" cmp one.txt both.txt
done
ok sweep alone.db snapkv,knorm,h2o,cake,recency [1-6].kvt
python3 "$CLI/dump.py" alone.db >alone.txt
for i in 1 2 3 4; do sweep four.db snapkv,knorm,h2o,cake,recency [1-6].kvt 2>$i.err & done
wait
ok sweep four.db snapkv,knorm,h2o,cake,recency [1-6].kvt
check 'four writers of the same runs: all is there' grep -q '^kv-sim: 0 new runs' .err
python3 "$CLI/dump.py" four.db >four.txt
check 'and nothing twice' cmp alone.txt four.txt

# Somebody holds it for a while: a writer waits.
hold() { python3 -c 'import sqlite3, time; d = sqlite3.connect("held.db"); d.execute("BEGIN EXCLUSIVE"); print("held", flush=True); time.sleep(3)'; }
cp one.db held.db
hold >held.txt &
while [ ! -s held.txt ]; do sleep 0.05; done
ok sweep held.db tova 1.kvt
wait

# read-only: can be read, not written
mkdir locked
cp one.db locked/r.db
if [ "$(id -u)" != 0 ]; then
    chmod 444 locked/r.db && chmod 555 locked
    unlock() { chmod 755 locked; }
elif mount -t tmpfs -o size=4m kvtrace-test locked 2>/dev/null && cp one.db locked/r.db && mount -o remount,ro locked; then
    unlock() { umount locked; }
    trap unlock EXIT
    trap 'exit 1' INT TERM
else
    unlock() { :; }
    skip 'as root and without tmpfs: nothing is read-only'
fi
if ! (: >locked/x) 2>/dev/null; then
    refused 1 locked/r.db kv-sim run 1.kvt -p tova -b 5% --db locked/r.db
    refused 1 locked/new.db kv-sim run 1.kvt -p tova -b 5% --db locked/new.db
    ok kv-analyze summary --db locked/r.db
    refused 1 locked/all.db kv-analyze merge one.db both.db -o locked/all.db
    refused 1 locked/page.html kv-analyze report --db one.db -o locked/page.html
    refused 1 locked/out.kvt kv-trace slice 1.kvt locked/out.kvt --layers 0
    refused 1 locked/out.kvt kv-capture run -m "$MODEL" --text the -o locked/out.kvt
fi
unlock
trap - EXIT

# other times, other programs
unchanged() { # unchanged WORD DB: everybody refuses it, nobody touches it
    cp "$2" before
    refused 1 "$1" kv-sim run 1.kvt -p snapkv -b 10% --db "$2"
    refused 1 "$1" kv-analyze summary --db "$2"
    refused 1 "$1" kv-analyze merge one.db "$2" -o out.db
    refused 1 "$1" kv-analyze report --db "$2" -o out.html
    check "$2 is not touched" cmp before "$2"
}
for v in 2 4 2000000000; do
    cp one.db schema.db
    sql schema.db "PRAGMA user_version = $v"
    unchanged "$v" schema.db
done
cp one.db foreign.db
sql foreign.db 'PRAGMA application_id = 7'
unchanged foreign.db foreign.db
sql other.db 'CREATE TABLE x (a)'
unchanged other.db other.db
: >nothing.db
refused 1 nothing.db kv-analyze summary --db nothing.db
refused 1 missing.db kv-analyze summary --db missing.db
refused 1 missing.db kv-analyze merge one.db missing.db -o out.db
check 'nobody made missing.db' test ! -e missing.db
cp one.db views.db # right numbers in front, other tables behind
sql views.db 'DROP VIEW v_metric; DROP TABLE metric'
cp views.db before
refused 1 views.db kv-sim run 1.kvt -p tova -b 10% --db views.db
refused 1 views.db kv-analyze summary --db views.db
refused 1 views.db kv-analyze merge one.db views.db -o out.db
check 'views.db is not touched' cmp before views.db

# damaged in one place: an answer or one line, never a crash, never a file that is half there
n=$(bytes one.db)
i=0
while [ $i -lt 14 ]; do
    cp one.db hurt.db
    flip hurt.db $((n * i / 14 + i % 13))
    for c in 'kv-analyze summary --db hurt.db' 'kv-analyze merge hurt.db one.db -o all.db' 'kv-sim run 1.kvt -p tova -b 10% --db hurt.db'; do
        $c >.out 2>.err
        rc=$?
        case $rc in 0) pass ;; 1) check "one line: $c" test "$(grep -c '^kv-' .err)" = 1 ;; *) fail "exit $rc: $c (bit $i)" ;; esac
    done
    rm -f all.db
    i=$((i + 1))
done
