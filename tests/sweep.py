"""sweep.py BIN [--traces N]: a sweep over N (1000) small traces takes no more memory and files than one over N / 10; so does reading it.

Peak resident set (VmHWM) and most open files (/proc/PID/fd), looked at every 2 ms, of kv-sim run, kv-analyze summary, compare and report,
kv-trace verify. kv-analyze holds the numbers it compares: it may grow by 16 KiB a trace (8 runs). SQLite fills a cache of
2 MiB and sorts in up to three files."""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time

import faults


def measured(command, folder):
    """(peak MiB, most open files) of a command that must succeed, as it was last seen."""
    with open(os.path.join(folder, "err"), "w") as err:
        p = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=err, env=faults.ENV)
    files = peak = 0
    while p.poll() is None:
        try:
            files = max(files, len(os.listdir("/proc/%d/fd" % p.pid)))
            with open("/proc/%d/status" % p.pid) as f:
                peak = max([peak] + [int(line.split()[1]) for line in f if line.startswith("VmHWM")])
        except OSError:
            pass
        time.sleep(0.002)
    if p.returncode:
        sys.exit("%s: %s" % (" ".join(command[:3]), open(os.path.join(folder, "err")).read()[:300]))
    return peak / 1024, files


def main():
    p = argparse.ArgumentParser()
    p.add_argument("bin")
    p.add_argument("--traces", type=int, default=1000)
    a = p.parse_args()
    a.bin = os.path.abspath(a.bin)
    if not os.path.exists(faults.fault(a.bin)):
        print("SKIP sweep: a sanitizer keeps memory for itself\n0 passed, 0 failed, 1 skipped")
        return 0
    top = tempfile.mkdtemp(prefix="kv_sweep_")
    few, many, passed, failed = a.traces // 10, a.traces, 0, 0
    try:
        traces = ["%d.kvt" % i for i in range(many)]
        for i, t in enumerate(traces):
            subprocess.run([os.path.join(a.bin, "kv-trace")] + "synth --layers 2 --q-heads 4 --kv-heads 2 --head-dim 16 --tokens 100".split()
                           + ["--prompt-tokens", "80", "--seed", str(i), "-o", t], cwd=top, check=True)
        grows = 16 * (many - few) / 1024 + 4
        run = "kv-sim run -p snapkv,cake,h2o,tova.decode -b 10%,30% -j 2 --db".split()
        pairs = [("kv-sim run", lambda n: run + ["%d.db" % n] + traces[:n], 4),
                 ("kv-trace verify", lambda n: ["kv-trace", "verify", "--deep"] + traces[:n], 4),
                 ("kv-analyze summary", lambda n: ["kv-analyze", "summary", "--db", "%d.db" % n], grows),
                 ("kv-analyze compare", lambda n: ["kv-analyze", "compare", "snapkv", "h2o", "--db", "%d.db" % n], grows),
                 ("kv-analyze report", lambda n: ["kv-analyze", "report", "--db", "%d.db" % n, "-o", "r.html"], grows)]
        for name, command, room in pairs:
            got = [measured([os.path.join(a.bin, command(n)[0])] + command(n)[1:], top) for n in (few, many)]
            ok = got[1][0] <= got[0][0] + room and got[1][1] <= got[0][1] + 3
            passed, failed = passed + ok, failed + (not ok)
            print("%s%-19s %d traces: %.1f MiB, %d files open; %d traces: %.1f MiB, %d files open" % (
                "" if ok else "FAIL ", name, few, *got[0], many, *got[1]), flush=True)
    finally:
        shutil.rmtree(top, ignore_errors=True)
    print("%d passed, %d failed, 0 skipped" % (passed, failed))
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
