# kv-capture: models, token files and options that cannot be used.
. "$CLI/lib.sh"

echo '[5, 6, 7]' >t.json
run() { # run CODE WORD [options]
    code=$1 word=$2
    shift 2
    refused "$code" "$word" kv-capture run "$@" -o out.kvt
}

# models
: >empty.gguf
echo 'not a model' >text.gguf
head -c 20000 "$MODEL" >cut.gguf
mkdir folder.gguf
for m in empty text cut folder missing; do
    run 1 $m.gguf -m $m.gguf --tokens t.json
    refused 1 $m.gguf kv-capture info -m $m.gguf
    refused 1 $m.gguf kv-capture tokenize -m $m.gguf --text the
done
run 2 --model --tokens t.json

# token files
echo '[5, 6' >open.json
echo '{"ids": [5]}' >object.json
: >empty.json
echo '[99999999999999999999]' >huge.json
for j in open object empty huge missing; do run 1 $j.json -m "$MODEL" --tokens $j.json; done
echo '[5, 512]' >high.json
echo '[-1]' >low.json
echo '[1.5]' >half.json
echo '["the"]' >string.json
for j in high low half string; do run 2 $j.json -m "$MODEL" --tokens $j.json; done
echo '[]' >none.json
run 2 none -m "$MODEL" --tokens none.json
run 2 --prompt-tokens -m "$MODEL" --tokens t.json --prompt-tokens 4

# options
run 2 "did you mean '--record'" -m "$MODEL" --tokens t.json --recrod obs
run 2 "'obss'" -m "$MODEL" --tokens t.json --record obss
run 2 "'f8'" -m "$MODEL" --tokens t.json --dtype f8
run 2 "'tpu'" -m "$MODEL" --tokens t.json --backend tpu
run 2 "'huge'" -m "$MODEL" --tokens t.json --maps huge
run 2 'layer 7' -m "$MODEL" --tokens t.json --layers 0,7
run 2 "'x'" -m "$MODEL" --tokens t.json --layers x
run 2 "'1x'" -m "$MODEL" --tokens t.json --decode 1x
run 2 "'-1'" -m "$MODEL" --tokens t.json --threads -1
run 2 "'10x'" -m "$MODEL" --tokens t.json --max-bytes 10x
run 1 --max-bytes -m "$MODEL" --tokens t.json --max-bytes 10
run 2 'row 9' -m "$MODEL" --tokens t.json --logits f.npy --logits-rows 9
run 1 missing/f.npy -m "$MODEL" --tokens t.json --logits missing/f.npy
run 2 'one of' -m "$MODEL"
run 2 'more than one' -m "$MODEL" --tokens t.json --text the
run 2 'more than one' -m "$MODEL" --tokens t.json --prompts p.jsonl
run 2 "'extra'" -m "$MODEL" --tokens t.json extra
refused 2 "did you mean 'tokenize'" kv-capture tokenise -m "$MODEL" --text the
refused 2 -o kv-capture run -m "$MODEL" --tokens t.json
refused 1 missing/out.kvt kv-capture run -m "$MODEL" --tokens t.json -o missing/out.kvt
refused 1 /dev/full kv-capture run -m "$MODEL" --tokens t.json -o /dev/full
check 'no logits of a run that failed' test ! -e f.npy

# --dry-run counts and writes nothing
ok kv-capture run -m "$MODEL" --tokens t.json --dry-run -o dry.kvt
check 'it counts q' grep -qE '^ *q +3072$' .out
check '--dry-run writes nothing' test -z "$(find . -name 'dry*' -o -name 'wo-*')"
if have python3; then
    ok kv-capture run -m "$MODEL" --tokens t.json --dry-run --json
    cp .out plan.json
    check '--json parses' python3 -c 'import json; assert json.load(open("plan.json"))[0]["bytes"]["q"] == 3072'
fi
ok kv-capture run -m "$MODEL" --tokens t.json -o /dev/null
check 'nothing beside /dev/null' test -z "$(find . -name '*.kvt*' -o -name 'wo-*')"
