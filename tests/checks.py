"""What the checks of real models share: run a program, count, compare."""
import os, subprocess
import numpy as np

passed = failed = 0

def run(*args):
    r = subprocess.run([str(a) for a in args], capture_output=True, text=True, timeout=600)
    if r.returncode: raise RuntimeError(f"{os.path.basename(args[0])} exit {r.returncode}: {r.stderr.strip()[-200:]}")
    return r.stdout

def check(name, good, note=""):
    global passed, failed
    passed, failed = passed + bool(good), failed + (not good)
    print(("ok   " if good else "FAIL ") + name, note)

def close(name, got, want, limit):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape: return check(name, False, f"shape {got.shape} for {want.shape}")
    d = np.abs(got - want).max()
    check(name, d <= limit, f"largest difference {d:.2e}, limit {limit:g}") # NaN is not <= anything

def tally():
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0
