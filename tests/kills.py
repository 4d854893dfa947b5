"""kills.py BIN [--moments N] [--seed S] [--only CASE,..]: kill -9 at N random moments of a capture, a sweep, a merge and a report, then resume.

Every second moment is a time between the start and a little after the usual end; the others are calls (the n-th open, write, sync, rename or
removal: tests/fault.c), where most of what can go wrong is. What is killed leaves nothing half-written under a final name; the same command
then gives what an undisturbed run gives, byte for byte (a database: all its views outside wall times), and leaves nothing else behind.
Moments follow from the seed and are printed when one fails. Last lines: a row a case, then "N passed, N failed, N skipped"."""
import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import faults

CASES = [
    faults.Case("capture", "kv-capture", "run|-m|MODEL|--prompts|../in/p.jsonl|-o|out|--threads|2|--backend|cpu"),
    faults.Case("sim", "kv-sim", "run|../in/1.kvt|../in/2.kvt|../in/3.kvt|../in/4.kvt|-p|snapkv,cake,oracle,tova.decode|-b|5%,20%|--detail|head|-j|2|--db|r.db"),
    faults.Case("merge", "kv-analyze", "merge|../in/r1.db|../in/r2.db|-o|all.db"),
    faults.Case("report", "kv-analyze", "report|../in/1.kvt|--db|../in/r1.db|--text|snapkv|-b|20%|-o|page.html"),
]
CALLS = "open", "write", "sync", "rename", "remove"


def inputs(run, folder):
    os.makedirs(folder)
    for i in "1234":
        run("kv-trace", "synth", *"--layers|3|--q-heads|4|--kv-heads|2|--head-dim|32|--tokens|400|--prompt-tokens|320".split("|"), "--seed", i, "-o",
            i + ".kvt")
    for n, policies in (1, "snapkv,recency,h2o"), (2, "recency,knorm,cake"):
        run("kv-sim", "run", "1.kvt", "2.kvt", "3.kvt", "-p", policies, "-b", "5%,20%,60%", "--detail", "head", "-j", "2", "--db", "r%d.db" % n)
    with open(os.path.join(folder, "p.jsonl"), "w") as f:
        for i in range(3):
            f.write('{"id": "p%d", "text": "%s", "prompt_end_byte": 400}\n' % (i, "the quick brown fox jumps over the lazy dog " * 16))


class Kills:
    def __init__(self, bin_, case, top):
        self.bin, self.case, self.top = bin_, case, top
        self.work = os.path.join(top, case.name)
        self.judge = faults.Judge(case, self.work)
        case.fresh(self.work)
        rc, said = self.run("count")
        if rc:
            sys.exit("%s: the command fails by itself: %s" % (case.name, self.err()))
        self.calls = {k: int(n) for k, n in (line.split() for line in said if line)}
        case.fresh(self.work)
        start = time.monotonic()
        self.run("count")
        self.seconds = time.monotonic() - start
        self.judge.expect(faults.contents(self.work))

    def err(self):
        with open(self.work + ".err", errors="replace") as f:
            return f.read().splitlines()

    def run(self, what, kill_at=None):
        """(exit code, what the calls were); kill_at: seconds until SIGKILL."""
        says = self.work + ".says"
        if os.path.exists(says):
            os.remove(says)
        env = dict(faults.ENV, LD_PRELOAD=faults.fault(self.bin), KV_FAULT=what, KV_FAULT_SAYS=says, TMPDIR=self.top)
        with open(self.work + ".err", "w") as err:
            p = subprocess.Popen([os.path.join(self.bin, self.case.program)] + self.case.command, cwd=self.work, env=env,
                                 stdout=subprocess.DEVNULL, stderr=err)
            if kill_at is not None:
                time.sleep(kill_at)
                p.send_signal(signal.SIGKILL)
            rc = p.wait()
        try:
            with open(says) as f:
                return rc, f.read().split("\n")
        except OSError:
            return rc, []

    def moment(self, rng, i):
        """Kill at a moment of the seed's choice; ("what", exit code)."""
        if i % 2:
            at = rng.random() * 1.1 * self.seconds
            return "after %.4f s" % at, self.run("count", at)[0]
        kind = rng.choice([k for k in CALLS if self.calls.get(k)])
        n = rng.randint(1, self.calls[kind])
        return "%s:%d!" % (kind, n), self.run("%s:%d!" % (kind, n))[0]

    def all(self, n, seed):
        rng = random.Random("%s %d" % (self.case.name, seed))
        failures, killed, held = [], 0, 0
        for i in range(n):
            self.case.fresh(self.work)
            what, rc = self.moment(rng, i)
            killed += rc == -signal.SIGKILL
            got = faults.contents(self.work)
            held += any(f in got for f in self.judge.want)  # a result was there already, or a part of a database
            why = None if rc in (0, -signal.SIGKILL) else "exit %d: %s" % (rc, self.err()[-1:])
            why = why or next((w for w in (self.judge.wrong(f, got, {}) for f in self.judge.want) if w), None)
            if not why:
                rc, _ = self.run("count")
                after = faults.contents(self.work)
                if rc:
                    why = "the next run: exit %d: %s" % (rc, self.err()[-1:])
                elif set(after) != set(self.judge.want):
                    why = "the next run leaves %s" % sorted(set(after) ^ set(self.judge.want))
                else:
                    why = next(("the next run makes another '%s'" % f for f in self.judge.want if not self.judge.same(f, after)), None)
            if why:
                failures.append("%s, seed %d, moment %d (%s): %s" % (self.case.name, seed, i, what, why))
        return killed, held, failures


def main():
    p = argparse.ArgumentParser()
    p.add_argument("bin")
    p.add_argument("--moments", type=int, default=200)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--only", default="")
    a = p.parse_args()
    a.bin = os.path.abspath(a.bin)
    if not os.path.exists(faults.fault(a.bin)):
        print("SKIP kills: %s is not built\n0 passed, 0 failed, 1 skipped" % faults.fault(a.bin))
        return 0
    top = tempfile.mkdtemp(prefix="kv_kills_")
    tried = failed = 0
    try:
        def run(*command):
            subprocess.run([os.path.join(a.bin, command[0])] + list(command[1:]), cwd=os.path.join(top, "in"), check=True, env=faults.ENV,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        inputs(run, os.path.join(top, "in"))
        for case in CASES:
            if a.only and case.name not in a.only.split(","):
                continue
            k = Kills(a.bin, case, top)
            killed, held, failures = k.all(a.moments, a.seed)
            print("%-8s %d moments, %d killed before the end, %d with a result or a part of a database by then; a run takes %.2f s"
                  % (case.name, a.moments, killed, held, k.seconds), flush=True)
            for f in failures[:20]:
                print("FAIL", f, flush=True)
            tried, failed = tried + a.moments, failed + len(failures)
            shutil.rmtree(k.work, ignore_errors=True)
    finally:
        shutil.rmtree(top, ignore_errors=True)
    print("%d passed, %d failed, 0 skipped" % (tried - failed, failed))
    return failed > 0 or not tried


if __name__ == "__main__":
    sys.exit(main())
