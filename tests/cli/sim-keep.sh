# Kept sets: the same bytes every time, masks, folders, and a kept set fed back as mask: measures the same.
. "$CLI/lib.sh"

synth t.kvt
ok kv-sim keep t.kvt -p cake -b 20% -o one.npy
cp .out one.json
ok kv-sim keep t.kvt -p cake -b 20% -o two.npy
sed 's/two.npy/one.npy/' .out >two.json
check 'keep twice: the same set' cmp one.npy two.npy
check 'keep twice: the same ledger' cmp one.json two.json
ok kv-sim keep t.kvt -p cake -b 20% -o /dev/null

ok kv-sim keep t.kvt -p snapkv,cake -b 5%,20% -o sets/
cp .out sets.json
check 'a file for each policy and budget' test "$(find sets -name '*.npy' | wc -l)" = 4
cmp -s one.npy "$(find sets -name 'cake*@20%.npy')"
check 'the same set as alone' test $? -eq 0
check 'no leftovers' test -z "$(find . -name '*.partial')"

if ! python3 -c 'import numpy, sqlite3' 2>/dev/null; then
    skip 'python3 with numpy is not installed: what is in the sets was not looked at'
    exit 0
fi
ok kv-sim keep t.kvt -p cake -b 20% --mask -o mask.npy
ok kv-sim keep t.kvt -p tova.decode -b 20% -o tova.npy
ok kv-sim keep t.kvt -p tova.decode -b 20% --mask --at-step 7 -o tova7.npy
cat >look.py <<'W'
import json
import numpy as np

one, mask = np.load("one.npy"), np.load("mask.npy")
ledger = json.load(open("one.json"))
assert one.dtype == np.int32 and mask.dtype == np.uint8 and one.shape == mask.shape == (2, 2, 200)
assert np.array_equal(one == -1, mask == 1) and set(np.unique(one)) == {-1, 0}
assert one[:, :, :160][one[:, :, :160] == -1].size == ledger["kept_slots"] == np.sum(ledger["counts"]) == 2 * 2 * 32
assert np.array_equal((one[:, :, :160] == -1).sum(-1), ledger["counts"]) and (one[:, :, 160:] == -1).all()
sets = json.load(open("sets.json"))
assert len(sets) == 4 and all(np.load(s["file"]).shape == (2, 2, 200) for s in sets)
at, seen = np.load("tova.npy"), np.load("tova7.npy")  # t = visible to decode rows before row t; the next row is 7
assert at.shape == seen.shape == (2, 1, 200) and (at > 0).any()
assert np.array_equal(seen == 1, ((at == -1) | (at > 7)) & (np.arange(200) < 167))
W
check 'shapes, types and the ledger agree' python3 look.py

# the set of a policy through mask: = the policy
for p in cake ada-snapkv tova; do
    ok kv-sim keep t.kvt -p $p -b 20% -o set.npy
    ok kv-sim run t.kvt -p $p -b 20% --detail head --db policy.db
    ok kv-sim run t.kvt -p mask:set.npy -b 20% --detail head --db mask.db
    check "mask: measures what $p does" python3 "$CLI/close.py" policy.db mask.db --policy
    rm -f policy.db mask.db
done

# masks that do not fit
python3 - <<'W'
import numpy as np

one = np.load("one.npy")
np.save("short", one[:, :, :100])
np.save("heads", one[:, :1].repeat(3, 1))
np.save("layers", one[:1])
np.save("two", (one == -1).astype(np.uint8) * 2)
np.save("late", np.where(one == 0, 999, one))
np.save("float", one.astype(np.float32))
W
for m in short heads layers two late float; do
    refused 1 $m.npy kv-sim run t.kvt -p mask:$m.npy -b 20% --db new.db
    no_runs new.db
done
