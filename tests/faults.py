"""faults.py BIN [--quick] [--only CASE,..] [--kinds KIND,..] [-j N]: the n-th call of a kind fails, for every n until the run succeeds.

Every case is a command of one of the four programs in a folder of its own, run with tests/fault.c preloaded: the n-th allocation, open, read,
write, sync, rename, remove or thread start fails, once, and in a second pass it and all calls behind it. After each of these runs
  - the program ended by itself: with one line of error and exit 1, or with the very result of an undisturbed run (which a failed write, sync
    or rename never allows: what was asked for is not on the disk then);
  - nothing stands under a final name that is not whole and right; a database holds whole runs;
  - the same command without a fault, in the folder as the failed run left it, gives the result of an undisturbed run.
--quick tries some n of every loop (for make test). Last lines: a row a case, then "N passed, N failed, N skipped"."""
import argparse
import concurrent.futures
import glob
import hashlib
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "cli"))
import dump  # noqa: E402

KINDS = "alloc", "open", "read", "write", "sync", "rename", "remove", "thread"
MODEL = os.path.join(HERE, "golden/models/gguf/llama256/llama256.Q4_K_M.gguf")
ENV = dict(os.environ, LC_ALL="C", OPENBLAS_NUM_THREADS="1", KVTRACE_PLOTS=os.path.join(HERE, "../plots"))
NOTE = re.compile(r"^kv-\w+: (note|warning|'.*' carries no|'.*' marks no)")


def contents(folder):
    out = {}
    for root, _, files in os.walk(folder):
        for f in files:
            path = os.path.join(root, f)
            with open(path, "rb") as h:
                out[os.path.relpath(path, folder)] = h.read()
    return out


def by_run(path):
    """{run_id: its rows}, of a copy: looking must not finish what a killed writer left."""
    rows = {}
    for view, (_, lines) in dump.views(path).items():
        for line in lines:
            rows.setdefault(line.split("'")[1], []).append(view + line)
    return rows


class Case:
    """One command. start: files of the inputs' folder that stand in the run's folder before; the rest are named ../in/FILE."""

    def __init__(self, name, program, command, start=()):
        self.name, self.program, self.command, self.start = name, program, [MODEL if w == "MODEL" else w for w in command.split("|")], start

    def fresh(self, folder):
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        for f in self.start:
            shutil.copy(os.path.join(folder, "../in", f), folder)


CASES = [
    Case("capture", "kv-capture", "run|-m|MODEL|--prompts|../in/p.jsonl|-o|out|--threads|1|--backend|cpu"),
    Case("capture-greedy", "kv-capture", "run|-m|MODEL|--text|the quick|--decode|3|--threads|2|--backend|cpu|--logits|l.npy|--wo|embed|-o|c.kvt"),
    Case("capture-over", "kv-capture", "run|-m|MODEL|--text|the quick|--record|obs|--backend|cpu|-o|c.kvt", ("c.kvt",)),
    Case("sim", "kv-sim", "run|../in/a.kvt|../in/b.kvt|-p|snapkv,cake,h2o:decode=h2o|-b|10%,30%|-j|1|--db|r.db"),
    Case("sim-all", "kv-sim", "run|../in/a.kvt|-p|random,ada-snapkv|-b|20%|--metrics|all|--detail|step|--gap|-j|2|--db|r.db"),
    Case("sim-again", "kv-sim", "run|../in/a.kvt|-p|snapkv,knorm|-b|20%|-j|1|--detail|head|--db|r1.db", ("r1.db",)),
    Case("sim-closed", "kv-sim", "run|../in/c.kvt|-p|snapkv,tova.decode|-b|50%|-j|1|--model|MODEL|--generate|--db|r.db"),
    Case("keep", "kv-sim", "keep|../in/a.kvt|-p|lava,cake|-b|10%|-o|kept/"),
    Case("merge", "kv-analyze", "merge|../in/r1.db|../in/r2.db|-o|all.db"),
    Case("report", "kv-analyze", "report|--db|../in/r1.db|-o|page.html"),
    Case("report-text", "kv-analyze", "report|../in/a.kvt|--db|../in/r1.db|--text|snapkv|-b|20%|-o|page.html"),
    Case("summary", "kv-analyze", "summary|--db|../in/r1.db"),
    Case("compare", "kv-analyze", "compare|snapkv|recency|--db|../in/r1.db|--json"),
    Case("plot", "kv-analyze", "plot|curve|--db|../in/r1.db|-o|figures"),
    Case("recover", "kv-trace", "recover|../in/bad.kvt|back.kvt"),
    Case("recover-here", "kv-trace", "recover|bad.kvt|bad.kvt", ("bad.kvt",)),
    Case("import", "kv-trace", "import|--q|../in/q.npy|--k|../in/k.npy|--v|../in/v.npy|--prompt-tokens|30|-o|i.kvt"),
    Case("import-map", "kv-trace", "import|--map|../in/map.npy|-o|i.kvt"),
    Case("export", "kv-trace", "export|../in/a.kvt|--targets|-o|targets"),
    Case("slice", "kv-trace", "slice|../in/a.kvt|s.kvt|--layers|0"),
    Case("cat", "kv-trace", "cat|../in/a.kvt|--stream|k|-o|k.npy"),
    Case("verify", "kv-trace", "verify|--deep|../in/a.kvt"),
]


def inputs(bin_, folder):
    def run(*command):
        subprocess.run([os.path.join(bin_, command[0])] + list(command[1:]), cwd=folder, env=dict(ENV, LD_PRELOAD=fault(bin_), KV_FAULT="count"),
                       check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    os.makedirs(folder)
    shape = "--layers|2|--q-heads|2|--kv-heads|1|--head-dim|8|--tokens|48|--prompt-tokens|40".split("|")
    run("kv-trace", "synth", *shape, "-o", "a.kvt")
    run("kv-trace", "synth", *shape, "--seed", "2", "-o", "b.kvt")
    run("kv-capture", "run", "-m", MODEL, "--text", "the quick brown fox", "--decode", "4", "--backend", "cpu", "--wo", "embed", "-o", "c.kvt")
    for n, policies in (1, "snapkv,recency"), (2, "recency,knorm"):
        run("kv-sim", "run", "a.kvt", "b.kvt", "-p", policies, "-b", "20%,40%", "-j", "1", "--db", "r%d.db" % n)
    for s in "qkv":
        run("kv-trace", "cat", "a.kvt", "--stream", s, "-o", s + ".npy")
    run("kv-trace", "cat", "a.kvt", "--stream", "map", "-o", "map.npy")
    whole = open(os.path.join(folder, "a.kvt"), "rb").read()
    with open(os.path.join(folder, "bad.kvt"), "wb") as f:
        f.write(whole[:len(whole) * 3 // 4])
    gnuplot = os.path.join(folder, "gnuplot")  # what other programs do is not tried here: a quick one
    with open(gnuplot, "w") as f:
        f.write('#!/bin/sh\necho "<svg></svg>" >"$5"\n')
    os.chmod(gnuplot, 0o755)
    with open(os.path.join(folder, "p.jsonl"), "w") as f:
        f.write('{"id": "one", "text": "the quick", "prompt_end_byte": 4}\n{"id": "two", "text": "the lazy"}\n')


def fault(bin_):
    return os.path.join(os.path.abspath(bin_), "tests/fault.so")


class Judge:
    """What may stand in a run's folder: files are right byte for byte, databases through their views."""

    def __init__(self, case, work):
        self.case, self.work, self.sure = case, work, {}

    def expect(self, want):
        self.want = want
        self.want_runs = {f: by_run(os.path.join(self.work, f)) for f in want if f.endswith(".db")}

    def same(self, name, got):
        """What stands under a name is what an undisturbed run writes there (a database: through its views)."""
        if name not in self.want_runs:
            return got.get(name) == self.want[name]
        return name in got and self.runs(name, got) == self.want_runs[name]

    def runs(self, name, got):
        key = hashlib.sha256(got[name] + got.get(name + "-journal", b"")).digest()
        if key not in self.sure:
            look = self.work + ".look"
            shutil.rmtree(look, ignore_errors=True)
            os.makedirs(look)
            for f in got:
                if f.startswith(name):
                    with open(os.path.join(look, f), "wb") as copy:
                        copy.write(got[f])
            try:
                self.sure[key] = by_run(os.path.join(look, name))
            except sqlite3.Error as e:  # not a database (any more)
                self.sure[key] = {"broken": str(e)} if got[name] else {}
        return self.sure[key]

    def wrong(self, name, got, before):
        """Why what stands under a final name may not stand there."""
        if name not in got or got[name] == before.get(name) or self.same(name, got):
            return None
        if name in self.want_runs:
            had = self.want_runs[name]
            bad = [r for r, rows in self.runs(name, got).items() if had.get(r) != rows]
            old = self.runs(name, before) if name in before else {}
            return None if all(old.get(r) == self.runs(name, got)[r] for r in bad) else "'%s' holds torn or wrong runs: %s" % (name, bad[:1])
        return "'%s' is half-written" % name


class Loop:
    """The loops of one case."""

    def __init__(self, bin_, case, top, quick):
        self.case, self.quick, self.top = case, quick, top
        self.work = os.path.join(top, case.name)
        self.failures, self.rows = [], []
        self.program = [os.path.join(os.path.abspath(bin_), case.program)]
        env = dict(ENV, LD_PRELOAD=fault(bin_), KV_FAULT="serve", PATH=os.path.join(top, "in") + ":" + ENV["PATH"])
        self.server = subprocess.Popen(self.program, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.seen = set()
        self.right = Judge(case, self.work)
        self.case.fresh(self.work)
        self.rc, _ = self.run("count")
        if self.rc not in (0, 3):
            sys.exit("%s: the command fails by itself: %s" % (case.name, self.stderr()))
        self.want = contents(self.work)
        self.right.expect(self.want)
        self.want_out = self.stdout()
        self.quiet = {re.sub(r"\d", "", line) for line in self.stderr()}

    def close(self):
        self.server.stdin.close()
        self.server.wait()
        shutil.rmtree(self.work, ignore_errors=True)

    def run(self, what):
        says = self.work + ".says"
        if os.path.exists(says):
            os.remove(says)
        fields = [self.work, what, self.work + ".out", self.work + ".err", says] + self.case.command
        self.server.stdin.write("\t".join(fields) + "\n")
        self.server.stdin.flush()
        status = int(self.server.stdout.readline())
        try:
            with open(says) as f:
                said = f.read().split("\n")
        except OSError:
            said = []
        return (os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)), said

    def stdout(self):
        with open(self.work + ".out", "rb") as f:
            return f.read()

    def stderr(self):
        with open(self.work + ".err", errors="replace") as f:
            return f.read().splitlines()

    def judge(self, rc, before, kind):
        """None or what was wrong with a run in which a call failed."""
        got, err = contents(self.work), self.stderr()
        if rc < 0:
            return "died of signal %d" % -rc
        if rc == self.rc:
            for name in self.want:
                if not self.right.same(name, got):
                    return "exit %d, but '%s' is not right" % (rc, name)
            if kind in ("write", "sync", "rename"):
                return "exit %d: nobody noticed" % rc
            return None if self.stdout() == self.want_out else "exit %d, but another output" % rc
        if rc != 1:
            return "exit %d" % rc
        lines = [x for x in err if not NOTE.match(x) and re.sub(r"\d", "", x) not in self.quiet]
        if len(lines) != 1 or not re.match(r"%s[ a-z]*: .*[^ :]$" % self.case.program, lines[0]):
            return "not one line of error: %s" % lines
        for name in self.want:
            why = self.right.wrong(name, got, before)
            if why:
                return why
        key = hashlib.sha256(repr(sorted((k, hashlib.sha256(v).digest()) for k, v in got.items())).encode()).digest()
        if key in self.seen:
            return None
        self.seen.add(key)
        done = all(self.right.same(name, got) for name in self.want)  # what failed stands behind the result
        rc, _ = self.run("count")
        got = contents(self.work)
        if rc != self.rc and not (done and rc == 0):
            return "%s; and the next run: exit %d: %s" % (lines[0], rc, self.stderr()[-1:])
        if set(got) != set(self.want):
            return "%s; and the next run leaves %s" % (lines[0], sorted(set(got) ^ set(self.want)))
        bad = [name for name in self.want if not self.right.same(name, got)]
        return "%s; and the next run makes another '%s'" % (lines[0], bad[0]) if bad else None

    def loop(self, kind, how):
        n, step, tried, absorbed, messages = 1, 1, 0, 0, {}
        self.case.fresh(self.work)
        before = contents(self.work)
        _, said = self.run("count")
        calls = int([x for x in said if x.startswith(kind)][0].split()[1])
        if self.quick:
            step = max(1, calls // self.quick)
        while True:
            self.case.fresh(self.work)
            rc, said = self.run("%s:%d%s" % (kind, n, how))
            if "fired" not in said:
                if rc != self.rc:
                    self.failures.append("%s: nothing failed, and exit %d: %s" % (kind, rc, self.stderr()[-1:]))
                break
            tried += 1
            absorbed += rc == self.rc
            for line in self.stderr()[-1:] if rc == 1 else []:
                messages.setdefault(re.sub(r"\d+", "#", line), n)
            why = self.judge(rc, before, kind)
            if why:
                self.failures.append("%s %s %s:%d%s: %s" % (self.case.name, self.case.program, kind, n, how, why))
            n += step
        return tried, absorbed, messages


def work(args):
    bin_, case, kinds, top, quick, verbose = args
    loop = Loop(bin_, case, top, quick)
    out = []
    for kind in kinds:
        for how in "", "+":
            tried, absorbed, messages = loop.loop(kind, how)
            out.append((case.name, kind + how, tried, absorbed))
            if verbose:
                for m, n in messages.items():
                    print("  %s %s:%d%s  %s" % (case.name, kind, n, how, m), flush=True)
    loop.close()
    return out, loop.failures


def main():
    p = argparse.ArgumentParser()
    p.add_argument("bin")
    p.add_argument("--quick", type=int, default=0, help="about so many n of every loop")
    p.add_argument("--only", default="")
    p.add_argument("--kinds", default=",".join(KINDS))
    p.add_argument("--verbose", action="store_true", help="every message, once")
    p.add_argument("-j", type=int, default=os.cpu_count())
    a = p.parse_args()
    a.bin = os.path.abspath(a.bin)
    if not os.path.exists(fault(a.bin)):
        print("SKIP faults: %s is not built\n0 passed, 0 failed, 1 skipped" % fault(a.bin))
        return 0
    top = tempfile.mkdtemp(prefix="kv_faults_")
    failed = tried = 0
    try:
        inputs(a.bin, os.path.join(top, "in"))
        cases = [c for c in CASES if not a.only or c.name in a.only.split(",")]
        jobs = [(a.bin, c, a.kinds.split(","), top, a.quick, a.verbose) for c in cases]
        with concurrent.futures.ProcessPoolExecutor(a.j) as pool:
            for case, (rows, failures) in zip(cases, pool.map(work, jobs)):
                print("%-15s " % case.name + "  ".join("%s %d" % (kind, n) for _, kind, n, _ in rows if n)
                      + "  (%d without effect)" % sum(r[3] for r in rows), flush=True)
                for f in failures[:20]:
                    print("FAIL", f, flush=True)
                failed += len(failures)
                tried += sum(r[2] for r in rows)
    finally:
        shutil.rmtree(top, ignore_errors=True)
    print("%d passed, %d failed, 0 skipped" % (tried - failed, failed))
    return failed > 0 or not tried


if __name__ == "__main__":
    sys.exit(main())
