# import refuses arrays that do not fit together, and what it takes comes back from cat bit for bit.
. "$CLI/lib.sh"
if ! python3 -c 'import numpy' 2>/dev/null; then
    skip 'python3 with numpy is not installed'
    exit 0
fi
python3 "$CLI/arrays.py"
tokens 40 >t40.json
echo '[1, 2]' >t2.json
echo '{"a": 1}' >object.json

try() { # try WORD QUERIES KEYS VALUES [options]
    word=$1 q=$2 k=$3 v=$4
    shift 4
    refused 1 "$word" kv-trace import --q "$q.npy" --k "$k.npy" --v "$v.npy" "$@" -o out.kvt
}
try k_short.npy q k_short v
try v_wide.npy q k v_wide
try v.npy q k_three v
try q_three_axes.npy q_three_axes k v
try q_empty.npy q_empty k v
try q_int.npy q_int k v
try q_nan.npy q_nan k v
try q_inf.npy q_inf k v
try v_nan.npy q k v_nan
try big-endian q_big k v
try column-major q_fortran k v
try q_complex.npy q_complex k v
try q_object.npy q_object k v
try q_cut.npy q_cut k v
try q_text.npy q_text k v
try q_liar.npy q_liar k v
try missing.npy missing k v
try wo_narrow.npy q k v --wo wo_narrow.npy
try t2.json q k v --tokens t2.json
try object.json q k v --tokens object.json
try missing.json q k v --tokens missing.json
refused 2 --prompt-tokens kv-trace import --q q.npy --k k.npy --v v.npy --prompt-tokens 41 -o out.kvt
refused 2 --rope-theta kv-trace import --q q.npy --k k.npy --v v.npy --rope-theta x -o out.kvt
refused 2 --map kv-trace import --q q.npy --k k.npy --v v.npy --map map.npy -o out.kvt
refused 2 --q kv-trace import --k k.npy --v v.npy -o out.kvt
refused 2 -o kv-trace import --q q.npy --k k.npy --v v.npy
refused 1 missing/out.kvt kv-trace import --q q.npy --k k.npy --v v.npy -o missing/out.kvt
refused 1 map_nan.npy kv-trace import --map map_nan.npy -o out.kvt
refused 1 q_three_axes.npy kv-trace import --map q_three_axes.npy -o out.kvt

# write, read, equal: f32, f16, W_O, tokens, a map
ok kv-trace import --q q.npy --k k.npy --v v.npy --wo wo.npy --tokens t40.json --prompt-tokens 30 -o full.kvt
ok kv-trace import --q q_half.npy --k k_half.npy --v v_half.npy -o half.kvt
ok kv-trace import --map map.npy --prompt-tokens 30 -o map.kvt
ok kv-trace verify --deep full.kvt half.kvt map.kvt
for s in q k v wo; do
    ok kv-trace cat full.kvt --stream $s -o back_$s.npy
    check "$s comes back bit for bit" python3 "$CLI/equal.py" $s.npy back_$s.npy
done
ok kv-trace cat half.kvt --stream q -o back.npy
check 'f16 comes back bit for bit' python3 "$CLI/equal.py" q_half.npy back.npy
ok kv-trace cat map.kvt --stream map -o back.npy
check 'the map comes back bit for bit' python3 "$CLI/equal.py" map.npy back.npy
check 'tokens come back' test "$(kv-trace cat full.kvt --stream tokens | tr -d ' \n')" = "$(tr -d ' \n' <t40.json)"
ok kv-trace import --q back_q.npy --k back_k.npy --v back_v.npy --wo back_wo.npy --tokens t40.json --prompt-tokens 30 -o again.kvt
check 'imported again: the same bytes' cmp full.kvt again.kvt
ok kv-trace diff full.kvt again.kvt

# .npz and safetensors: the same trace as from .npy files
ok kv-trace import --q q.npy --k k.npy --v v.npy -o npy.kvt
same() { # same WHAT QUERIES KEYS VALUES: gives npy.kvt again
    ok kv-trace import --q "$2" --k "$3" --v "$4" -o other.kvt
    check "$1 gives the same trace" cmp npy.kvt other.kvt
}
same .npz all.npz:q all.npz:k all.npz:v
same 'a compressed .npz' packed.npz:q packed.npz:k packed.npz:v
same 'safetensors' all.safetensors:layers.q all.safetensors:layers.k all.safetensors:layers.v
same 'a mixture, one array without a name' packed.npz:q one.npz with:colon.npy
ok kv-trace import --map all.npz:map -o map_npz.kvt
ok kv-trace import --q bf16.safetensors:q --k bf16.safetensors:k --v bf16.safetensors:v -o bf16.kvt
ok kv-trace info bf16.kvt --json
check 'bfloat16 stays bfloat16' grep -q '"dtype": "bf16"' .out
ok kv-trace cat bf16.kvt --stream q -o bf16.npy
check 'and its values' python3 "$CLI/equal.py" bf16.npy q_bf16.npy

odd() { # odd N WORD ARRAY
    refused "$1" "$2" kv-trace import --q "$3" --k k.npy --v v.npy -o out.kvt
}
odd 2 'q k v map' all.npz
odd 1 'no array' all.npz:nothing
odd 1 layers.q all.safetensors:q
odd 2 layers.q all.safetensors
odd 2 'has no names' k.npy:q
odd 1 'No such file' nowhere.npz:q
odd 1 'truncated' cut.npz:q
odd 1 checksum flipped.npz:q
odd 1 damaged flipped_packed.npz:q
odd 1 'larger than it can be' bomb.npz:q
odd 1 'not a .npy' text.npz
odd 1 'method 12' bzip2.npz
odd 1 'no arrays' empty.npz
odd 1 F8_E4M3 f8.safetensors
odd 1 duplicate twice.safetensors:layers.q
odd 1 data_offsets beyond.safetensors:layers.q
odd 1 shape negative.safetensors:layers.q
odd 1 shape wrap.safetensors:layers.q
odd 1 'header length' long.safetensors:layers.q
