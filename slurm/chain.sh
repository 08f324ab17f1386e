#!/usr/bin/env bash
# Submits what is left of a run, each stage after those that it reads:
#   slurm/chain.sh EXPERIMENT [--dry-run] [key=value ...]
# cluster=NAME chooses conf/cluster/NAME.yaml. Called again it goes on: stages that are done or in
# the queue are not submitted twice. Stage fetch runs here, where there is a network.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=slurm/common.sh
source "$root/slurm/common.sh"
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
    "$python pipeline/run.py ${keys[*]}"
read_recipe "${keys[@]}" || exit $?
run=${recipe[run]}
read -ra stages <<<"${recipe[stages]}"

# Refusals before anything is submitted.
for stage in "${stages[@]}"; do
  [[ ${recipe[$stage.state]} != changed ]] ||
    refuse "${recipe[$stage.folder]}: was made with another configuration; choose variant=NAME" \
      "to keep it, or force=true to redo it"
done
read_container
partition=${recipe[cluster.partition]:-${SBATCH_PARTITION:-}}
known=$(sinfo -h -o %R | sort -u | tr '\n' ' ')
# sbatch takes several, and the one that is free first.
for name in ${partition//,/ }; do
  [[ " $known" = *" $name "* ]] ||
    refuse "partition $name: this cluster has $known; set cluster.partition or SBATCH_PARTITION"
done
[[ -n $dry ]] || check_writable "$run/slurm"

if [[ ${recipe[fetch.state]} != "done" ]]; then
  say "fetch: here and now, for it needs a network"
  [[ -n $dry ]] || "$python" pipeline/run.py stage=fetch "${keys[@]}"
fi

# The job of a stage, where it still waits or runs.
queued() {
  local id
  id=$(job_of "$1")
  [[ -z $id ]] || squeue -h -j "$id" -t PD,CF,R,S,RQ,RH,CG -o %A 2>/dev/null | sort -u || true
}

# Flags of sbatch for a stage, into `flags`.
flags_of() {
  local stage=$1 time=${recipe[cluster.stage_time]} gpus=0
  flags=(--parsable --job-name="${recipe[name]}-${recipe[variant]}-$stage" --export=ALL)
  flags+=(--output="$run/slurm/%x-%j.out")
  case $stage in
    finetune)
      time=${recipe[cluster.train_time]}
      flags+=(--nodes="${recipe[nodes]}")
      gpus=${recipe[gpus_per_node]}
      # Where the recipe is for the CPU the script's own GPUs must not be asked for.
      [[ ${recipe[device]} != cpu ]] || flags+=(--gpus-per-node=0)
      ;;
    data_prep)
      # Without, it has as many processes as the job has cores.
      [[ -z ${recipe[data_workers]} ]] || flags+=(--cpus-per-task="${recipe[data_workers]}")
      ;;
    evaluate) gpus=${recipe[cluster.evaluate_gpus]} ;;
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

declare -A ids
for stage in "${stages[@]}"; do
  [[ $stage != fetch ]] || continue
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
  flags_of "$stage"
  after=
  for input in ${recipe[$stage.inputs]}; do
    [[ -z ${ids[$input]:-} ]] || after+=:${ids[$input]}
  done
  # A job whose stage cannot come any more leaves the queue, instead of waiting there for ever.
  [[ -z $after ]] || flags+=(--dependency="afterok$after" --kill-on-invalid-dep=yes)
  script=(slurm/stage.sbatch "$stage")
  [[ $stage != finetune ]] || read -ra script < <(train_script)
  if [[ -n $dry ]]; then
    ids[$stage]="<$stage>"
    say "$stage: sbatch ${flags[*]} ${script[*]} ${keys[*]}"
    continue
  fi
  id=$(sbatch "${flags[@]}" "${script[@]}" "${keys[@]}") ||
    refuse "stage $stage: sbatch refused it, as above; what was submitted before stays in the" \
      "queue, and the same command goes on"
  # A federation answers "id;cluster".
  id=${id%%;*}
  ids[$stage]=$id
  mkdir -p "$(dirname "${recipe[$stage.folder]}")"
  echo "$id" >"${recipe[$stage.folder]}.job"
  say "$stage: job $id${after:+ after ${after#:}}"
done
[[ -n $dry ]] || say "slurm/status.sh ${keys[*]#experiment=} shows where it stands"
