"""Make the tokenizers of this folder and what Hugging Face's library makes of texts with them. Made with tokenizers 0.23.3;
the texts are random strings of awkward pieces, the vocabularies are trained on this file and FORMAT.md, so they are tiny.

usage: python3 make.py            (pip install tokenizers; writes NAME/tokenizer.json and NAME/vectors.jsonl beside itself)
"""
import json
import os
import random

from tokenizers import AddedToken as A, Regex, Tokenizer, models, normalizers as nm, pre_tokenizers as pt, processors, trainers

HERE = os.path.dirname(os.path.abspath(__file__))
CORPUS = [open(f, encoding="utf8").read() for f in (__file__, HERE + "/../../../traces/FORMAT.md", HERE + "/../../../README.md")]
L3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
O200 = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
ADDED = [A("<|x|>", special=True, normalized=False), A("<|xx|>", rstrip=True, special=True, normalized=False),
         A("<|", lstrip=True, normalized=False), A("\n\n\n", normalized=False), A("caf\u00e9x", normalized=True),
         A("ab", normalized=False), A("bcd", normalized=False), A("e\u0301e\u0301", normalized=True, lstrip=True, rstrip=True),
         A("  q", normalized=True)]
PIECES = [" ", "  ", "\n", "\n\n\n", "\r\n", "\t", "a", "ab", "abcd", "bcd", "\u00e9", "e\u0301", "e\u0301e\u0301", "caf\u00e9",
          "cafe\u0301x", "\uff8a\uff9f", "\u1100\u1161\u11a8", "\uac00\u11a8", "<|x|>", "<|xx|>", "<|xx|>  ", "<|", "<|im_end|>", "<s>",
          "</s>", "<unk>", "\u2581", "\u2581\u2581", "<0x41>", "'s", "'LL", "'\u017f", "123", "4567", "\u0661\u0662", "\u2167", "\u00bd",
          "\u00a0", "\u180e", "\u3000", "\u2009", "\u0085", "\u65e5\u672c\u8a9e", "\u304b\u3099", "\U0001f642", "\U0001f469\u200d\U0001f469",
          "\u212b", "\u0958", "\u0928\u093f", "\u0627", "\u00df", "\u01c5", "!", "...", "_", "$", "-", "  q", "hello", " world", "The",
          "Z", "\u0344", "a\u0323\u0307", "\u1e9b\u0323", "\x00", "\u2126", "\u09c7\u09be", "<s>a", "q", "WordsLikeThis", "it's"]


def split(regex, behaviour="isolated", invert=False):
    return pt.Split(Regex(regex), behaviour, invert)


def level(regex=False, prefix=False):
    return pt.ByteLevel(add_prefix_space=prefix, use_regex=regex)


def meta(scheme, cut):
    return pt.Metaspace(replacement="\u2581", prepend_scheme=scheme, split=cut)


def make(name, byte, pre, norm=None, added=ADDED, bos=None, joined=False, **kw):
    t = Tokenizer(models.BPE(**kw) if byte else models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True, **kw))
    if norm:
        t.normalizer = norm
    if pre:
        t.pre_tokenizer = pre
    if byte:
        special, more = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], {"initial_alphabet": pt.ByteLevel.alphabet(), "vocab_size": 420}
    else:
        special, more = ["<unk>", "<s>", "</s>"] + ["<0x%02X>" % b for b in range(256)], {"limit_alphabet": 50, "vocab_size": 460}
    t.train_from_iterator(CORPUS, trainers.BpeTrainer(special_tokens=special, show_progress=False, max_token_length=8, **more))
    j = json.loads(t.to_str())
    j["added_tokens"] = [a for a in j["added_tokens"] if not a["content"].startswith("<0x")]
    t = Tokenizer.from_str(json.dumps(j))
    for a in added:
        (t.add_special_tokens if a.special else t.add_tokens)([a])
    if bos:
        t.post_processor = processors.TemplateProcessing(single=bos + " $A", pair=bos + " $A $B", special_tokens=[(bos, t.token_to_id(bos))])
    j = json.loads(t.to_str())
    if joined:  # the older way to write merges
        j["model"]["merges"] = [" ".join(m) for m in j["model"]["merges"]]
    os.makedirs(HERE + "/" + name, exist_ok=True)
    with open(HERE + "/" + name + "/tokenizer.json", "w", encoding="utf8") as f:
        f.write(json.dumps(j, ensure_ascii=False, separators=(",", ":")) + "\n")
    t = Tokenizer.from_file(HERE + "/" + name + "/tokenizer.json")
    rng = random.Random(name)
    with open(HERE + "/" + name + "/vectors.jsonl", "w") as f:
        for _ in range(80):
            text = "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 9)))
            f.write(json.dumps({"hex": text.encode().hex(), "ids": t.encode(text, add_special_tokens=False).ids}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    make("gpt2", True, level(True, True))
    make("smollm", True, pt.Sequence([pt.Digits(True), level(True)]), joined=True)
    make("llama3", True, pt.Sequence([split(L3), level()]), bos="<|endoftext|>", ignore_merges=True)
    make("qwen2", True, pt.Sequence([split(L3.replace("{1,3}", "")), level()]), nm.NFC())
    make("o200k", True, pt.Sequence([split(O200, "removed", True), level()]), nm.NFC())
    make("cuts", True, pt.Sequence([split(r"\p{P}", "contiguous"), split(r"\s", "merged_with_next"), split("[aeiou]", "merged_with_previous"),
                                    split("[xyz]", "removed"), pt.Digits(False), level()]), added=[])
    make("llama2", False, None, nm.Sequence([nm.Prepend("\u2581"), nm.Replace(" ", "\u2581")]), bos="<s>", joined=True)
    make("gemma", False, pt.Split(" ", "merged_with_previous"), nm.Replace(" ", "\u2581"))
    make("metaspace", False, meta("first", False))
    make("metaspace_cut", False, meta("always", True))
