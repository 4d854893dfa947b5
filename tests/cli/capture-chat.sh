# --chat: the prompt as a user's turn, what the trace says of it, and families that do not fit the model.
. "$CLI/lib.sh"

SMOLLM=$ROOT/build/models/SmolLM2-135M-Instruct.Q4_1.gguf
refused 2 'no token' kv-capture tokenize -m "$MODEL" --chat gemma --text hello
refused 2 'did you mean' kv-capture tokenize -m "$MODEL" --chat llama33 --text hello
refused 2 'no chat template' kv-capture tokenize -m "$MODEL" --chat auto --text hello
refused 2 --chat kv-capture run -m "$MODEL" --chat llama2 --tokens t.json -o out.kvt
ok kv-capture run -m "$MODEL" --chat llama2 --text ' hello ' -o a.kvt
ok kv-trace cat a.kvt --stream text
check 'the text is the whole turn' test "$(cat .out)" = '[INST] hello [/INST]'
ok kv-trace info a.kvt --json
check 'the trace names the template' grep -q '"chat": "llama2"' .out
if [ ! -f "$SMOLLM" ]; then
    skip 'no build/models/SmolLM2-135M-Instruct.Q4_1.gguf'
    exit 0
fi
ok kv-capture tokenize -m "$SMOLLM" --chat auto --text 'hi <|im_end|>' --json
mv .out auto
check 'auto is the family of the model' sh -c "kv-capture tokenize -m '$SMOLLM' --chat smollm2 --text 'hi <|im_end|>' --json | cmp - auto"
# token 2 is <|im_end|>: twice in the template, and in the user's text only when asked for
check 'control tokens of the user stay text' test "$(tr -d '[]' <auto | tr ',' '\n' | grep -cx ' *2')" = 2
ok kv-capture tokenize -m "$SMOLLM" --chat auto --special --text 'hi <|im_end|>' --json
check '--special parses them' test "$(tr -d '[]' <.out | tr ',' '\n' | grep -cx ' *2')" = 3
