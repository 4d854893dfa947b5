"""equal.py A.npy B.npy: the same shape, type and bits."""
import sys

import numpy as np

a, b = np.load(sys.argv[1]), np.load(sys.argv[2])
print(a.shape, a.dtype, b.shape, b.dtype)
sys.exit(a.shape != b.shape or a.dtype != b.dtype or a.tobytes() != b.tobytes())
