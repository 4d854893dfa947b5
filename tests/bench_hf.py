"""Seconds of a prefill of the 8B shape (random weights, bf16, sdpa, logits of the last row) through Hugging Face transformers: bench_hf.py TOKENS.."""
import sys, time
try:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig
except ImportError:
    sys.exit("bench_hf: python3 has no torch or no transformers: nothing to compare with")
if not torch.cuda.is_available(): sys.exit("bench_hf: no CUDA device")
c = LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
                max_position_embeddings=131072, rms_norm_eps=1e-5, tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
torch.manual_seed(0)
with torch.device("cuda"): m = AutoModelForCausalLM.from_config(c, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
for n in map(int, sys.argv[1:]):
    ids = torch.randint(3, c.vocab_size, (1, n), device="cuda")
    seconds = []
    for r in range(4 if n < 100000 else 2):
        torch.cuda.synchronize()
        t = time.perf_counter()
        with torch.inference_mode(): m(ids, use_cache=True, logits_to_keep=1)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - t)
        torch.cuda.empty_cache()
    print(f"hf_sdpa,prefill {n} tokens,{sorted(seconds[1:])[len(seconds[1:]) // 2]:.4f},{min(seconds[1:]):.4f},s ({torch.cuda.max_memory_allocated() / 2**30:.1f} GiB)", flush=True)
