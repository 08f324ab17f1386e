#!/usr/bin/env bash
# Submits what is left of a run, each stage after those that it reads:
#   slurm/chain.sh EXPERIMENT [--dry-run] [key=value ...]
# cluster=NAME chooses conf/cluster/NAME.yaml. Called again it goes on: stages that are done or in
# the queue are not submitted twice. With cluster.data_shards or cluster.evaluate_shards above 1 an
# array makes the parts of data_prep or evaluate, and a job after it puts them together. What
# fetches runs here, where there is a network. What --dry-run prints is a script that does the same.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=slurm/common.sh
source "$root/slurm/common.sh"
# Of an allocation (salloc) in which this is called nothing may reach the jobs.
for name in ${!SLURM_@}; do
  [[ $name = SLURM_CONF ]] || unset "$name"
done
# What jobs see as SLURM_SUBMIT_DIR.
cd "$root"

dry=
experiment=
rest=()
for word; do
  case $word in
    --dry-run) dry=yes ;;
    -*) refuse "$word: the only flag is --dry-run; what sbatch is to be given is in conf/cluster" ;;
    stage=*) refuse "$word: a chain has all stages; for one: sbatch slurm/stage.sbatch STAGE ..." ;;
    *=*) rest+=("$word") ;;
    *)
      [[ -z $experiment ]] || refuse "$word: one experiment at a time, and $experiment is named"
      experiment=$word
      ;;
  esac
done
[[ -n $experiment ]] || refuse "no experiment: slurm/chain.sh EXPERIMENT [--dry-run] [key=value" \
  "...], one of $(basename -s .yaml -a conf/experiment/*.yaml | tr '\n' ' ')"
keys=("experiment=$experiment" "${rest[@]}")
command -v sbatch >/dev/null ||
  refuse "sbatch: not found, so this is no Slurm cluster; run on this machine:" \
    "$(quoted "$python" pipeline/run.py "${keys[@]}")"
code=0
read_recipe "${keys[@]}" || code=$?
[[ -v recipe[cluster.partition] ]] || exit "$code"
# As other refusals, before anything is submitted.
partition=${recipe[cluster.partition]:-${SBATCH_PARTITION:-}}
known=$(sinfo -h -o %R | sort -u | tr '\n' ' ')
# sbatch takes several, and the one that is free first.
for name in ${partition//,/ }; do
  [[ " $known" = *" $name "* ]] ||
    refuse "partition $name: this cluster has $known; set cluster.partition or SBATCH_PARTITION"
done
[[ $code = 0 ]] || exit "$code"
run=${recipe[run]}
read -ra stages <<<"${recipe[stages]}"

for stage in "${stages[@]}"; do
  [[ ${recipe[$stage.state]} != changed ]] ||
    refuse "${recipe[$stage.folder]}: was made with another configuration; choose variant=NAME" \
      "to keep it, or force=true to redo it"
done
read_container
# No more cores than the smallest node has; "16+" where they differ.
cores=${recipe[cluster.stage_cpus]}
least=$(sinfo -h ${partition:+-p "$partition"} -o %c | grep -o '^[0-9]*' | sort -n | head -n 1)
[[ -z $least || $least -ge $cores ]] || cores=$least

if [[ -n $dry ]]; then
  say() { printf '# %s\n' "$*"; }
  quoted cd "$root"
else
  check_writable "$run/slurm"
fi

for stage in fetch fetch_tasks; do
  if [[ ${recipe[$stage.state]:-done} != "done" ]]; then
    say "$stage: here and now, for it needs a network"
    command=("$python" pipeline/run.py "stage=$stage" "${keys[@]}")
    if [[ -n $dry ]]; then quoted "${command[@]}"; else "${command[@]}"; fi
  fi
done

# The job of a stage, where it still waits or runs.
queued() {
  local id
  id=$(job_of "$1")
  [[ -z $id ]] || squeue -h -j "$id" -t PD,CF,R,S,RQ,RH,CG -o %A 2>/dev/null | sort -u || true
}

# Flags of sbatch for a stage, or for the array of its parts, into `flags`.
flags_of() {
  local stage=$1 parts=${2:-} log=%x-%j time=${recipe[cluster.stage_time]} gpus=0
  [[ -z $parts ]] || log=%x-%A_%a
  flags=(--parsable --job-name="${recipe[name]}-${recipe[variant]}-$stage$parts" --export=ALL)
  flags+=(--output="$run/slurm/$log.out")
  case $stage in
    finetune)
      time=${recipe[cluster.train_time]}
      flags+=(--nodes="${recipe[nodes]}")
      gpus=${recipe[gpus_per_node]}
      # Where the recipe is for the CPU the script's own GPUs must not be asked for.
      [[ ${recipe[device]} != cpu ]] || flags+=(--gpus-per-node=0)
      ;;
    evaluate) gpus=${recipe[cluster.evaluate_gpus]} ;;
  esac
  case $stage in
    finetune) ;;
    data_prep) flags+=(--cpus-per-task="${recipe[data_workers]:-$cores}") ;;
    *) flags+=(--cpus-per-task="$cores") ;;
  esac
  [[ ${recipe[device]} = cpu || $gpus = 0 ]] || flags+=(--gpus-per-node="$gpus")
  local key
  for key in account partition qos; do
    [[ -z ${recipe[cluster.$key]} ]] || flags+=(--"$key=${recipe[cluster.$key]}")
  done
  [[ -z $time ]] || flags+=(--time="$time")
  [[ $stage = finetune || -z ${recipe[cluster.memory]} ]] ||
    flags+=(--mem="${recipe[cluster.memory]}")
}

# The sbatch script with the #SBATCH lines that fit; others' world sizes come as flags.
train_script() {
  if [[ ${recipe[nodes]} -gt 1 ]]; then echo slurm/train_70b.sh; else echo slurm/train_7b.sh; fi
}

# Submits a job: what it is called, the file that notes its id, its dependencies, its script. The id
# is then in `id`. A job that cannot come any more leaves the queue, instead of waiting for ever.
submit() {
  local name=$1 note=$2 after=$3
  shift 3
  if [[ -n $dry ]]; then
    [[ -z $after ]] || after=" --dependency=afterok$after --kill-on-invalid-dep=yes"
    printf "%s=\$(%s%s %s)\n" "$name" "$(quoted sbatch "${flags[@]}")" "$after" \
      "$(quoted "$@" "${keys[@]}")"
    # The variable that this line sets.
    id="\${$name}"
    return
  fi
  [[ -z $after ]] || flags+=(--dependency="afterok$after" --kill-on-invalid-dep=yes)
  id=$(sbatch "${flags[@]}" "$@" "${keys[@]}") ||
    refuse "stage $name: sbatch refused it, as above; what was submitted before stays in the" \
      "queue, and the same command goes on"
  # A federation answers "id;cluster".
  id=${id%%;*}
  mkdir -p "$(dirname "$note")"
  echo "$id" >>"$note"
  say "$name: job $id${after:+ after ${after#:}}"
}

# Submits an array of those parts of a stage that are neither done nor in the queue; whatever is not
# done is then in `parts`, as dependencies.
submit_parts() {
  local stage=$1 after=$2 note=${recipe[$1.folder]}.parts.job array arrays number waits left=()
  parts=
  mapfile -t arrays < <(cat "$note" 2>/dev/null)
  for number in ${recipe[$stage.left]}; do
    waits=
    for array in "${arrays[@]}"; do
      [[ -z $(squeue -h -r -j "${array}_$number" -o %i 2>/dev/null) ]] || waits=${array}_$number
    done
    if [[ -n $waits ]]; then parts+=:$waits; else left+=("$number"); fi
  done
  if [[ -n $parts ]]; then say "${stage}_parts: ${parts#:} in the queue"; fi
  [[ ${#left[@]} -gt 0 ]] || return 0
  flags_of "$stage" _parts
  local at_once=${recipe[cluster.at_once]}
  flags+=(--array="$(IFS=,; echo "${left[*]}")${at_once:+%$at_once}")
  submit "${stage}_parts" "$note" "$after" slurm/stage.sbatch "$stage/${recipe[$stage.shards]}"
  # Each by itself: of a whole array, Slurm sees only at its end that a task has failed.
  for number in "${left[@]}"; do parts+=:${id}_$number; done
}

declare -A ids
for stage in "${stages[@]}"; do
  [[ $stage != fetch* ]] || continue
  if [[ ${recipe[$stage.state]} = "done" ]]; then
    say "$stage: done, ${recipe[$stage.folder]}"
    continue
  fi
  id=$(queued "$stage")
  if [[ -n $id ]]; then
    say "$stage: job $id is in the queue"
    ids[$stage]=$id
    continue
  fi
  after=
  for input in ${recipe[$stage.inputs]}; do
    [[ -z ${ids[$input]:-} ]] || after+=:${ids[$input]}
  done
  if [[ -n ${recipe[$stage.shards]:-} ]]; then
    submit_parts "$stage" "$after"
    after+=$parts
  fi
  flags_of "$stage"
  script=(slurm/stage.sbatch "$stage")
  [[ $stage != finetune ]] || read -ra script < <(train_script)
  submit "$stage" "${recipe[$stage.folder]}.job" "$after" "${script[@]}"
  ids[$stage]=$id
done
[[ -n $dry ]] || say "$(quoted slurm/status.sh "$experiment" "${rest[@]}") shows where it stands"
