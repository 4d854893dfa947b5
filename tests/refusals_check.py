"""Folders and GGUF files that are well formed and ask for what this program does not do, or contradict themselves: each must be
refused with one line that names the key, never run.

usage: refusals_check.py BUILD_DIR TINY      TINY/NAME: folders of small models (tests/golden/models_extra/tiny)
Needs NumPy. Last line: 'N passed, N failed'."""
import json, os, shutil, struct, subprocess, sys, tempfile
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import hf_to_gguf

build, tiny = sys.argv[1:3]
passed = failed = 0
ABSENT = object()

def attempt(what, model, names):
    """names None: it must load"""
    global passed, failed
    r = subprocess.run([f"{build}/kv-capture", "info", "-m", model], capture_output=True, text=True, timeout=60)
    good = r.returncode == 0 if names is None else r.returncode == 1 and names in r.stderr and len(r.stderr.splitlines()) == 1 and not r.stdout
    passed, failed = passed + good, failed + (not good)
    if not good: print("FAIL", what, "| exit", r.returncode, "|", r.stderr.strip()[-250:], "| wanted", names)

def change_config(folder, change):
    c = json.load(open(f"{folder}/config.json"))
    for k, v in change.items():
        if v is ABSENT: c.pop(k, None)
        else: c[k] = v
    json.dump(c, open(f"{folder}/config.json", "w"))

def change_tensors(folder, rename=None, drop=None):
    b = open(f"{folder}/model.safetensors", "rb").read()
    n = struct.unpack("<Q", b[:8])[0]
    head = {k: v for k, v in json.loads(b[8:8 + n]).items() if k != "__metadata__"}
    out, data = {}, b""
    for k, v in head.items():
        a, z = v["data_offsets"]
        if drop and drop in k: continue
        k = k.replace(*rename) if rename else k
        out[k] = dict(v, data_offsets=[len(data), len(data) + z - a])
        data += b[8 + n + a:8 + n + z]
    text = json.dumps(out).encode()
    open(f"{folder}/model.safetensors", "wb").write(struct.pack("<Q", len(text)) + text + data)

S, F = "sliding_attention", "full_attention"
CONFIG = [ # model, changed keys, what the message names (None: it must load)
    ("qwen3", {}, None),
    ("qwen3", dict(model_type="deepseek_v2"), "deepseek_v2"), ("qwen3", dict(model_type="mamba"), "mamba"),
    ("qwen3", dict(model_type=ABSENT), "model_type"), ("qwen3", dict(model_type=7), "model_type"),
    ("qwen3", dict(kv_lora_rank=16), "latent attention"), ("qwen3", dict(kv_lora_rank=None), None),
    ("qwen3", dict(quantization_config=dict(quant_method="gptq")), "quantization_config"),
    ("qwen3", dict(alibi=True), "ALiBi"), ("qwen3", dict(alibi=False), None), ("qwen3", dict(clip_qkv=8.0), "clip_qkv"),
    ("qwen3", dict(num_experts=4), "num_experts"), ("qwen3", dict(hidden_act="relu"), "hidden_act"),
    ("qwen3", dict(layer_types=["linear_attention", F]), "linear_attention"), ("qwen3", dict(layer_types=[F]), "layer_types"),
    ("qwen3", dict(layer_types=[S, F], sliding_window=None), "sliding_window"),
    ("qwen3", dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)), "dynamic"),
    ("qwen3", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4)), "factor"),
    ("qwen3", dict(rope_parameters=[1]), "rope_parameters"), ("qwen3", dict(rope_parameters=dict(rope_theta="a")), "rope_theta"),
    ("qwen3", dict(rms_norm_eps=ABSENT), "rms_norm_eps"), ("qwen3", dict(rms_norm_eps=-1.0), "rms_norm_eps"),
    ("gpt2", dict(n_layer=3), "h.2."), ("gpt2", dict(n_layer=1), "h.1."), ("qwen3", dict(num_hidden_layers=3), "layer_types"),
    ("qwen3", dict(vocab_size=95), "vocab_size"), ("qwen3", dict(intermediate_size=41), "intermediate_size"),
    ("qwen3", dict(embedding_multiplier=2.0), "multiplier"), ("qwen3", dict(tie_word_embeddings="yes"), "tie_word_embeddings"),
    ("llama3_scaled", dict(sliding_window=8), "sliding_window"),
    ("llama3_scaled", dict(rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=1.0,
        original_max_position_embeddings=64)), "high_freq_factor"),
    ("llama3_scaled", dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), "original_max_position_embeddings"),
    ("qwen2_window", dict(max_window_layers=ABSENT), "sliding_window"),
    ("phi3_long", dict(rope_scaling=dict(type="longrope", short_factor=[1, 1], long_factor=[1, 1])), "short_factor"),
    ("phi3_long", dict(rope_scaling=dict(type="longrope", short_factor=[1, 1, 1, 0], long_factor=[1, 1, 1, 1])), "rope_scaling"),
    ("phi3_long", dict(partial_rotary_factor=0.6), "head_dim"),
    ("qwen3_moe", dict(mlp_only_layers=[1]), "mlp_only_layers"), ("qwen3_moe", dict(decoder_sparse_step=2), "decoder_sparse_step"),
    ("qwen3_moe", dict(num_experts_per_tok=5), "num_experts_per_tok"), ("qwen3_moe", dict(num_experts=5, num_local_experts=ABSENT), "gate.weight"), ("qwen3_moe", dict(num_experts=5, num_local_experts=4), "contradict"),
    ("qwen3_moe", dict(num_experts=1000000, num_local_experts=ABSENT), "num_experts"), ("gemma3", dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
    ("gpt2", dict(scale_attn_weights=False), "scale_attn_weights"), ("gpt2", dict(activation_function="silu"), "silu"),
    ("gptneox", dict(rotary_pct=1.5), "partial_rotary_factor"), ("granite", dict(use_parallel_residual=True), "use_parallel_residual"),
]
TENSORS = [ # model, replace in names, leave out, what the message names
    ("qwen3", ("q_norm", "q_nrm"), None, "q_norm"), ("qwen3", None, "k_norm", "k_norm"), ("qwen3", ("lm_head", "extra_head"), None, "lm_head"),
    ("gemma3", None, "post_feedforward_layernorm", "post_feedforward_layernorm"), ("qwen2_yarn", None, "q_proj.bias", "q_proj.bias"),
    ("qwen3_moe", None, "experts.3.up_proj", "experts.3.up_proj"), ("qwen3_moe", None, "mlp.gate.weight", "mlp.gate.weight"),
    ("gpt2", None, "c_attn.bias", "c_attn.bias"), ("gpt2", None, "ln_f.bias", "ln_f.bias"), ("granite", ("up_proj", "up_prj"), None, "up_proj"),
]
GGUF = [ # model, a further key, its type and value, what the message names
    ("qwen3", "qwen3.attention.sliding_window", "u32", 8, "sliding_window"), ("qwen3", "qwen3.expert_count", "u32", 4, "expert_count"),
    ("llama3_scaled", "llama.attention.kv_lora_rank", "u32", 8, "latent"), ("llama3_scaled", "llama.rope.scaling.type", "str", "dynamic", "dynamic"),
    ("llama3_scaled", "llama.ssm.state_size", "u32", 8, "recurrent"), ("llama3_scaled", "llama.attention.causal", "bool", 0, "causal"),
    ("llama3_scaled", "llama.use_parallel_residual", "bool", 1, "use_parallel_residual"), ("qwen3", "qwen3.logit_scale", "f32", 2.0, "logit_scale"),
    ("qwen3_moe", "qwen3moe.expert_shared_count", "u32", 1, "shared"), ("qwen3_moe", "qwen3moe.expert_gating_func", "u32", 2, "expert_gating_func"),
    ("gemma3", "gemma3.attn_logit_softcapping", "f32", -1.0, "attn_logit_softcapping"), ("gpt2", "gpt2.attention.clamp_kqv", "f32", 4.0, "clamp"),
    ("llama3_scaled", "general.architecture", "str", "mamba2", "general.architecture"),
]
with tempfile.TemporaryDirectory() as tmp:
    def fresh(name):
        shutil.rmtree(f"{tmp}/m", ignore_errors=True)
        shutil.copytree(f"{tiny}/{name}", f"{tmp}/m")
        return f"{tmp}/m"
    for name, change, names in CONFIG:
        d = fresh(name); change_config(d, change); attempt(f"{name} {change}", d, names)
    for name, rename, drop, names in TENSORS:
        d = fresh(name); change_tensors(d, rename, drop); attempt(f"{name} {rename or drop}", d, names)
    d = fresh("qwen3"); os.rename(f"{d}/model.safetensors", f"{tmp}/blob"); os.symlink(f"{tmp}/blob", f"{d}/model.safetensors")
    attempt("a link, as hubs lay their files", d, None)
    os.remove(f"{d}/model.safetensors"); attempt("no weights", d, "model.safetensors")
    os.mkdir(f"{d}/model.safetensors"); attempt("a folder for a file", d, "model.safetensors")
    os.remove(f"{d}/config.json"); attempt("no configuration", d, "config.json")
    for name, key, kind, value, names in GGUF:
        put = hf_to_gguf.Writer.save
        def save(self, path, keys, tensors): # the key goes in at the end, whatever the architecture
            self.keys = list(keys); self.put(key, kind, value); put(self, path, self.keys, tensors)
        hf_to_gguf.Writer.save = save
        hf_to_gguf.convert(fresh(name), f"{tmp}/m.gguf")
        hf_to_gguf.Writer.save = put
        attempt(f"{name} {key}", f"{tmp}/m.gguf", names)
    hf_to_gguf.convert(fresh("qwen3"), f"{tmp}/p.gguf", 3)
    part = lambda i, n=3, base="p": f"{tmp}/{base}-{i:05d}-of-{n:05d}.gguf"
    for i in (1, 2, 3): attempt(f"part {i}", part(i), None)
    shutil.copy(part(2), f"{tmp}/alone.gguf"); attempt("a part by another name", f"{tmp}/alone.gguf", "split.count")
    shutil.copy(part(2), part(1, base="q")); shutil.copy(part(1), part(2, base="q")); shutil.copy(part(3), part(3, base="q"))
    attempt("parts in the wrong order", part(1, base="q"), "split.no")
    os.remove(part(2)); attempt("a part is missing", part(1), "00002-of-00003")
    shutil.copy(part(3), part(2)); attempt("a part twice", part(1), "split.no")
print(f"{passed} passed, {failed} failed")
sys.exit(1 if failed or not passed else 0)
