"""bench_sdpa.py - torch's fused attention (scaled_dot_product_attention) at the shapes of bench_attention.cu, as the same CSV.
Keys and values are repeated to all query heads beforehand: the kernels behind it then do the same work. The forward pass
only; it writes neither statistics nor column sums."""
try:
    import torch
except ImportError:
    print("# python3 has no torch: its attention was not measured")
    raise SystemExit(0)
import torch.nn.functional as F

if not torch.cuda.is_available():
    print("# torch sees no CUDA device: its attention was not measured")
    raise SystemExit(0)


def median_ms(f, runs=9):
    f()
    t = []
    for _ in range(runs):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        f()
        b.record()
        b.synchronize()
        t.append(a.elapsed_time(b))
    return sorted(t)[runs // 2]


for heads, n, d in ((32, 8192, 128), (32, 32768, 128), (32, 131072, 128), (32, 8192, 64), (16, 8192, 256)):
    q, k, v = (torch.randn(1, heads, n, d, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    with torch.no_grad():
        ms = median_ms(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    work = 4e-12 * heads * d * n * (n + 1) / 2
    print(f"torch_sdpa,{heads} heads {n}x{d},{ms:.4g},{work / ms * 1e3:.4g},TFLOP/s,")
    del q, k, v
