#!/bin/sh
#SBATCH --job-name=kvtrace
#SBATCH --output=%x-%A_%a.log
# shard.sh N DIR COMMAND.. - part $SLURM_ARRAY_TASK_ID of N of a sweep or of a capture.
#
#   sbatch --array=1-8 sim/slurm/shard.sh 8 parts  kv-sim run traces/*.kvt -p snapkv,cake -b auto
#   sbatch --array=1-8 sim/slurm/shard.sh 8 traces kv-capture run -m model.gguf --prompts prompts.jsonl --record obs
#
# A sweep's part goes into DIR/part-I-of-N.db, a capture's traces into DIR. A part that died is run again alone (--array=3, the
# same N): it does what is missing. Then: kv-analyze merge DIR/part-*-of-8.db -o all.db
set -eu
if [ $# -lt 4 ] || [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
    echo "usage: sbatch --array=1-N shard.sh N DIR kv-sim run .. | kv-capture run ..   (or SLURM_ARRAY_TASK_ID=I shard.sh ..)" >&2
    exit 2
fi
n=$1 dir=$2 i=$SLURM_ARRAY_TASK_ID
shift 2
mkdir -p "$dir"
case ${1##*/} in
kv-sim) exec "$@" --shard "$i/$n" --db "$dir/part-$i-of-$n.db" ${SLURM_CPUS_PER_TASK:+-j "$SLURM_CPUS_PER_TASK"} ;;
kv-capture) exec "$@" --shard "$i/$n" -o "$dir" ${SLURM_CPUS_PER_TASK:+--threads "$SLURM_CPUS_PER_TASK"} ;;
*)
    echo "shard.sh: '$1' has no shards: kv-sim run or kv-capture run" >&2
    exit 2
    ;;
esac
