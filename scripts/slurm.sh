#!/usr/bin/env bash
# A recipe on several machines of a SLURM cluster: torchrun on each, the first of them for the meeting point.
#
#   sbatch --nodes 4 --gpus-per-node 8 scripts/slurm.sh finetune.sh [FLAGS...]
#
#SBATCH --job-name=llava-vlora
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.log
set -euo pipefail

# SLURM runs a copy of this file from its own folder, so the checkout is where the job was submitted.
cd "${SLURM_SUBMIT_DIR:?run this with sbatch from the checkout}"
recipe=scripts/${1:?name a recipe, such as finetune.sh}
shift
[[ -f $recipe ]] || { echo "slurm: there is no $recipe" >&2; exit 2; }

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${hosts%%$'\n'*}    # not `| head`, which may end scontrol with an error before it has written all
# Jobs that share a machine must not share the port.
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) NODES=$SLURM_NNODES LAUNCHER=torchrun
export GPUS=${GPUS:-${SLURM_GPUS_ON_NODE:?ask for GPUs with --gpus-per-node}}
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$@"' _ "$recipe" "$@"
