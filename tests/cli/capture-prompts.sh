# Prompts made to order: the same bytes for the same seed, spans that hold what they say, and a set that kv-capture takes.
. "$CLI/lib.sh"

for kind in needle multikey vartrack; do
    ok kv-capture prompts --kind $kind --words 200 --count 5 --seed 3 -o $kind.jsonl
    ok kv-capture prompts --kind $kind --words 200 --count 5 --seed 3 -o again.jsonl
    check "$kind: the same bytes again" cmp $kind.jsonl again.jsonl
    ok kv-capture prompts --kind $kind --words 200 --count 5 --seed 4 -o again.jsonl
    check "$kind: another seed, another set" test "$(cmp -s $kind.jsonl again.jsonl; echo $?)" = 1
    ok kv-capture prompts --kind $kind --words 200 --count 2 --depth 25 --digits 16 -o deep-$kind.jsonl
done
if have python3; then
    check 'spans, answers, lengths and depths' python3 -c '
import json, re
for kind, n_evidence, n_answers in (("needle", 1, 1), ("multikey", 2, 2), ("vartrack", 5, 5)):
    for name, count, digits in ((kind, 5, 7), ("deep-" + kind, 2, 16)):
        ids = set()
        rows = [json.loads(l) for l in open(name + ".jsonl")]
        assert len(rows) == count
        for d in rows:
            b = d["text"].encode()
            ids.add(d["id"])
            ev = [b[a:e].decode() for a, e in d["evidence"]]
            assert len(ev) == n_evidence and len(d["answers"]) == n_answers
            assert all(e.endswith(".") and any(x in e for x in d["answers"]) for e in ev)
            assert b[d["question_span"][0]:d["question_span"][1]].decode() == d["question"] and d["question"].endswith("?")
            assert b[d["prompt_end_byte"]:].decode() == " " + d["answer"] and all(x in d["answer"] for x in d["answers"])
            assert d["context_end_byte"] < d["question_span"][0] and d["evidence"] == sorted(d["evidence"])
            assert 200 <= len(b[:d["context_end_byte"]].split()) < 320
            assert re.search("[0-9]{%d}" % digits, d["text"])
            if kind == "vartrack":  # no variable before the one it is made from
                for m in re.finditer("VAR ([A-Z]+)([0-9]) = VAR", d["text"]):
                    assert d["text"].find("VAR %s%d =" % (m[1], int(m[2]) - 1)) < m.start()
            if name.startswith("deep"):
                assert 0.15 < d["evidence"][0][0] / d["context_end_byte"] < 0.45, d["evidence"]
        assert len(ids) == count'
else
    skip 'no python3: the sets are not looked at'
fi
ok kv-capture run -m "$ROOT/tests/golden/models/gguf/llama256/llama256.F16.gguf" --prompts vartrack.jsonl --only vartrack-0002 -o made.kvt --record tokens
refused 2 'needle, multikey or vartrack' kv-capture prompts --kind haystack -o out.jsonl
refused 2 'needs --kind' kv-capture prompts -o out.jsonl
refused 2 'needs -o' kv-capture prompts --kind needle
refused 2 'want 1 to 100000' kv-capture prompts --kind needle --count 0 -o out.jsonl
refused 2 'want 1 to 100000' kv-capture prompts --kind needle --digits 65 -o out.jsonl
