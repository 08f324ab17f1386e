#!/usr/bin/env bash
# Where a chain stands: slurm/status.sh EXPERIMENT [key=value ...], as given to slurm/chain.sh.
# A line a stage, the last record of the training, and when it will end.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=slurm/common.sh
source "$root/slurm/common.sh"
cd "$root"
[[ -n ${1:-} && $1 != *=* && $1 != -* ]] ||
  refuse "${1:-no experiment}: the first word must be an experiment: slurm/status.sh EXPERIMENT" \
    "[key=value ...]"
read_recipe "experiment=$1" "${@:2}" || exit $?
for stage in ${recipe[stages]}; do
  line=${recipe[$stage.state]}
  if [[ -n ${recipe[$stage.shards]:-} ]]; then
    line+=", parts missing: ${recipe[$stage.left]:-none} of ${recipe[$stage.shards]}"
  fi
  id=$(job_of "$stage")
  if [[ -n $id && $line != "done" ]]; then
    # squeue forgets a finished job after MinJobAge; sacct, where there is one, does not.
    state=$(squeue -h -j "$id" -t all -o '%T %r %M' 2>/dev/null || true)
    [[ -n $state ]] || state=$(sacct -n -X -j "$id" -o State 2>/dev/null | head -n 1 || true)
    line+=", job $id ${state:-is not known to Slurm any more}"
  fi
  printf '%-10s %s\n' "$stage" "$line"
done
for folder in finetune.partial finetune; do
  metrics=${recipe[run]}/$folder/metrics.jsonl
  [[ ! -f $metrics ]] || exec "$python" slurm/last_step.py "$metrics" "${recipe[steps]}"
done
