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
# Seconds for all nodes to meet before one is given up, and for each to say that it is there.
MEET_SECONDS=300
ANSWER_SECONDS=60
# Seconds between a failure and what follows.
SETTLE_SECONDS=5

asked=
step=
launches=0

# train_job EXPERIMENT [key=value ...]; experiment=NAME among the keys takes EXPERIMENT's place.
train_job() {
  local key
  experiment=$1
  rest=()
  for key in "${@:2}"; do
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
  # Left where an earlier start was killed between the signal and its save.
  rm -f "$partial/stop"
  trap on_signal USR1
  until train; do
    # The rule of one machine, where it is pipeline/workers.py's: all ranks start again.
    say "training failed, and starts again from $(latest)"
  done
  say "trained"
}

# One start of all ranks; fails where another one may follow in this job.
train() {
  check_progress
  say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start ${SLURM_RESTART_COUNT:-0}, from $(latest)"
  launch && return
  [[ -z $asked ]] || requeue
  if [[ -e $partial/stopped ]]; then
    say "stopped by $partial/stop, saved as $(latest); the same sbatch line goes on"
    exit 75
  fi
  # Preempted or on a failed node, the job is Slurm's again, which ends this shell before long.
  sleep "$SETTLE_SECONDS"
  while [[ $(squeue -h -j "$SLURM_JOB_ID" -o %T) != RUNNING ]]; do sleep 1; done
  # Slurm may need minutes to see that a node is dead.
  timeout "$ANSWER_SECONDS" srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 true || {
    say "not every node answers"
    requeue
  }
  return 1
}

# One srun task a node, each a torchrun agent that starts the node's ranks, which check what they
# were given and then train.
launch() {
  local nodes=$SLURM_JOB_NUM_NODES head port code=0
  launches=$((launches + 1))
  # The first name of the list; scontrol knows the list's short form.
  read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  # Below the ports that the kernel gives away, another one for every job and every start.
  port=$((20000 + (SLURM_JOB_ID * 10 + launches) % 10000))
  # Who holds the store is said (torchrun reads PET_*), and not guessed from names and addresses. A
  # task sees all of its node's cores, which srun would else cut to one.
  # shellcheck disable=SC2016
  srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    --cpus-per-task="$SLURM_CPUS_ON_NODE" --cpu-bind=none "${container[@]}" \
    bash -c 'export PET_RDZV_CONF="is_host=$((SLURM_NODEID == 0)),join_timeout=$0"; exec "$@"' \
    "$MEET_SECONDS" "$python" -m torch.distributed.run --nnodes="$nodes" \
    --nproc-per-node="${recipe[gpus_per_node]}" --max-restarts=0 --rdzv-backend=c10d \
    --rdzv-endpoint="$head:$port" --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}-$launches" \
    slurm/preflight.py "$run" "${recipe[device]}" "${recipe[checkpoint_room]}" \
    pipeline/run.py stage=finetune "experiment=$experiment" "${rest[@]}" &
  step=$!
  # Told before there was a step to end.
  [[ -z $asked ]] || kill -TERM "$step"
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
  [[ -n $step ]] || return 0
  (
    for ((second = 0; second < SAVE_SECONDS; second++)); do
      kill -0 "$step" 2>/dev/null || exit 0
      # A run that just begins has no folder yet, and would take one that it finds for another's.
      [[ ! -d $partial/checkpoints ]] || touch "$partial/stop"
      sleep 1
    done
    kill -TERM "$step"
  ) &
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
    refuse "job $SLURM_JOB_ID: began $STARTS_AT_ONE_PLACE times at checkpoint $(latest), and" \
      "wrote no new one; mend what the log says of these starts (or lower train.save_every)," \
      "and submit again: it goes on from there"
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
