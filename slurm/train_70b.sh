#!/usr/bin/env bash
# Stage finetune of Llama-2 70B at 128K: sbatch slurm/train_70b.sh [key=value ...], called in the
# repository. Account, partition and time: SBATCH_ACCOUNT, SBATCH_PARTITION and SBATCH_TIMELIMIT, or
# conf/cluster through slurm/chain.sh, which also runs the stages before and after.
#
# conf/parallel/nodes8x8.yaml: 8 nodes of 8 GPUs, the whole of them.
#SBATCH --job-name=llama2_70b_128k
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
# Ten minutes before the end the batch shell alone gets USR1: torchrun would die of it.
#SBATCH --signal=B:USR1@600
# After a node failure or a preemption Slurm puts the job back into the queue under its own id.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail

# Slurm runs a copy of this file from its spool: the repository is where sbatch was called.
root=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}
if [[ ! -f $root/slurm/train_job.sh ]]; then
  echo "error: $root: is not the repository; cd into it and call sbatch slurm/train_70b.sh" >&2
  exit 2
fi
# shellcheck source=slurm/train_job.sh
source "$root/slurm/train_job.sh"
train_job llama2_70b_128k "$@"
