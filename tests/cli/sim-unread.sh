# A parameter that no slot of the policy reads is named on stderr; one that is read, or that says what is so anyway, is not.
. "$CLI/lib.sh"

synth t.kvt
note() { # note NAME POLICY
    ok kv-sim run t.kvt -p "$2" -b 10% --db n.db
    check "$2: '$1' is named, once" test "$(grep -c "note: .* reads $1: no effect" .err)" = 1
    rm -f n.db
}
none() { # none POLICY
    ok kv-sim run t.kvt -p "$1" -b 10% --db n.db
    check "$1: no note" test "$(grep -c 'note: nothing' .err)" = 0
    rm -f n.db
}
note gamma knorm:gamma=3
note gamma 'knorm:gamma=1|2|3'
note gamma knorm,knorm:gamma=3
note tau1 snapkv:tau1=2
note 'gamma, tau1' snapkv:gamma=3,tau1=2
note floor_alpha snapkv:floor_alpha=0.5
note window full:window=3
none knorm:gamma=200
none cake:gamma=3,tau1=2
none snapkv:window=8,kernel=5,alpha=0.2
none ada-snapkv:floor_alpha=0.5
none kvf.pyramidkv:skip_layers=none
ok kv-sim keep t.kvt -p knorm:gamma=3 -b 10% -o k.npy
check 'keep says it too' grep -q 'reads gamma: no effect' .err
ok kv-sim policies knorm:gamma=3
check 'policies says it too' grep -q 'reads gamma: no effect' .err
