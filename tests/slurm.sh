#!/bin/sh
# slurm.sh BIN - a sweep and a capture as job arrays under a real slurmctld and slurmd, made on this host in a scratch folder (as root;
# Debian slurm-wlm and munge): a part is killed while it runs and run again alone; the whole is what one process makes. Last line as
# of every check.
set -u
if [ "$(id -u)" != 0 ] || ! command -v slurmctld >/dev/null || ! command -v munged >/dev/null; then
    echo "SKIP slurm: needs root, slurm-wlm and munge"
    echo "0 passed, 0 failed, 1 skipped"
    exit 0
fi
bin=$(cd "$1" && pwd) root=$(cd "$(dirname "$0")/.." && pwd)
d=$(mktemp -d) node=$(hostname -s) pass=0 fail=0
PATH=$bin:$PATH SLURM_CONF=$d/slurm.conf
export PATH SLURM_CONF
stop() {
    for p in slurmd slurmctld munged; do [ ! -s "$d/$p.pid" ] || kill "$(cat "$d/$p.pid")" 2>/dev/null; done
    sleep 1
    rm -rf "$d"
}
trap stop EXIT
trap 'exit 1' INT TERM
check() {
    what=$1
    shift
    if "$@" >"$d/check" 2>&1; then pass=$((pass + 1)); else fail=$((fail + 1)) && echo "FAIL slurm: $what" && head -3 "$d/check"; fi
}

chmod 755 "$d"
mkdir "$d/state" "$d/spool" "$d/work"
(umask 077 && head -c 1024 /dev/urandom >"$d/munge.key")
munged --force --key-file="$d/munge.key" --socket="$d/munge.socket" --pid-file="$d/munged.pid" --log-file="$d/munged.log" --seed-file="$d/seed" || exit 1
cat >"$SLURM_CONF" <<W
ClusterName=kvtrace
SlurmctldHost=$node(127.0.0.1)
SlurmUser=root
AuthInfo=socket=$d/munge.socket
SlurmctldPort=17817
SlurmdPort=17818
StateSaveLocation=$d/state
SlurmdSpoolDir=$d/spool
SlurmctldPidFile=$d/slurmctld.pid
SlurmdPidFile=$d/slurmd.pid
SlurmctldLogFile=$d/slurmctld.log
SlurmdLogFile=$d/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
NodeName=$node NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
W
slurmctld 2>>"$d/start.log"
slurmd 2>>"$d/start.log"
i=0
until sinfo -h -o %t 2>/dev/null | grep -q idle || [ $i -eq 60 ]; do i=$((i + 1)) && sleep 0.5; done
if [ $i -eq 60 ]; then
    tail -3 "$d"/*.log
    echo "0 passed, 1 failed, 0 skipped"
    exit 1
fi

cd "$d/work" || exit 1
dump() { python3 "$root/tests/cli/dump.py" "$1" | sort; }
for i in 1 2 3 4 5 6 7 8; do
    kv-trace synth --layers 4 --q-heads 8 --kv-heads 4 --head-dim 64 --tokens 900 --prompt-tokens 800 --seed $i -o $i.kvt
done
sweep='kv-sim run 1.kvt 2.kvt 3.kvt 4.kvt 5.kvt 6.kvt 7.kvt 8.kvt -p full,snapkv,h2o,cake,knorm,oracle,tova.decode -b 5%,20% --detail head'
$sweep --db one.db 2>/dev/null
dump one.db >one.txt

# shellcheck disable=SC2086 # the words of a command
job=$(sbatch --parsable --array=1-5 --cpus-per-task=1 --output="$d/%A_%a.log" "$root/sim/slurm/shard.sh" 5 parts $sweep)
i=0
until [ -s parts/part-3-of-5.db ] || [ $i -eq 1200 ]; do i=$((i + 1)) && sleep 0.1; done
scancel --full --signal=KILL "${job}_3"
while squeue -h -j "$job" 2>/dev/null | grep -q .; do sleep 0.5; done
check 'part 3 was killed' sh -c "scontrol show job ${job}_3 | grep -q 'JobState=\\(FAILED\\|CANCELLED\\|NODE_FAIL\\)'"
kv-analyze merge parts/part-*-of-5.db -o short.db 2>/dev/null
check 'and without it something is missing' sh -c "[ \$(python3 $root/tests/cli/dump.py short.db | wc -l) -lt \$(wc -l <one.txt) ]"
# shellcheck disable=SC2086
sbatch --wait --array=3 --cpus-per-task=1 --output="$d/%A_%a.log" "$root/sim/slurm/shard.sh" 5 parts $sweep >/dev/null
check 'run again alone it finishes' test $? -eq 0
check 'the parts merge' kv-analyze merge parts/part-*-of-5.db -o all.db
dump all.db >all.txt
check 'and are what one process makes' cmp one.txt all.txt

model=$root/tests/golden/models/gguf/llama256/llama256.Q4_K_M.gguf i=0
while [ $i -lt 7 ]; do i=$((i + 1)) && echo "{\"id\": \"p$i\", \"text\": \"the quick brown fox $i jumps over the lazy dog\"}"; done >p.jsonl
kv-capture run -m "$model" --prompts p.jsonl --backend cpu -o whole 2>/dev/null
sbatch --wait --array=1-3 --cpus-per-task=1 --output="$d/%A_%a.log" "$root/sim/slurm/shard.sh" 3 traces kv-capture run -m "$model" --prompts p.jsonl --backend cpu >/dev/null
check 'a capture of three parts finishes' test $? -eq 0
same() { for t in whole/*.kvt; do kv-trace diff "$t" "traces/${t#whole/}" || return 1; done; }
check 'and its traces are those of one process' same
check 'with one W_O file' cmp whole/wo-*.kvw traces/wo-*.kvw
echo "slurm $(sinfo --version | sed 's/[^0-9.]//g'): array of 5 and of 3, part 3 of 5 killed and run again"
echo "$pass passed, $fail failed, 0 skipped"
[ $fail -eq 0 ]
