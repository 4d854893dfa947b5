#!/usr/bin/env python3
"""Record the attention of any model that runs in Hugging Face transformers, as a .kvt trace like those of kv-capture.

The model is loaded by transformers and calls our attention function in place of its own: Q, K and V are rounded to --dtype, used,
and written with the row statistics and column sums, layer by layer as the layers run. No attention map is ever whole: rows are
computed in blocks. What the function does not understand (another mask than causal or sliding window, attention sinks, position
biases, values of another width than keys, several sequences) is refused by name. Needs torch, transformers, NumPy, zstandard.

  python3 capture/hf_capture.py -m HuggingFaceTB/SmolLM2-135M-Instruct --text 'The quick brown fox' -o fox.kvt
  python3 capture/hf_capture.py -m ./model --tokens ids.json --prompt-tokens 512 --dtype f32 -o a.kvt
"""
import argparse
import hashlib
import importlib
import inspect
import json
import os
import platform
import re
import sys
import time

import numpy as np

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "traces"))
import kvt

TOP_K, OBS_ROWS = 64, 64
BLOCK_FLOATS = 1 << 24  # scores held at a time
HARMLESS = {"sliding_window", "softcap", "cache_position", "position_ids", "use_cache", "output_attentions", "output_hidden_states",
            "return_dict", "is_causal", "dropout", "num_items_in_batch", "logits_to_keep", "labels", "position_embeddings", "layer_idx"}


class Refused(Exception):
    pass


def parse_args(argv):
    p = argparse.ArgumentParser(prog="hf_capture.py", description=__doc__.split("\n\n")[0], epilog=__doc__.split("\n\n")[2],
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("-m", "--model", required=True, help="folder, or name on the hub as transformers takes it")
    p.add_argument("-o", "--output", required=True, metavar="OUT.kvt")
    group = p.add_mutually_exclusive_group(required=True)
    group.add_argument("--text", help="the prompt")
    group.add_argument("--file", help="a file with the prompt, UTF-8")
    group.add_argument("--tokens", metavar="T.json", help="JSON array of token ids, used as given")
    p.add_argument("--prompt-tokens", type=int, default=0, metavar="N", help="the first N tokens are the prompt (default: all)")
    p.add_argument("--context-tokens", type=int, default=0, metavar="N", help="tokens before the question")
    p.add_argument("--decode", type=int, default=0, metavar="N", help="choose N more tokens greedily")
    p.add_argument("--record", choices=("qkv", "obs", "stats"), default="qkv")
    p.add_argument("--dtype", choices=("f16", "bf16", "f32"), help="Q, K and V are rounded to it (default: f16; on a GPU the compute type)")
    p.add_argument("--compute", choices=("f32", "f16", "bf16"), help="type of weights and arithmetic (default: f32; on a GPU bf16)")
    p.add_argument("--wo", choices=("auto", "embed", "none"), default="auto", help="W_O: in the trace, or in a side file where it is large")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    p.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    return p.parse_args(argv)


def output_projection(attention):
    """W_O [hidden, q_heads * head_dim] of an attention module, or None."""
    for name in ("o_proj", "out_proj", "c_proj", "dense", "wo", "attn_out"):
        proj = getattr(attention, name, None)
        if proj is not None and getattr(proj, "weight", None) is not None and proj.weight.ndim == 2:
            return proj.weight.T if type(proj).__name__ == "Conv1D" else proj.weight
    return None


def post_norm(torch, block, hidden):
    """The RMS norm behind W_O where the architecture has one: weight [hidden] and epsilon; else None. In gemma 2 and 3 and olmo2
    `post_attention_layernorm` is that norm; elsewhere it stands before the feed-forward layer."""
    norm = getattr(block, "post_attention_layernorm", None)
    if norm is None or (hasattr(block, "input_layernorm") and not hasattr(block, "pre_feedforward_layernorm")):
        return None
    eps = float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0)))
    ones = torch.ones(1, hidden, device=norm.weight.device)  # of root mean square 1: what comes out is the weight
    return (norm(ones)[0].float() * (1 + eps) ** 0.5).cpu().numpy(), eps


class Recorder:
    """Stands where the model calls attention."""

    def __init__(self, torch, args, path, info, tokens, w_kind):
        self.torch, self.args, self.path, self.info, self.tokens = torch, args, path, info, tokens
        self.w_kind, self.writer, self.x, self.done, self.off = w_kind, None, {}, {}, True
        self.wo, self.blocks = {}, {}

    def open(self, heads, kv_heads, head_dim):
        self.info.update(q_heads=heads, kv_heads=kv_heads, head_dim=head_dim)
        self.writer = kvt.Writer(self.path, self.info, provenance())
        self.writer.put("tokens", self.tokens)

    def entering(self, number):
        """A hook on the block: the norm of the residual stream that enters it."""
        def hook(module, args, kwargs):
            x = kwargs.get("hidden_states", args[0] if args else None)
            if not self.off and x is not None:
                self.x[number] = x[0].float().norm(dim=-1).cpu().numpy()
        return hook

    def attention(self, module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        torch = self.torch
        layer = getattr(module, "layer_idx", None)
        for name, v in kwargs.items():
            if v is not None and v is not False and name not in HARMLESS:
                raise Refused("layer %s: attention is called with '%s', which a trace cannot say" % (layer, name))
        if layer is None or query.shape[0] != 1:
            raise Refused("attention of %s has no layer number, or several sequences" % type(module).__name__)
        if value.shape[-1] != query.shape[-1] or key.shape[-1] != query.shape[-1]:
            raise Refused("layer %d: keys have %d elements a head and values %d" % (layer, key.shape[-1], value.shape[-1]))
        heads, n, d = query.shape[1:]
        groups, n_key = key.shape[1:3]
        if n != n_key and not self.off:
            raise Refused("layer %d: %d rows over %d keys; the whole sequence must be one call" % (layer, n, n_key))
        scaling = d ** -0.5 if scaling is None else float(scaling)
        softcap = float(kwargs.get("softcap") or 0)
        kind = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}[self.w_kind]
        q, k, v = (t[0].to(kind) for t in (query, key, value))
        if not all(torch.isfinite(t).all() for t in (q, k, v)):
            raise Refused("layer %d: a value is not finite as %s; record bf16 or f32" % (layer, self.w_kind))
        window = self.window_of(layer, attention_mask, n, n_key)
        out = self.rows(q.float(), k.float(), v.float(), layer, scaling, softcap, window, attention_mask)
        if not self.off:
            self.record(layer, module, q, k, v, heads, groups, d, scaling, softcap, window)
        return out.transpose(0, 1)[None].to(query.dtype).contiguous(), None

    def window_of(self, layer, mask, n, n_key):
        """0 or the window of the mask's last row; that the whole mask is of this form is checked block by block."""
        if mask is None:
            return 0
        if mask.shape[-2] != n or mask.shape[-1] < n_key:
            raise Refused("layer %d: a mask of %s for %d rows and %d keys" % (layer, tuple(mask.shape), n, n_key))
        seen = int(mask[0, 0, -1, :n_key].sum())
        return 0 if seen == n_key else seen

    def rows(self, q, k, v, layer, scaling, softcap, window, mask):
        """Attention as FORMAT.md defines it, in blocks of rows; statistics into self.stat when recording."""
        torch = self.torch
        heads, n, d = q.shape
        n_key = k.shape[1]
        p_rows, c_rows = self.info["prompt_tokens"], self.info["context_tokens"]
        group = heads // k.shape[0]
        out = torch.empty_like(q)
        lse, stat = torch.empty(heads, n), torch.empty(heads, n, 4)
        colsum = torch.zeros(heads, n_key, dtype=torch.float64, device=q.device)
        context = None
        cut = {0, n} | ({c_rows, p_rows} if not self.off else set())
        step = max(1, BLOCK_FLOATS // (heads * n_key))
        bounds = sorted({b for a in sorted(cut) for b in [a]} | set(range(0, n, step)))
        column = torch.arange(n_key, device=q.device)
        for a, b in zip(bounds, bounds[1:]):
            row = torch.arange(n_key - n + a, n_key - n + b, device=q.device)[:, None]
            visible = (column <= row) & ((row - column < window) if window else True)
            if mask is not None and not torch.equal(mask[0, 0, a:b, :n_key].bool(), visible):
                raise Refused("layer %d: the mask is neither causal nor a sliding window of %d" % (layer, window))
            s = (q[:, a:b].view(-1, group, b - a, d) @ k[:, None].transpose(-1, -2)).view(heads, b - a, n_key) * scaling
            if softcap:
                s = softcap * torch.tanh(s / softcap)
            s.masked_fill_(~visible, float("-inf"))
            l = torch.logsumexp(s, -1, keepdim=True)
            p = torch.exp(s - l)
            out[:, a:b] = (p.view(-1, group, b - a, n_key) @ v[:, None]).view(heads, b - a, d)
            if self.off:
                continue
            lse[:, a:b] = l[..., 0].cpu()
            top, at = p.max(-1)
            entropy = l[..., 0] - (p * s.masked_fill(~visible, 0)).sum(-1)
            stat[:, a:b] = torch.stack((top, at.float(), entropy, (p * p).sum(-1)), -1).cpu()
            if b <= p_rows:
                colsum += p.sum(1, dtype=torch.float64)
            if b == c_rows:
                context = colsum[:, :c_rows].float().cpu().numpy()
        self.stat = lse.numpy(), stat.numpy(), colsum[:, :p_rows].float().cpu().numpy(), context
        return out

    def record(self, layer, module, q, k, v, heads, groups, d, scaling, softcap, window):
        if layer in self.done:
            raise Refused("layer %d calls attention twice" % layer)
        if self.writer is None:
            self.info.update(scale=scaling, softcap=softcap)
            self.open(heads, groups, d)
        i, w = self.info, self.writer
        if (heads, groups, d, scaling, softcap) != (i["q_heads"], i["kv_heads"], i["head_dim"], i["scale"], i["softcap"]):
            raise Refused("layer %d has another shape, scale or cap than the layers before it: a trace has one" % layer)
        lse, stat, colsum, context = self.stat
        self.done[layer] = window
        if i["record"] != "stats":
            for name, t in (("k", k), ("v", v)):
                w.put(name, t.float().cpu().numpy(), layer=layer)
            queries = q.float().cpu().numpy()
            for a, b in self.query_rows():
                w.put("q", queries[:, a:b], layer=layer, row=a)
        w.put("lse", lse, layer=layer)
        w.put("rowstat", stat, layer=layer)
        if layer in self.x:
            w.put("xnorm", self.x.pop(layer), layer=layer)
        if context is not None:
            w.put("colsum_ctx", context, layer=layer)
        w.put("colsum", colsum, layer=layer)
        wo = output_projection(module)
        if i["record"] != "stats" and self.args.wo != "none" and wo is not None and wo.shape[1] == heads * d:
            i["hidden"] = wo.shape[0]
            self.wo[layer] = wo
        norm = post_norm(self.torch, self.blocks[layer], i["hidden"]) if layer in self.blocks else None
        if norm and i["record"] != "stats":
            bias = getattr(getattr(module, "o_proj", None), "bias", None)
            bias = np.zeros(i["hidden"], np.float32) if bias is None else bias.float().cpu().numpy()
            w.put("post_norm", np.stack((norm[0], bias), 1), layer=layer)
            i["post_norm_eps"] = norm[1]
        progress("layer %d of %d" % (layer + 1, i["n_layer_model"]))

    def query_rows(self):
        """Runs of rows whose queries are kept."""
        n, p, c, o = (self.info[x] for x in ("tokens", "prompt_tokens", "context_tokens", "obs_rows"))
        if self.info["record"] == "qkv":
            return [(0, n)]
        runs = [(max(0, c - o), c)] if c else []
        a = max(0, p - o)
        if runs and runs[-1][1] >= a:
            return [(runs[0][0], n)]
        return runs + [(a, n)]

    def finish(self, nll, top, text, offsets):
        i, w = self.info, self.writer
        if w is None:
            raise Refused("the model never called the attention function: it does not go through transformers' attention interface")
        if nll.size:
            w.put("nll", nll)
        w.put("logits", top[None], row=i["prompt_tokens"] - 1)
        w.put("offsets", offsets)
        w.put("text", text)
        i["layers"] = sorted(self.done)
        i["window"] = [self.done[l] for l in i["layers"]]
        if self.wo:
            self.put_wo()
        w.info = i  # now with the layers that were seen, and their windows
        w.finish()

    def put_wo(self):
        """In the trace when that makes it up to a quarter of it, else once per model in a side file beside it."""
        i, size = self.info, 4 if self.w_kind == "f32" else 2
        total = sum(wo.numel() for wo in self.wo.values()) * size
        rows = sum(b - a for a, b in self.query_rows())
        streams = len(self.done) * (i["head_dim"] * size * (2 * i["kv_heads"] * i["tokens"] + i["q_heads"] * rows)
                                    + i["q_heads"] * (20 * i["tokens"] + 4 * i["prompt_tokens"]))
        if self.args.wo == "embed" or total < (streams + total) / 4:
            for layer in sorted(self.wo):
                self.writer.put("wo", self.wo[layer].detach().float().cpu().numpy(), layer=layer)
            return
        arrays = {l: t.detach().float().cpu().numpy() for l, t in self.wo.items()}
        i["wo_sha256"] = kvt.wo_sha256(arrays, self.w_kind)
        side = os.path.join(os.path.dirname(self.path) or ".", "wo-%s.kvw" % i["wo_sha256"][:16])
        if os.path.exists(side):
            return
        keys = ("model", "arch", "dtype", "n_layer_model", "q_heads", "kv_heads", "head_dim", "hidden", "scale", "model_sha256")
        info = kvt.new_info(i["layers"], i["q_heads"], i["kv_heads"], i["head_dim"], 1, i["model"], i["dtype"])
        info.update({k: i[k] for k in keys if k in i}, wo_sha256=i["wo_sha256"], record="tokens")
        with kvt.Writer(side, info) as w:
            for layer in sorted(arrays):
                w.put("wo", arrays[layer], layer=layer)


def provenance():
    import torch
    import transformers
    return {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "host": platform.node(), "program": "hf_capture.py",
            "build": "transformers %s, torch %s" % (transformers.__version__, torch.__version__)}


def progress(text):
    if sys.stderr.isatty():
        sys.stderr.write("\r%-60s" % ("hf_capture: " + text))
        sys.stderr.flush()


def rope_facts(model, config):
    """What a policy needs to rotate keys back; nothing where the model pairs elements in another way than i, i + d/2."""
    source = inspect.getsource(importlib.import_module(type(model).__module__))
    rotary = next((m for m in model.modules() if hasattr(m, "inv_freq") or hasattr(m, "full_attention_inv_freq")), None)
    if rotary is None or re.search(r"\.\.\., (0|1)?::2\]", source):
        return {}
    inv = getattr(rotary, "inv_freq", None)
    inv = rotary.full_attention_inv_freq if inv is None else inv
    scaling = getattr(rotary, "attention_scaling", getattr(rotary, "full_attention_attention_scaling", 1.0))
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope) or {}
    theta = rope.get("rope_theta") or getattr(config, "rope_theta", 0) or 0
    return {"rope_theta": float(theta), "rope_dim": 2 * inv.numel(), "rope_mscale": float(scaling), "inv_freq": [float(f) for f in inv.float().cpu()]}


def weights_sha256(folder):
    """SHA-256 of a folder's only weight file; of several files, over their hashes by name. None for a model of the hub."""
    if not os.path.isdir(folder):
        return None
    names = sorted(f for f in os.listdir(folder) if f.endswith((".safetensors", ".bin")))
    sums = []
    for name in names:
        h = hashlib.sha256()
        with open(os.path.join(folder, name), "rb") as f:
            for block in iter(lambda: f.read(1 << 20), b""):
                h.update(block)
        sums.append(h.hexdigest())
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest() if sums else None


def read_tokens(args, torch):
    """ids, text, byte offset of each token and of the end."""
    from transformers import AutoTokenizer
    if args.tokens:
        ids = json.load(open(args.tokens))
        if not isinstance(ids, list) or not ids or not all(type(t) is int and t >= 0 for t in ids):
            raise Refused("tokens '%s': not a JSON array of token ids" % args.tokens)
        return ids, b"", np.zeros(len(ids) + 1, np.uint32)
    text = args.text if args.text is not None else open(args.file, encoding="utf8", newline="").read()
    tok = AutoTokenizer.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    enc = tok(text, return_offsets_mapping=tok.is_fast)
    chars = [a for a, _ in enc["offset_mapping"]] + [len(text)] if tok.is_fast else [0] * len(enc["input_ids"]) + [len(text)]
    at = np.concatenate(([0], np.cumsum([len(c.encode()) for c in text]))).astype(np.uint32)
    return enc["input_ids"], text.encode(), np.maximum.accumulate(at[chars])


def head_of(model, config, hidden, torch):
    """The model's own logits of some rows of the last hidden state."""
    logits = model.get_output_embeddings()(hidden).float()
    if getattr(config, "logits_scaling", None):
        logits = logits / config.logits_scaling
    if getattr(config, "logit_scale", None):
        logits = logits * config.logit_scale
    cap = getattr(config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


def next_tokens(model, config, hidden, last, ids, prompt, torch):
    """nll of each token, and the k best next tokens of the rows from the prompt's last on; rows in blocks."""
    mine = head_of(model, config, hidden[-1:], torch)[0]
    if not torch.allclose(mine, last.float(), rtol=1e-3, atol=1e-2):
        raise Refused("the logits of %s are more than its output embeddings of the last hidden state" % type(model).__name__)
    n, k = len(ids), min(TOP_K, mine.numel())
    nll, top = np.zeros(n - 1, np.float32), np.zeros((n - prompt + 1, 2 * k), np.float32)
    step = max(1, BLOCK_FLOATS // mine.numel())
    target = torch.tensor(ids, device=hidden.device)
    for a in range(0, n, step):
        b = min(n, a + step)
        logits = head_of(model, config, hidden[a:b], torch)
        rows = torch.arange(a, min(b, n - 1), device=hidden.device)
        if len(rows):
            x = logits[:len(rows)].double()
            nll[a:a + len(rows)] = (torch.logsumexp(x, -1) - x.gather(1, target[rows + 1, None])[:, 0]).float().cpu().numpy()
        for r in range(max(a, prompt - 1), b):
            value, index = torch.sort(logits[r - a], descending=True, stable=True)  # equal logits: ids ascend
            top[r - prompt + 1, :k], top[r - prompt + 1, k:] = index[:k].cpu().numpy(), value[:k].cpu().numpy()
    return nll, top


def greedy(model, ids, n, torch, device):
    """n more tokens."""
    past, step = None, torch.tensor([ids], device=device)
    for _ in range(n):
        out = model(input_ids=step, past_key_values=past, use_cache=True, logits_to_keep=1)
        past, best = out.past_key_values, int(out.logits[0, -1].argmax())
        ids = ids + [best]
        step = torch.tensor([[best]], device=device)
    return ids


def capture(args):
    import torch
    import transformers
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
    from transformers.masking_utils import sdpa_mask
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    gpu = device.startswith("cuda")
    compute = args.compute or ("bf16" if gpu else "f32")
    kind = args.dtype or (compute if gpu else "f16")
    ids, text, offsets = read_tokens(args, torch)

    holder = {}
    AttentionInterface.register("kvtrace", lambda *a, **k: holder["recorder"].attention(*a, **k))

    def mask(*a, **k):  # a mask for every call, so that what is visible is never a guess
        k.update(allow_is_causal_skip=False)
        return sdpa_mask(*a, **k)

    AttentionMaskInterface.register("kvtrace", mask)
    torch_type = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[compute]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch_type, attn_implementation="kvtrace",
                                                 trust_remote_code=args.trust_remote_code).to(device).eval()
    config = model.config.get_text_config()
    vocab = model.get_output_embeddings().weight.shape[0]
    if max(ids) >= vocab:
        raise Refused("token id %d: the model has %d" % (max(ids), vocab))
    if args.prompt_tokens > len(ids) or args.context_tokens > len(ids):
        raise Refused("--prompt-tokens or --context-tokens is more than the %d tokens" % len(ids))
    prompt, given = args.prompt_tokens or len(ids), len(ids)
    name = os.path.basename(os.path.normpath(args.model))
    layers = config.num_hidden_layers
    info = kvt.new_info(layers, 1, 1, 1, given + args.decode, name, kind, arch=config.model_type, record=args.record,
                        prompt_tokens=prompt, context_tokens=args.context_tokens if args.context_tokens < prompt else 0,
                        hidden=config.hidden_size, obs_rows=OBS_ROWS if args.record == "obs" else 0,
                        prompt_id=re.sub(r"[^\w.-]", "_", os.path.basename(args.file or args.tokens or "text").split(".")[0]),
                        source={"file": name, "parameters": sum(p.numel() for p in model.parameters()), "vocabulary": vocab},
                        run={"engine": "transformers", "compute": compute, "decode": "greedy" if args.decode else "given"},
                        **rope_facts(model, config))
    if getattr(config, "residual_multiplier", None) not in (None, 1):
        info["out_scale"] = float(config.residual_multiplier)
    sha = weights_sha256(args.model)
    if sha:
        info["model_sha256"] = sha
    rec = holder["recorder"] = Recorder(torch, args, args.output, info, None, kind)
    blocks = 0
    for path, module in model.named_modules():
        found = re.fullmatch(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)", path)
        if found and any(hasattr(child, "layer_idx") for child in module.children()):
            module.register_forward_pre_hook(rec.entering(int(found[1])), with_kwargs=True)
            rec.blocks[int(found[1])] = module
            blocks += 1
    if not blocks:
        print("hf_capture: warning: no blocks found in %s: the norm of the residual stream is not recorded" % type(model).__name__, file=sys.stderr)
    began = time.time()
    with torch.no_grad():
        if args.decode:
            ids = greedy(model, ids, args.decode, torch, device)
        rec.tokens, rec.off = np.array(ids, np.uint32), False
        kept = {}
        hook = model.base_model.register_forward_hook(lambda m, a, o: kept.update(h=o[0] if isinstance(o, tuple) else o.last_hidden_state))
        try:
            out = model(input_ids=torch.tensor([ids], device=device), use_cache=False, logits_to_keep=1)
        finally:
            hook.remove()
        nll, top = next_tokens(model, config, kept["h"][0], out.logits[0, -1], ids, prompt, torch)
    offsets = np.concatenate((offsets[:-1], np.full(len(ids) - given + 1, offsets[-1]))).astype(np.uint32)
    rec.finish(nll, top, text, offsets)
    progress("")
    seconds = time.time() - began
    print("hf_capture: %s: %d tokens in %.1f s (%.0f tokens/s), %.1f MiB, %s"
          % (info["prompt_id"], len(ids), seconds, len(ids) / seconds, os.path.getsize(args.output) / 2 ** 20, args.output), file=sys.stderr)


def main(argv=None):
    args = parse_args(argv)
    try:
        capture(args)
    except (Refused, kvt.Error, OSError, ValueError, ImportError) as e:
        print("hf_capture: %s" % (str(e).strip().splitlines() or [type(e).__name__])[0], file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
