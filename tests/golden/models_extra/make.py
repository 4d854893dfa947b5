"""Makes the models of this folder and their expected values: tiny/NAME/{config.json, model.safetensors, tokens.json,
expected.json, p*.npy}, laid out as drive_models.py reads them. Fixed seeds; run again only to add a model.

usage: make.py OUT [NAME..]      needs torch, transformers (made with 5.23 and torch 2.15), safetensors, NumPy

Each is a random model of a Hugging Face class: matrices N(0, gain/sqrt(inputs)), norms around 1, biases N(0, 0.3), rounded to
the dtype of the file, then run in float32 with eager attention; q, k, v are what attention consumed (after bias, norm and
rotation), lse and colsum are computed here from the scores in double."""
import importlib, json, os, sys
import numpy as np, torch, transformers
from safetensors.torch import load_file, save_file

BASE = dict(vocab_size=96, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=None)
def base(**more): return {**BASE, **more}
SLIDE, FULL = "sliding_attention", "full_attention"

# name: (config class, its arguments, dtype, key style of config.json: 5 or 4, prompt lengths)
MODELS = {
    "llama3_scaled": ("LlamaConfig", base(head_dim=16, rope_parameters=dict(rope_type="llama3", rope_theta=5e5, factor=8.0,
        low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)), "bfloat16", 4, (48, 60)),
    "qwen2_yarn": ("Qwen2Config", base(rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0,
        original_max_position_embeddings=64), tie_word_embeddings=True, num_attention_heads=3, num_key_value_heads=3), "float16", 5, (48, 60)),
    "qwen2_window": ("Qwen2Config", base(use_sliding_window=True, sliding_window=12, max_window_layers=1, rope_parameters=dict(
        rope_type="default", rope_theta=1e6)), "bfloat16", 4, (48,)),
    "qwen3": ("Qwen3Config", base(head_dim=16, rope_parameters=dict(rope_type="default", rope_theta=1e6)), "bfloat16", 5, (48, 60)),
    "qwen3_moe": ("Qwen3MoeConfig", base(head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True,
        decoder_sparse_step=1, mlp_only_layers=[], rope_parameters=dict(rope_type="default", rope_theta=1e6)), "bfloat16", 5, (48, 60)),
    "qwen3_moe_plain": ("Qwen3MoeConfig", base(head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=3,
        norm_topk_prob=False, decoder_sparse_step=1, mlp_only_layers=[], rope_parameters=dict(rope_type="default", rope_theta=1e4)),
        "bfloat16", 4, (48,)),
    "gemma": ("GemmaConfig", base(head_dim=16, num_key_value_heads=1, hidden_activation=None), "bfloat16", 4, (48,)),
    "gemma3": ("Gemma3TextConfig", base(head_dim=16, num_hidden_layers=2, sliding_window=12, layer_types=[SLIDE, FULL],
        query_pre_attn_scalar=20, rope_parameters={FULL: dict(rope_type="linear", rope_theta=1e6, factor=8.0),
        SLIDE: dict(rope_type="default", rope_theta=1e4)}), "bfloat16", 5, (48, 60)),
    "gemma3_old": ("Gemma3TextConfig", base(head_dim=8, num_hidden_layers=6, sliding_window=16, hidden_size=16, intermediate_size=24,
        layer_types=[SLIDE] * 5 + [FULL], query_pre_attn_scalar=8, rope_parameters={FULL: dict(rope_type="linear", rope_theta=1e6, factor=8.0),
        SLIDE: dict(rope_type="default", rope_theta=1e4)}), "bfloat16", 4, (48,)),
    "phi3_long": ("Phi3Config", base(hidden_size=48,
        max_position_embeddings=256, original_max_position_embeddings=52, sliding_window=44, partial_rotary_factor=0.67,
        rope_parameters=dict(rope_type="longrope", rope_theta=1e4, partial_rotary_factor=0.67, original_max_position_embeddings=52,
        short_factor=[1.0, 1.1, 1.25, 1.5], long_factor=[1.5, 2.5, 4.0, 6.0])), "bfloat16", 4, (36, 60)),
    "olmo2": ("Olmo2Config", base(rope_parameters=dict(rope_type="default", rope_theta=5e5)), "bfloat16", 5, (48, 60)),
    "granite": ("GraniteConfig", base(embedding_multiplier=12.0, attention_multiplier=0.3, residual_multiplier=0.22, logits_scaling=0.5,
        tie_word_embeddings=True), "bfloat16", 5, (48, 60)),
    "gpt2": ("GPT2Config", dict(vocab_size=96, n_positions=96, n_embd=24, n_layer=2, n_head=3, bos_token_id=1, eos_token_id=2), "float32",
        5, (48, 60)),
    "gptneox": ("GPTNeoXConfig", dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2, hidden_act="gelu", use_parallel_residual=True, tie_word_embeddings=False,
        rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.25)), "float16", 4, (48, 60)),
    "gptneox_serial": ("GPTNeoXConfig", dict(vocab_size=96, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2, hidden_act="gelu", use_parallel_residual=False, tie_word_embeddings=False,
        rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)), "float16", 5, (48,)),
}

def fill(model, unit, seed):
    g = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        n = torch.randn(p.shape, generator=g)
        if "norm" in name or ".ln_" in name or name.startswith("transformer.ln_"):
            n = 0.3 * n if name.endswith("bias") or unit else 1 + 0.3 * n
        elif name.endswith("bias"): n = 0.3 * n
        elif p.dim() == 1: n = 0.3 * n
        elif "embed" in name or "wte" in name or "wpe" in name: n = 0.7 * n
        elif p.dim() == 3: n = 1.5 * n / p.shape[-1] ** 0.5
        elif "c_attn" in name or "c_fc" in name or "c_proj" in name: n = 1.5 * n / p.shape[0] ** 0.5
        else: n = (1.7 if "q_proj" in name or "k_proj" in name or "qkv" in name or "query_key" in name else 1.2) * n / p.shape[-1] ** 0.5
        p.data = n

def old_style(c):
    """The keys transformers 4 would have written."""
    rope = c.pop("rope_parameters", None) or {}
    c["torch_dtype"] = c.pop("dtype", "float32")
    if FULL in rope:
        c["rope_theta"], c["rope_local_base_freq"] = rope[FULL]["rope_theta"], rope[SLIDE]["rope_theta"]
        c["rope_scaling"] = {k: v for k, v in rope[FULL].items() if k != "rope_theta"}
        c["sliding_window_pattern"] = 6
    else:
        neox = c["model_type"] == "gpt_neox"
        c["rotary_emb_base" if neox else "rope_theta"] = rope.pop("rope_theta", 10000.0)
        if "partial_rotary_factor" in rope: c["rotary_pct" if neox else "partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        if rope.get("rope_type") == "longrope": rope.pop("original_max_position_embeddings"); rope["type"] = rope.pop("rope_type")
        c["rope_scaling"] = rope if rope.get("rope_type") != "default" and rope else None
    c.pop("layer_types", None)
    return c

class Seen:
    """Stands where eager attention stands and writes down what it was given."""
    def __init__(self, model):
        self.rows, module = [], importlib.import_module(type(model).__module__)
        plain = module.eager_attention_forward
        def forward(mod, query, key, value, mask, *a, **kw):
            scale, cap = kw.get("scaling"), kw.get("softcap")
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            k = key.repeat_interleave(query.shape[1] // key.shape[1], 1).double()
            s = query.double() @ k.transpose(2, 3) * scale
            if cap: s = cap * torch.tanh(s / cap)
            keep = torch.tril(torch.ones(s.shape[-2:], dtype=torch.bool)) if mask is None else mask[:, :, :, : s.shape[-1]] > -1
            s = s.masked_fill(~keep, float("-inf"))
            self.rows.append(dict(q=query[0], k=key[0], v=value[0], lse=s.logsumexp(-1)[0], colsum=s.softmax(-1).sum(-2)[0]))
            return plain(mod, query, key, value, mask, *a, **kw)
        module.eager_attention_forward = forward

def make(out, name):
    cls, args, dtype, style, lengths = MODELS[name]
    config = getattr(transformers, cls)(**args)
    config._attn_implementation = "eager"
    config.dtype = getattr(torch, dtype)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    seed = sum(map(ord, name))
    fill(model, "gemma" in name, seed)
    model.tie_weights()
    d = f"{out}/tiny/{name}"
    os.makedirs(d, exist_ok=True)
    model.to(getattr(torch, dtype)).save_pretrained(d)
    for f in os.listdir(d):
        if f not in ("config.json", "model.safetensors"): os.remove(f"{d}/{f}")
    c = json.load(open(f"{d}/config.json"))
    c["dtype"] = dtype
    json.dump(old_style(c) if style == 4 else c, open(f"{d}/config.json", "w"), indent=1, sort_keys=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32, attn_implementation="eager").eval()
    seen, rng = Seen(model), np.random.default_rng(seed)
    prompts, tokens = [], []
    for i, n in enumerate(lengths):
        ids = rng.integers(3, args["vocab_size"], n).tolist()
        seen.rows.clear()
        with torch.no_grad(): logits = model(torch.tensor([ids]), use_cache=False).logits[0]
        rows = [0, 1, 2, 3, n // 2, n - 4, n - 3, n - 2, n - 1]
        save = lambda s, v: np.save(f"{d}/p{i}.{s}.npy", np.asarray(v, np.float32))
        save("logits", logits[rows])
        for s in ("q", "k", "v", "lse", "colsum") if not i else ("lse",): save(s, torch.stack([r[s] for r in seen.rows]))
        nll = torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(ids[1:]), reduction="none")
        save("nll", nll)
        greedy, more = [], list(ids)
        for _ in range(16):
            with torch.no_grad(): best = model(torch.tensor([more]), use_cache=False).logits[0, -1]
            two = best.topk(2)
            if float(two.values[0] - two.values[1]) < 1e-3: break
            greedy.append(int(two.indices[0])); more.append(greedy[-1])
        prompts.append(dict(name=f"p{i}", n_tokens=n, rows=rows, mean_nll=float(nll.mean()), greedy=greedy))
        tokens.append(dict(name=f"p{i}", tokens=ids))
    json.dump(dict(name=name, model_type=c["model_type"], storage_dtype=dtype, prompts=prompts), open(f"{d}/expected.json", "w"), indent=1)
    json.dump(dict(prompts=tokens), open(f"{d}/tokens.json", "w"))
    print(name, sum(os.path.getsize(f"{d}/{f}") for f in os.listdir(d)), "bytes; mean nll", [round(p["mean_nll"], 3) for p in prompts],
          "greedy", [len(p["greedy"]) for p in prompts])

for name in sys.argv[2:] or MODELS: make(sys.argv[1], name)
