"""The same model through both ways: capture/hf_capture.py (transformers) and kv-capture. `kv-trace diff` must agree, the deep check of
every trace must pass, and what the hook cannot say must be refused. Models: random ones made here, and those of the goldens.

usage: hf_check.py BUILD_DIR [GOLDEN_MODELS_DIR]     from the repository root; needs torch and transformers, else everything is skipped.
Last line: 'N passed, N failed, N skipped'"""
import contextlib
import glob
import io
import json
import os
import subprocess
import sys
import tempfile

try:
    import torch
    import transformers
except ImportError as e:
    print("SKIP hf_check.py: %s: the HF hook was not tried (pip install torch transformers)" % e)
    print("0 passed, 0 failed, 1 skipped")
    sys.exit(0)

import numpy as np

sys.dont_write_bytecode = True
sys.path[:0] = ["capture", "traces"]
import hf_capture
import kvt

build, golden = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "../shared/golden/models"
passed = failed = 0
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def check(what, good, why=""):
    global passed, failed
    passed, failed = passed + bool(good), failed + (not good)
    if not good:
        print("FAIL", what, "|", why.strip()[-300:])


def run(*args):
    r = subprocess.run([str(a) for a in args], capture_output=True, text=True)
    return r.returncode, (r.stdout + r.stderr).strip()


def hook(*args):
    """In this process: importing torch costs more than the rest."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        rc = hf_capture.main([str(a) for a in args])
    return rc, said.getvalue().strip()


def both(name, folder, tmp, tokens, prompt, tol, *more):
    """One model both ways; `more` goes to both programs."""
    t, a, b = tmp + "/t.json", tmp + "/" + name + ".hook.kvt", tmp + "/" + name + ".kvt"
    json.dump(tokens, open(t, "w"))
    common = ["-m", folder, "--tokens", t, "--prompt-tokens", prompt, "--wo", "embed", *more]
    rc, said = hook(*common, "-o", a)
    check(name + ": hook", rc == 0, said)
    if rc:
        return
    rc, said = run(build + "/kv-trace", "verify", "--deep", a)
    check(name + ": verify --deep", rc == 0, said)
    rc, said = run(build + "/kv-capture", "run", *common, "--backend", "cpu", "-o", b)
    check(name + ": kv-capture", rc == 0, said)
    if rc:
        return
    rc, said = run(build + "/kv-trace", "diff", a, b, "--tol", tol, "--json")
    streams = [s for s in json.loads(said)["streams"] if s["stream"] not in ("rowstat", "logits", "provenance")] if rc in (0, 1) else []
    wrong = [s for s in streams if not s["same"]]
    check(name + ": kv-trace diff", streams and not wrong, str(wrong or said))
    # of the row statistics, which column is the largest may differ where two are equal
    x, y = kvt.Trace(a), kvt.Trace(b)
    off = max(np.abs(x.read("rowstat", l, h) - y.read("rowstat", l, h))[:, [0, 2, 3]].max()
              for l in x.info["layers"] for h in range(x.info["q_heads"]))
    check(name + ": row statistics", off <= tol, "off by %g" % off)
    same = [k for k in x.info if k not in ("model", "arch", "source", "run", "prompt_id", "model_sha256", "inv_freq", "rope_theta")]
    check(name + ": metadata", set(same) >= {k for k in ("post_norm_eps", "out_scale") if k in y.info} and all(np.allclose(x.info[k], y.info[k]) if k in ("scale", "softcap", "rope_mscale", "post_norm_eps", "out_scale") else x.info[k] == y.info[k] for k in same),
          str([(k, x.info[k], y.info.get(k)) for k in same if x.info[k] != y.info.get(k)]))


def made(kind, **config):
    """A random model whose attention is far from uniform."""
    torch.manual_seed(3)
    common = dict(vocab_size=200, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
                  max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.2)
    c = transformers.AutoConfig.for_model(kind, **{**common, **config})
    return transformers.AutoModelForCausalLM.from_config(c, dtype=torch.float32)


KINDS = {
    "llama": {}, "qwen2": {}, "qwen3": {"head_dim": 32}, "gemma2": {"head_dim": 32, "sliding_window": 40, "query_pre_attn_scalar": 24},
    "gemma3_text": {"head_dim": 32, "sliding_window": 40, "num_hidden_layers": 7}, "mistral": {"sliding_window": 48}, "phi3": {},
    "olmo2": {}, "granite": {"embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "gpt_neox": {"num_key_value_heads": None}, "mixtral": {"num_local_experts": 4}, "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2},
}

with tempfile.TemporaryDirectory() as tmp:
    tokens = [(i * 61 + i * i * 7) % 190 + 3 for i in range(120)]
    for kind, config in KINDS.items():
        folder = tmp + "/" + kind
        try:
            made(kind, **config).save_pretrained(folder)
        except Exception as e:
            check(kind + ": made", False, str(e))
            continue
        both(kind, folder, tmp, tokens, 100, 1e-3, "--dtype", "f32")
    both("obs", tmp + "/llama", tmp, tokens, 90, 1e-3, "--dtype", "f32", "--record", "obs")
    both("f16", tmp + "/llama", tmp, tokens, 90, 2e-2, "--dtype", "f16")
    for d in sorted(glob.glob(golden + "/tiny/*/")):
        prompts = json.load(open(d + "tokens.json"))["prompts"]
        both(os.path.basename(d[:-1]), d, tmp, prompts[0]["tokens"], len(prompts[0]["tokens"]) - 20, 1e-3, "--dtype", "f32")

    # greedy tokens, a side file for W_O, the next reader is Python
    t = tmp + "/t.json"
    json.dump(tokens[:20], open(t, "w"))
    rc, said = hook("-m", tmp + "/llama", "--tokens", t, "--decode", 5, "--dtype", "f32", "-o", tmp + "/g/greedy.kvt")
    check("a folder that is not there: refused", rc == 1 and said.count("\n") == 0, said)
    os.mkdir(tmp + "/g")
    rc, said = hook("-m", tmp + "/llama", "--tokens", t, "--decode", 5, "--dtype", "f32", "-o", tmp + "/g/greedy.kvt")
    check("greedy", rc == 0, said)
    rc, said = run(build + "/kv-trace", "cat", tmp + "/g/greedy.kvt", "--stream", "wo", "-o", tmp + "/wo.npy")
    check("W_O from the side file", rc == 0 and glob.glob(tmp + "/g/wo-*.kvw"), said)
    rc, said = run(build + "/kv-trace", "verify", "--deep", tmp + "/g/greedy.kvt")
    check("verify --deep", rc == 0, said)
    rc, said = run(build + "/kv-capture", "run", "-m", tmp + "/llama", "--tokens", t, "--decode", 5, "--dtype", "f32", "-o", tmp + "/g2.kvt")
    same = [run(build + "/kv-trace", "cat", f, "--stream", "tokens")[1] for f in (tmp + "/g/greedy.kvt", tmp + "/g2.kvt")]
    check("the same greedy tokens", rc == 0 and same[0] == same[1], said)

    # refused: what a trace cannot say
    for kind, config, word in (("gpt_oss", {"num_local_experts": 4, "head_dim": 32}, "s_aux"), ("bloom", {}, "never called")):
        folder = tmp + "/" + kind
        made(kind, **config).save_pretrained(folder)
        rc, said = hook("-m", folder, "--tokens", t, "-o", tmp + "/refused.kvt")
        check(kind + ": refused", rc == 1 and word in said and not os.path.exists(tmp + "/refused.kvt"), said)
    json.dump([7, 300], open(t, "w"))
    rc, said = hook("-m", tmp + "/llama", "--tokens", t, "-o", tmp + "/refused.kvt")
    check("an id beyond the vocabulary: refused", rc == 1 and "300" in said, said)
print("%d passed, %d failed, 0 skipped" % (passed, failed))
sys.exit(1 if failed else 0)
