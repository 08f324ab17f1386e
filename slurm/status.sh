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
run=${recipe[run]}
jobs=$run/slurm/jobs.tsv

for stage in ${recipe[stages]}; do
  line=${recipe[$stage.state]}
  id=
  [[ ! -f $jobs ]] ||
    id=$(awk -F'\t' -v stage="$stage" '$1 == stage { id = $2 } END { print id }' "$jobs")
  if [[ -n $id && $line != "done" ]]; then
    # squeue forgets a finished job after MinJobAge; sacct, where there is one, does not.
    state=$(squeue -h -j "$id" -t all -o '%T %r %M' 2>/dev/null || true)
    [[ -n $state ]] || state=$(sacct -n -X -j "$id" -o State 2>/dev/null | head -n 1 || true)
    line+=", job $id ${state:-is not known to Slurm any more}"
  fi
  printf '%-10s %s\n' "$stage" "$line"
done

metrics=$run/finetune.partial/metrics.jsonl
[[ -f $metrics ]] || metrics=$run/finetune/metrics.jsonl
[[ -f $metrics ]] || exit 0
# A killed run may have left half a line.
"$python" - "$metrics" "${recipe[steps]}" <<'PYTHON'
import json
import statistics
import sys
import time

records = []
for line in open(sys.argv[1]):
    try:
        records.append(json.loads(line))
    except json.JSONDecodeError:
        continue
train = [record for record in records if record["kind"] == "train"]
if train:
    last, steps = train[-1], int(sys.argv[2])
    print(json.dumps(last))
    # The median leaves out steps that waited for a save or compiled.
    left = (steps - last["step"]) * statistics.median(r["seconds"] for r in train[-50:])
    end = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + left))
    print(f"step {last['step']} of {steps}, {left / 3600:.1f} hours of training left"
          + (f": {end}, if it runs on" if left else ""))
PYTHON
