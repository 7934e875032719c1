#!/usr/bin/env bash
# A run on GPU nodes under SLURM: one process a GPU, which find each other by SLURM's variables.
# On TPU nodes (Cluster Toolkit, Cluster Director) one process a node, which the slice orders.
#
#   sbatch --nodes=4 --gpus-per-node=8 scripts/slurm.sh --config=configs/vit_i1k.py:vit_b16 \
#     --workdir=/shared/runs/vit_b16 [--config.KEY=VALUE ...]
#
# The workdir is on a disk that all nodes share. Nodes with other than eight GPUs: give sbatch
# --ntasks-per-node too. TPU nodes: --ntasks-per-node=1 without --gpus-per-node.
#
# Five minutes before its time is up SLURM sends the run SIGTERM, on which it saves; the script then
# queues itself again, until the run is done or cancelled. A preempted job is told only where the
# cluster's partition has a GraceTime, which is then all the time that a save has, or where
# PreemptParameters has send_user_signal (slurm.schedmd.com/preempt.html); otherwise it is killed,
# and goes on from its last checkpoint. `./run.sh install` comes first, once, with
# VIT_JAX_EXTRAS=cuda or tpu.
#SBATCH --job-name=vit_jax
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

max_short_attempts=20
short_seconds=600

# A TPU host has one process, which uses all of its chips.
dev=${VIT_JAX_DEV:-/dev}
if [[ -z ${SLURM_GPUS_ON_NODE:-} ]] &&
  { compgen -G "$dev/accel[0-9]*" || compgen -G "$dev/vfio/[0-9]*"; } >/dev/null; then
  if [[ $SLURM_NTASKS_PER_NODE != 1 ]]; then
    echo "error: $SLURM_NTASKS_PER_NODE processes on a TPU node; give sbatch --ntasks-per-node=1" >&2
    exit 2
  fi
elif [[ ${SLURM_GPUS_ON_NODE:-0} != "$SLURM_NTASKS_PER_NODE" ]]; then
  echo "error: ${SLURM_GPUS_ON_NODE:-no} GPUs and $SLURM_NTASKS_PER_NODE processes a node; give" \
    "sbatch --gpus-per-node and the same --ntasks-per-node" >&2
  exit 2
fi

# SLURM tells the processes themselves; where it tells this shell as well, it waits for them.
trap : TERM

# A process that ends leaves the others a while to find out, so that each ends with a code that says
# why: of a wrong config all end with 2. srun itself does not pass on sbatch's --cpus-per-task.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 --wait=180 \
  "${VIT_JAX_VENV:-.venv}/bin/python" -m vit_jax train "$@"
code=$?

# 75: cut short, and saved. 134: JAX ended the processes that lost another one. 137 and 143: killed.
case $code in
  75 | 134 | 137 | 143) ;;
  *) exit "$code" ;;
esac
if ((SECONDS < short_seconds && ${SLURM_RESTART_COUNT:-0} >= max_short_attempts)); then
  echo "error: cut short after $SECONDS s, and $SLURM_RESTART_COUNT times before; giving up" >&2
  exit "$code"
fi
# A job that was cancelled is no longer running, and stays away.
if [[ $(squeue --noheader --job="$SLURM_JOB_ID" --format=%T) == RUNNING ]]; then
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
