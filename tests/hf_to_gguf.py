"""Writes a folder of Hugging Face files as GGUF, the way llama.cpp's converter does (names, keys, row permutation of llama and
granite, norms + 1 of gemma, fused heads of gpt-neox put apart), keeping every element's type. For tests: the same weights in
both containers must give the same bits. A second implementation of the naming on purpose: it shares nothing with capture/arch.c.

usage: hf_to_gguf.py FOLDER OUT.gguf [PARTS]      PARTS > 1: OUT-00001-of-0000N.gguf, ..."""
import json, struct, sys
import numpy as np

TYPES = {"F32": (0, "<f4"), "F16": (1, "<f2"), "BF16": (30, "<u2")}

def read_folder(folder):
    import os
    try: shards = sorted(set(json.load(open(f"{folder}/model.safetensors.index.json"))["weight_map"].values()))
    except FileNotFoundError: shards = ["model.safetensors"]
    out = {}
    for s in shards:
        b = open(os.path.join(folder, s), "rb").read()
        n = struct.unpack("<Q", b[:8])[0]
        for name, t in json.loads(b[8:8 + n]).items():
            if name == "__metadata__": continue
            a, z = t["data_offsets"]
            out[name] = (t["dtype"], np.frombuffer(b[8 + n + a:8 + n + z], TYPES[t["dtype"]][1]).reshape(t["shape"]))
    return out

def to_f32(t):
    kind, a = t
    return ("F32", (a.astype("<u4") << 16).view("<f4") if kind == "BF16" else a.astype("<f4"))

class Writer:
    def __init__(self): self.keys, self.tensors = [], []
    def string(self, s): s = s.encode(); return struct.pack("<Q", len(s)) + s
    def put(self, key, kind, value):
        code, fmt = dict(u32=(4, "<I"), f32=(6, "<f"), bool=(7, "<B"), str=(8, None))[kind]
        self.keys.append(self.string(key) + struct.pack("<I", code) + (self.string(value) if kind == "str" else struct.pack(fmt, value)))
    def bools(self, key, v): self.keys.append(self.string(key) + struct.pack("<IIQ", 9, 7, len(v)) + bytes(v))
    def add(self, name, t): self.tensors.append((name, t))
    def save(self, path, keys, tensors):
        head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys)
        data = b""
        for name, (kind, a) in tensors:
            head += self.string(name) + struct.pack("<I", a.ndim) + b"".join(struct.pack("<Q", d) for d in a.shape[::-1])
            head += struct.pack("<IQ", TYPES[kind][0], len(data))
            data += a.tobytes() + bytes(-a.nbytes % 32)
        open(path, "wb").write(head + bytes(-len(head) % 32) + data)

def convert(folder, out, parts=1):
    c, w, g = json.load(open(f"{folder}/config.json")), read_folder(folder), Writer()
    kind = c["model_type"]
    A = dict(mistral="llama", mixtral="llama", qwen3_moe="qwen3moe", gemma3_text="gemma3", gpt_neox="gptneox").get(kind, kind)
    pick = lambda *names, default=None: next((c[n] for n in names if c.get(n) is not None), default)
    layers, hidden = pick("num_hidden_layers", "n_layer"), pick("hidden_size", "n_embd")
    heads, ffn = pick("num_attention_heads", "n_head"), pick("intermediate_size", "n_inner", default=4 * hidden)
    kv = pick("num_key_value_heads", default=heads)
    hd = pick("head_dim", default=hidden // heads)
    u32 = lambda k, v: g.put(f"{A}.{k}", "u32", v)
    f32 = lambda k, v: g.put(f"{A}.{k}", "f32", v)
    g.put("general.architecture", "str", A)
    for k, v in dict(block_count=layers, embedding_length=hidden, feed_forward_length=ffn, context_length=pick("max_position_embeddings",
        "n_positions")).items(): u32(k, v)
    u32("attention.head_count", heads); u32("attention.head_count_kv", kv); u32("attention.key_length", hd); u32("attention.value_length", hd)
    layer_norm = A in ("gpt2", "gptneox")
    f32("attention.layer_norm_epsilon" if layer_norm else "attention.layer_norm_rms_epsilon", pick("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"))

    rope = pick("rope_parameters", "rope_scaling", default={})
    local = rope.get("sliding_attention", {}).get("rope_theta", c.get("rope_local_base_freq"))
    rope = rope.get("full_attention", rope)
    theta = rope.get("rope_theta", pick("rope_theta", "rotary_emb_base", default=10000.0))
    rot = int(hd * rope.get("partial_rotary_factor", pick("partial_rotary_factor", "rotary_pct", default=1.0)))
    how = rope.get("rope_type", rope.get("type", "default"))
    if A != "gpt2":
        f32("rope.freq_base", theta); u32("rope.dimension_count", rot)
    if local is not None: f32("rope.freq_base_swa", local)
    if how in ("linear", "yarn"):
        g.put(f"{A}.rope.scaling.type", "str", how); f32("rope.scaling.factor", rope["factor"])
        if how == "yarn": u32("rope.scaling.original_context_length", rope["original_max_position_embeddings"])
    if how == "llama3":
        i = np.arange(0, rot, 2, dtype=np.float64) / rot
        wave = 2 * np.pi * theta ** i
        lo, hi, ctx = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
        s = np.clip((ctx / wave - lo) / (hi - lo), 0, 1)
        g.add("rope_freqs.weight", ("F32", (1 / ((1 - s) / rope["factor"] + s)).astype("<f4")))
    if how in ("longrope", "su"):
        near = c["original_max_position_embeddings"]
        u32("rope.scaling.original_context_length", near); g.put(f"{A}.rope.scaling.type", "str", "longrope")
        f32("rope.scaling.attn_factor", float(np.sqrt(1 + np.log(c["max_position_embeddings"] / near) / np.log(near))))
        for n in ("long", "short"): g.add(f"rope_factors_{n}.weight", ("F32", np.asarray(rope[n + "_factor"], "<f4")))
    if c.get("sliding_window") and c.get("use_sliding_window", True):
        u32("attention.sliding_window", c["sliding_window"])
        if A == "gemma3" and "layer_types" in c: g.bools(f"{A}.attention.sliding_window_pattern", [t[0] == "s" for t in c["layer_types"]])
    for key, name in (("attn_logit_softcapping", "attn_logit_softcapping"), ("final_logit_softcapping", "final_logit_softcapping")):
        if c.get(key): f32(name, c[key])
    if c.get("query_pre_attn_scalar"): f32("attention.scale", c["query_pre_attn_scalar"] ** -0.5)
    if A == "granite":
        f32("attention.scale", c["attention_multiplier"]); f32("embedding_scale", c["embedding_multiplier"])
        f32("residual_scale", c["residual_multiplier"]); f32("logit_scale", c["logits_scaling"])
    if A == "gptneox": g.put(f"{A}.use_parallel_residual", "bool", c["use_parallel_residual"])
    experts = pick("num_local_experts", "num_experts", default=0)
    if experts:
        u32("expert_count", experts); u32("expert_used_count", c["num_experts_per_tok"])
        if "moe_intermediate_size" in c: u32("expert_feed_forward_length", c["moe_intermediate_size"])

    prefix = next(p for p in ("model.", "transformer.", "gpt_neox.", "") if any(n.startswith(p) for n in w))
    body = {n[len(prefix):] if n.startswith(prefix) else n: t for n, t in w.items()}
    def permute(t, n_head): # HF's halves to pairs
        k, a = t
        return (k, np.ascontiguousarray(a.reshape(n_head, 2, a.shape[0] // n_head // 2, *a.shape[1:]).swapaxes(1, 2).reshape(a.shape)))
    def put(to, name, change=None):
        if name not in body: return
        t = body.pop(name)
        if change: t = change(t)
        g.add(to, to_f32(t) if t[1].ndim == 1 else t)
    plus_one = (lambda t: ("F32", to_f32(t)[1] + np.float32(1))) if A.startswith("gemma") else None
    turn = lambda t: (t[0], np.ascontiguousarray(t[1].T))
    apart = lambda t: (t[0], np.ascontiguousarray(t[1].reshape(heads, 3, hd, *t[1].shape[1:]).swapaxes(0, 1).reshape(t[1].shape)))
    paired = A in ("llama", "granite")
    for src, dst in (("embed_tokens", "token_embd"), ("wte", "token_embd"), ("wpe", "position_embd"), ("embed_in", "token_embd"),
                     ("norm", "output_norm"), ("ln_f", "output_norm"), ("final_layer_norm", "output_norm"), ("lm_head", "output"), ("embed_out", "output")):
        for end in ("weight", "bias"): put(f"{dst}.{end}", f"{src}.{end}", plus_one if dst == "output_norm" else None)
    after = "post_attention_norm" if A in ("gemma2", "gemma3", "olmo2") else "ffn_norm"
    names = [("input_layernorm", "attn_norm"), ("post_attention_layernorm", after), ("pre_feedforward_layernorm", "ffn_norm"),
             ("post_feedforward_layernorm", "post_ffw_norm"), ("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"),
             ("self_attn.v_proj", "attn_v"), ("self_attn.o_proj", "attn_output"), ("self_attn.qkv_proj", "attn_qkv"),
             ("self_attn.q_norm", "attn_q_norm"), ("self_attn.k_norm", "attn_k_norm"), ("mlp.gate_proj", "ffn_gate"), ("mlp.up_proj", "ffn_up"),
             ("mlp.down_proj", "ffn_down"), ("mlp.gate_up_proj", "ffn_up"), ("mlp.gate", "ffn_gate_inp"), ("block_sparse_moe.gate", "ffn_gate_inp"),
             ("ln_1", "attn_norm"), ("ln_2", "ffn_norm"), ("attn.c_attn", "attn_qkv"), ("attn.c_proj", "attn_output"), ("mlp.c_fc", "ffn_up"),
             ("mlp.c_proj", "ffn_down"), ("attention.query_key_value", "attn_qkv"), ("attention.dense", "attn_output"),
             ("mlp.dense_h_to_4h", "ffn_up"), ("mlp.dense_4h_to_h", "ffn_down")]
    for l in range(layers):
        at = f"h.{l}." if A == "gpt2" else f"layers.{l}."
        for src, dst in names:
            for end in ("weight", "bias"):
                change = None
                if dst.endswith("norm") and end == "weight": change = plus_one
                if A == "gpt2" and end == "weight" and "ln_" not in src: change = turn
                if A == "gptneox" and dst == "attn_qkv": change = apart
                if paired and dst in ("attn_q", "attn_k"): change = lambda t, n=heads if dst == "attn_q" else kv: permute(t, n)
                put(f"blk.{l}.{dst}.{end}", f"{at}{src}.{end}", change)
        for dst, ways in (("gate", ("w1", "gate_proj")), ("up", ("w3", "up_proj")), ("down", ("w2", "down_proj"))):
            for base in ("mlp", "block_sparse_moe"):
                each = [body.pop(f"{at}{base}.experts.{e}.{way}.weight") for way in ways for e in range(experts)
                        if f"{at}{base}.experts.{e}.{way}.weight" in body]
                if parts > 1: # as files of early 2024 have them
                    for e, t in enumerate(each): g.add(f"blk.{l}.ffn_{dst}.{e}.weight", t)
                elif each: g.add(f"blk.{l}.ffn_{dst}_exps.weight", (each[0][0], np.stack([t[1] for t in each])))
    assert not body, list(body)
    if parts == 1: return g.save(out, g.keys, g.tensors)
    for p in range(parts):
        s = Writer()
        if not p: s.keys = list(g.keys)
        for k, v in (("split.no", p), ("split.count", parts), ("split.tensors.count", len(g.tensors))): s.put(k, "u32", v)
        s.save(out[:-5] + f"-{p + 1:05d}-of-{parts:05d}.gguf", s.keys, g.tensors[p::parts])

if __name__ == "__main__": convert(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 1)
