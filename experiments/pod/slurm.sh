#!/usr/bin/env bash
# A run on a GPU cluster, a process for each GPU; the processes find each other through SLURM. From the
# repository's folder, which all nodes see, with the README's environment and jax's build for the GPUs in it:
#
#   .venv/bin/pip install "jax[cuda13]"
#   sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 experiments/pod/slurm.sh \
#       --mesh=32x1 --out_dir=runs/one --resume ...
#
#SBATCH --job-name=fedgalore
#SBATCH --requeue
#SBATCH --signal=TERM@120
#
# SLURM sends SIGTERM two minutes before it takes the nodes away: the run saves a checkpoint, ends with status
# 75, and is queued again. Any other failure of one process ends all: they end by themselves, and SLURM, which
# would kill those that are a moment later and lose the 75, waits a minute before it does.
set -uo pipefail
srun --kill-on-bad-exit=0 --wait=60 .venv/bin/python run.py --distributed "$@"
status=$?
[ "$status" = 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit "$status"
