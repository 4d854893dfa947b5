# A prompt set gives a trace each, goes on where it stopped, and a bad line stops it before the first.
. "$CLI/lib.sh"

cat >p.jsonl <<'W'
{"id": "one", "category": "a", "text": "the quick brown fox jumps", "prompt_end_byte": 9}
{"id": "two", "category": "b", "text": "the lazy dog sleeps here", "prompt_end_byte": 12}
W
ok kv-capture run -m "$MODEL" --prompts p.jsonl -o set
check 'both are there' grep -q '2 captured, 0 finished before' .err
ok kv-trace verify --deep set/one.kvt set/two.kvt
ls -l --time-style=full-iso set >before.txt
ok kv-capture run -m "$MODEL" --prompts p.jsonl -o set
check 'the second run captures 0' grep -q '0 captured, 2 finished before' .err
ls -l --time-style=full-iso set >after.txt
check 'and touches nothing' cmp before.txt after.txt
cp set/one.kvt was.kvt
rm set/one.kvt
ok kv-capture run -m "$MODEL" --prompts p.jsonl -o set
check 'what is missing is captured' grep -q '1 captured, 1 finished before' .err
ok kv-trace diff was.kvt set/one.kvt
ok kv-capture run -m "$MODEL" --prompts p.jsonl --only two -o two.kvt
ok kv-trace diff two.kvt set/two.kvt
ok kv-capture run -m "$MODEL" --prompts p.jsonl --threads 1 -o one-thread
ok kv-trace diff one-thread/one.kvt set/one.kvt

refused 2 "'tow'" kv-capture run -m "$MODEL" --prompts p.jsonl --only tow -o out
set_of() { # set_of WORD LINE: refused because of the line
    printf '%s\n' "$2" >bad.jsonl
    refused 1 "$1" kv-capture run -m "$MODEL" --prompts bad.jsonl -o out
}
set_of 'bad.jsonl' 'not JSON'
set_of 'bad.jsonl' ''
set_of 'text' '{"id": "a", "text": 5}'
set_of 'id' '{"text": "the"}'
set_of 'id' '{"id": "../../evil", "text": "the"}'
set_of 'prompt_end_byte' '{"id": "a", "text": "the", "prompt_end_byte": 99}'
set_of 'missing.txt' '{"id": "a", "file": "missing.txt"}'
set_of "'a'" '{"id": "a", "text": "the"}
{"id": "a", "text": "fox"}'
refused 1 missing.jsonl kv-capture run -m "$MODEL" --prompts missing.jsonl -o out

# Captures side by side into one folder: who needs the W_O file waits for whoever makes it.
mkdir together
(exec 9<together && flock 9 && touch locked && sleep 2 && rm locked) &
until [ -e locked ]; do sleep 0.1; done
ok kv-capture run -m "$MODEL" --prompts p.jsonl --only one -o together
check 'it waited for the folder' [ ! -e locked ]
