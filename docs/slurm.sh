#!/usr/bin/env bash
# An example for Slurm: two nodes of four GPUs, eight prompts an iteration. Copy it, change paths and the partition, and
#   sbatch docs/slurm.sh [options of invert4tvg.py]
# Fifteen minutes before its time is up the run saves a checkpoint, and the job queues itself again to go on from there.
#SBATCH --job-name=invert4tvg
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@900
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF-expandable_segments:True}  # as train.sh
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
stopping=
# scancel signals torchrun on all nodes, not this script. torchrun passes SIGTERM on, and the iteration ends and is saved.
trap 'stopping=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

# --output must be a folder that all nodes see.
srun --ntasks-per-node 1 torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node 4 --rdzv-backend c10d \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:29500" --shutdown-timeout 840 \
    invert4tvg.py --output runs/charades-3b --eval-every 500 "$@" &
training=$!
status=0
wait "$training" || status=$?
while kill -0 "$training" 2> /dev/null; do  # the signal ended the first `wait`, not the training
    status=0
    wait "$training" || status=$?
done
if [ -n "$stopping" ] && [ "$status" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
