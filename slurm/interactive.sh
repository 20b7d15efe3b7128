#!/bin/bash
# A script of ours on every process of an allocation that you hold, its output before you, node by node:
#
#     salloc --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 --time=01:00:00
#     bash slurm/interactive.sh align.py configs/hh_pythia_28b.toml --steps 20 --out runs/try
#
# Ctrl-C: the step in progress ends and is saved.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${SLURM_JOB_NODELIST:?no allocation: salloc --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 first}"

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts%%$'\n'*}
# another run of the same allocation may still hold the port of the last
MASTER_PORT=${MASTER_PORT:-$((20000 + RANDOM % 20000))}
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
exec srun --disable-status --kill-on-bad-exit=1 --label --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
    exec "$@"' task "${PYTHON:-.venv/bin/python}" "$@"
