# What train_*.sh do in their job: check, train, save before the end, go back into the queue.
# shellcheck shell=bash
# shellcheck disable=SC2154,SC2164
# (`root` is set, and errors end the shell, by the script that sources this.)
# shellcheck source=slurm/common.sh
source "$root/slurm/common.sh"

# Seconds that the ranks have to save once told; the rest of --signal's 600 is for the requeue.
SAVE_SECONDS=480
# How often one job may begin at the same checkpoint: what fails there thrice fails for ever.
STARTS_AT_ONE_PLACE=3
# Seconds for all nodes to meet before one is given up.
MEET_SECONDS=300

asked=
step=
watch=
launches=0

# One srun task a node, each a torchrun agent that starts the node's ranks.
launch() {
  launches=$((launches + 1))
  local nodes=$SLURM_JOB_NUM_NODES head port
  # The first name of the list; scontrol knows the list's short form.
  read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  # Below the ports that the kernel gives away, another one for every job and every start.
  port=$((20000 + (SLURM_JOB_ID * 10 + launches) % 10000))
  local torchrun=("$python" -m torch.distributed.run --nnodes="$nodes"
    --nproc-per-node="${recipe[gpus_per_node]}" --max-restarts=0 --rdzv-backend=c10d
    --rdzv-endpoint="$head:$port" --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}-$launches")
  # Who holds the store is said (torchrun reads PET_*), and not guessed from names and addresses. A
  # task sees all of its node's cores, which srun would else cut to one.
  # shellcheck disable=SC2016
  srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    --cpus-per-task="$SLURM_CPUS_ON_NODE" --cpu-bind=none "${container[@]}" \
    bash -c 'export PET_RDZV_CONF="is_host=$((SLURM_NODEID == 0)),join_timeout=$0"; exec "$@"' \
    "$MEET_SECONDS" "${torchrun[@]}" "$@" &
  step=$!
  local code=0
  wait "$step" || code=$?
  # A signal interrupts `wait`; the step goes on.
  while kill -0 "$step" 2>/dev/null; do
    code=0
    wait "$step" || code=$?
  done
  step=
  return "$code"
}

# USR1: the run saves at the next step's edge. Where it does not in time, it is ended all the same,
# or the time limit would end the job before it is back in the queue.
on_signal() {
  [[ -z $asked ]] || return 0
  asked=yes
  say "told to stop: the run saves, and the job goes back into the queue"
  [[ ! -d $partial ]] || touch "$partial/stop"
  if [[ -n $step ]]; then
    (sleep "$SAVE_SECONDS" && kill -TERM "$step") &
    watch=$!
  fi
}

latest() { cat "$partial/checkpoints/latest" 2>/dev/null || echo none; }

requeue() {
  say "back into the queue, to go on from $(latest)"
  scontrol requeue "$SLURM_JOB_ID" && sleep 60
  # Only where the site forbids it: had it worked, this shell would be gone.
  refuse "job $SLURM_JOB_ID: cannot go back into the queue (JobRequeue of this Slurm, or" \
    "--no-requeue); the same sbatch line goes on from $(latest)"
}

# Counts this start; stops a job that only goes round.
check_progress() {
  local starts=$run/slurm/starts here same
  here="$SLURM_JOB_ID $(latest)"
  echo "$here" >>"$starts"
  same=$(grep -cxF "$here" "$starts")
  ((same <= STARTS_AT_ONE_PLACE)) ||
    refuse "job $SLURM_JOB_ID: began $same times at checkpoint $(latest), at most" \
      "$STARTS_AT_ONE_PLACE are allowed without a new one; mend what the log says of the last" \
      "starts (or lower train.save_every), and submit again: it goes on from there"
}

check_world() {
  local nodes=${recipe[nodes]} gpus=${recipe[gpus_per_node]} given=${SLURM_GPUS_PER_NODE:-0}
  # "h100:8" is 8.
  given=${given##*:}
  [[ $SLURM_JOB_NUM_NODES = "$nodes" ]] ||
    refuse "--nodes=$SLURM_JOB_NUM_NODES: the recipe has parallel.nodes=$nodes; submit with" \
      "--nodes=$nodes (slurm/chain.sh does), or set parallel.nodes and what it divides"
  [[ $given = "$gpus" || ${recipe[device]} = cpu ]] ||
    refuse "--gpus-per-node=$given: the recipe has parallel.gpus_per_node=$gpus; submit with" \
      "--gpus-per-node=$gpus (slurm/chain.sh does), or set parallel.gpus_per_node"
}

check_inputs() {
  local stage
  for stage in ${recipe[finetune.inputs]}; do
    [[ ${recipe[$stage.state]} = "done" ]] ||
      refuse "${recipe[$stage.folder]}: stage $stage is ${recipe[$stage.state]}; it must be done" \
        "before training; run slurm/chain.sh $experiment ${rest[*]}"
  done
}

# train_job EXPERIMENT [key=value ...]; experiment=NAME among the keys takes EXPERIMENT's place.
train_job() {
  experiment=$1
  shift
  rest=()
  local key code before
  for key; do
    if [[ $key = experiment=* ]]; then experiment=${key#*=}; else rest+=("$key"); fi
  done
  [[ -n ${SLURM_JOB_ID:-} ]] ||
    refuse "this is no Slurm job; submit it by slurm/chain.sh $experiment, or run on this" \
      "machine: $python pipeline/run.py experiment=$experiment ${rest[*]}"
  cd "$root"
  # shellcheck source=slurm/env.sh
  source slurm/env.sh
  read_recipe "experiment=$experiment" "${rest[@]}" ||
    refuse "the recipe cannot be trained as above; once that is mended: slurm/chain.sh" \
      "$experiment ${rest[*]}"
  run=${recipe[run]}
  partial=$run/finetune.partial
  check_world
  check_inputs
  check_writable "$run/slurm"
  read_container
  check_progress
  trap on_signal USR1
  # Left where an earlier start was killed between the signal and its save.
  rm -f "$partial/stop"
  say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start ${SLURM_RESTART_COUNT:-0}, from $(latest)"
  while [[ -z $asked ]]; do
    launch slurm/preflight.py "$run" "${recipe[device]}" || {
      [[ -z $asked ]] || break
      refuse "the pre-flight failed: see the node that it names above; submit again with" \
        "--exclude=NODE, or mend it"
    }
    [[ -z $asked ]] || break
    before=$(latest)
    code=0
    launch pipeline/run.py stage=finetune "experiment=$experiment" "${rest[@]}" || code=$?
    if ((code == 0)); then
      say "trained"
      exit 0
    fi
    [[ -z $asked ]] || break
    if [[ -e $partial/stopped ]]; then
      say "stopped by $partial/stop, saved as $(latest); the same sbatch line goes on"
      exit 75
    fi
    # A rank died. The same rule as on one machine: again, where there is something new to go on.
    [[ $(latest) != "$before" ]] ||
      refuse "training failed with code $code and no checkpoint since its start; mend what is" \
        "said above, and submit again: it goes on from $(latest)"
    say "training failed with code $code; all ranks start again from $(latest)"
  done
  [[ -z $watch ]] || kill "$watch" 2>/dev/null || true
  [[ ! -e $partial/stop ]] || say "not saved in time: the last checkpoint is $(latest)"
  requeue
}
