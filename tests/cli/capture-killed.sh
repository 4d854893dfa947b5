# kill -9 in the middle of a capture: nothing under the final name, the finished layers can be recovered, the same command starts anew.
# Ctrl-C: the same, and it says so.
. "$CLI/lib.sh"

tokens 5000 >t.json
ok kv-capture run -m "$MODEL" --tokens t.json -o whole.kvt
size=$(bytes whole.kvt)

# stopped SIGNAL OUT: start a capture, signal it when layer 0 and a part of layer 1 are written; sets rc
stopped() {
    tries=0
    while [ $tries -lt 5 ]; do
        tries=$((tries + 1))
        rm -f "$2" "$2.partial"
        kv-capture run -m "$MODEL" --tokens t.json -o "$2" 2>.err &
        pid=$!
        while [ "$(bytes "$2.partial")" -lt $((size * 6 / 10)) ] && kill -0 $pid 2>/dev/null; do sleep 0.01; done
        kill -"$1" $pid 2>/dev/null
        wait $pid 2>/dev/null
        rc=$?
        if [ $rc -ne 0 ]; then return; fi # 0: it was faster than we are, once more
    done
}

stopped KILL killed.kvt
check 'killed in the middle (5 tries)' test $rc -eq 137
check 'nothing under the final name' test ! -e killed.kvt
exits 3 kv-trace recover killed.kvt.partial back.kvt
ok kv-trace verify --deep back.kvt
kv-trace cat whole.kvt --stream k --layer 0 --rows 0:50 >whole.txt
kv-trace cat back.kvt --stream k --layer 0 --rows 0:50 >back.txt
check 'layer 0 is what it would have been' cmp whole.txt back.txt
refused 1 'recover' kv-trace info killed.kvt.partial
ok kv-capture run -m "$MODEL" --tokens t.json -o killed.kvt
ok kv-trace diff whole.kvt killed.kvt
check 'no .partial stays behind a finished capture' test ! -e killed.kvt.partial

stopped INT stopped.kvt
check 'Ctrl-C: exit 1' test $rc -eq 1
check 'Ctrl-C: it says what is left' grep -q "stopped by a signal.*'stopped.kvt.partial'" .err
check 'nothing under the final name' test ! -e stopped.kvt
kv-trace recover stopped.kvt.partial stopped.kvt >.out 2>.err
rc=$? # the signal is looked at between layers: maybe both are complete
check 'what was captured can be recovered' test $rc -eq 0 -o $rc -eq 3
ok kv-trace verify --deep stopped.kvt
