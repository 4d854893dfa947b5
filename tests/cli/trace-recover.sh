# recover: 0 = everything, 3 = something was lost (and says what), 1 = nothing usable. The result is a whole trace.
. "$CLI/lib.sh"

synth a.kvt
n=$(bytes a.kvt)

cp a.kvt footer.kvt && flip footer.kvt $((n - 1))
exits 0 kv-trace recover footer.kvt back.kvt
check 'a bad footer costs nothing' kv-trace diff a.kvt back.kvt

cp a.kvt magic.kvt && flip magic.kvt 0
exits 0 kv-trace recover magic.kvt back.kvt
check 'a bad magic costs nothing' kv-trace diff a.kvt back.kvt

# A bit in the last layer's data: the other layer survives whole.
cp a.kvt bit.kvt && flip bit.kvt $((n * 3 / 4))
exits 3 kv-trace recover bit.kvt bit-back.kvt
check 'it says what was lost' grep -q '^lost: 1 chunk' .out
ok kv-trace verify --deep bit-back.kvt

# The end is missing, as after kill -9; the help's way of saying it: X.kvt.partial to X.kvt
head -c $((n * 3 / 4)) a.kvt >cut.kvt.partial
exits 3 kv-trace recover cut.kvt.partial cut.kvt
ok kv-trace verify --deep cut.kvt
check 'the input stays' test "$(bytes cut.kvt.partial)" = $((n * 3 / 4))
kv-trace cat a.kvt --stream q --layer 0 >whole.txt
kv-trace cat cut.kvt --stream q --layer 0 >part.txt
check 'layer 0 came through' cmp whole.txt part.txt

# in place
cp bit.kvt here.kvt
exits 3 kv-trace recover here.kvt here.kvt
check 'recovered in place' kv-trace diff bit-back.kvt here.kvt

head -c 2000 a.kvt >little.kvt
refused 1 little.kvt kv-trace recover little.kvt out.kvt
: >empty.kvt
refused 1 empty.kvt kv-trace recover empty.kvt out.kvt
head -c 9999 "$CLI/../../Makefile" >text.kvt
refused 1 text.kvt kv-trace recover text.kvt out.kvt
refused 1 missing.kvt kv-trace recover missing.kvt out.kvt
refused 1 missing/out.kvt kv-trace recover bit.kvt missing/out.kvt
mkdir folder.kvt
refused 1 folder.kvt kv-trace recover folder.kvt out.kvt
