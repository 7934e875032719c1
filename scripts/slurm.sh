#!/usr/bin/env bash
# A run on GPU nodes under SLURM: one process a GPU, which find each other by SLURM's variables.
#
#   sbatch --nodes=4 --gpus-per-node=8 scripts/slurm.sh --config=configs/vit_b16_i1k.py \
#     --workdir=/shared/runs/vit_b16 [--config.KEY=VALUE ...]
#
# The workdir is on a disk that all nodes share. A minute before its time is up, or when it is
# preempted, SLURM tells the run, which saves; the script then queues itself again, until the run is
# done. `./run.sh install` with VIT_JAX_EXTRAS=cuda comes first, once.
#SBATCH --job-name=vit_jax
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"

# If one process ends, none of the others can go on.
srun --kill-on-bad-exit=1 --wait=60 \
  "${VIT_JAX_VENV:-.venv}/bin/python" -m vit_jax train "$@" &
step=$!
trap 'kill -TERM $step' TERM
while kill -0 $step 2>/dev/null; do
  wait $step # Which the signal interrupts.
done
wait $step
code=$?

# 75: cut short, and saved. 134: JAX ended the processes that lost another one.
if [[ $code == 75 || $code == 134 || $code == 137 || $code == 143 ]]; then
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
