# What train_*.sh do in their job: check, train, save before the end, go back into the queue.
# shellcheck shell=bash
# shellcheck disable=SC2154,SC2164
# (`root` is set, and errors end the shell, by the script that sources this.)
# shellcheck source=slurm/common.sh
source "$root/slurm/common.sh"

# Seconds that the ranks have to save once asked; the rest of --signal's 600 is for the requeue.
SAVE_SECONDS=480
# A shorter time limit leaves hardly anything of a job to --signal's 600 seconds and the start.
SHORT_MINUTES=15
# How often one job may fail at the same checkpoint: what fails there thrice fails for ever.
FAILURES_AT_ONE_PLACE=3
# Seconds for all nodes to meet before one is given up, and for each to say that it is there.
MEET_SECONDS=300
ANSWER_SECONDS=60
# Seconds between a failure and what follows.
SETTLE_SECONDS=5

asked=
step=
launches=0
partial=

# USR1 (--signal, or a preemption where the site has preempt_send_user_signal) and TERM: the run
# saves at the next step's edge. Where it does not in time, it is ended all the same, or the time
# limit would end the job before it is back in the queue.
on_signal() {
  [[ -z $asked ]] || return 0
  asked=yes
  say "asked to stop: the run saves, and the job goes back into the queue"
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
# First of all: without it, a signal while the recipe is read ends the job.
trap on_signal USR1 TERM

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
      "machine: $(quoted "$python" pipeline/run.py "experiment=$experiment" "${rest[@]}")"
  cd "$root"
  # shellcheck source=slurm/env.sh
  source slurm/env.sh
  read_recipe "experiment=$experiment" "${rest[@]}" || {
    [[ -z $asked || $(job_state) = RUNNING ]] || exit 75
    refuse "the recipe cannot be trained as above; once that is mended:" \
      "$(quoted slurm/chain.sh "$experiment" "${rest[@]}")"
  }
  run=${recipe[run]}
  partial=$run/finetune.partial
  check_world
  check_inputs
  check_writable "$run/slurm"
  check_time
  read_container
  # Left where an earlier start was killed between the signal and its save.
  rm -f "$partial/stop"
  until train; do
    # The rule of one machine, where it is pipeline/workers.py's: all ranks start again.
    say "training failed, and starts again from $(latest)"
  done
  say "trained"
}

# One start of all ranks; fails where another one may follow in this job.
train() {
  begun=$(latest)
  [[ -z $asked ]] || requeue
  say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start ${SLURM_RESTART_COUNT:-0}, from $begun"
  if launch; then
    # Renamed where training has finished.
    [[ -d $partial ]] || return 0
    [[ -n $asked || ! -e $partial/stopped ]] || {
      say "stopped by $partial/stop, saved as $(latest); the same sbatch line goes on"
      exit 75
    }
    # By a signal: Slurm sends the steps of a preempted job SIGTERM, and this shell nothing.
    requeue
  fi
  [[ -z $asked ]] || requeue
  # Preempted or on a failed node, the job is Slurm's again, which ends this shell before long.
  sleep "$SETTLE_SECONDS"
  while [[ -z $asked && $(job_state) != RUNNING ]]; do sleep 1; done
  if [[ -n $asked ]] || being_preempted; then requeue; fi
  # Slurm may need minutes to see that a node is dead.
  timeout "$ANSWER_SECONDS" srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --export=ALL \
    true || {
    say "not every node answers"
    requeue
  }
  check_progress
  return 1
}

# One srun task a node, each a launcher that starts the node's ranks, which check what they were
# given and then train.
launch() {
  local nodes=$SLURM_JOB_NUM_NODES head port code=0
  launches=$((launches + 1))
  # The first name of the list; scontrol knows the list's short form.
  read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  # Below the ports that the kernel gives away, another one for every job and every start.
  port=$((20000 + (SLURM_JOB_ID * 10 + launches) % 10000))
  # A task sees all of its node's cores, which srun would else cut to one, and this shell's
  # environment, which SBATCH_EXPORT=NONE would else keep from it.
  # torchrun's id of this start, under which ranks talk in its store: random and in no process list.
  PET_RDZV_ID=$(</proc/sys/kernel/random/uuid)
  export PET_RDZV_ID
  srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=1 --export=ALL \
    --cpus-per-task="$SLURM_CPUS_ON_NODE" --cpu-bind=none "${container[@]}" \
    "$python" slurm/launch.py --nnodes="$nodes" --nproc-per-node="${recipe[gpus_per_node]}" \
    --max-restarts=0 --rdzv-backend=c10d --rdzv-endpoint="$head:$port" \
    --rdzv-conf="join_timeout=$MEET_SECONDS" \
    slurm/preflight.py "$run" "${recipe[device]}" "${recipe[checkpoint_room]}" \
    "${recipe[cluster.min_node_gbps]}" "${recipe[cluster.min_gbps]}" \
    pipeline/run.py stage=finetune "experiment=$experiment" "${rest[@]}" &
  step=$!
  # Asked before there was a step to end.
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

latest() { cat "$partial/checkpoints/latest" 2>/dev/null || echo none; }

# Of a job whose shell runs, Slurm knows one; it may not answer for a while.
job_state() {
  local state
  until state=$(squeue -h -j "$SLURM_JOB_ID" -o %T) && [[ -n $state ]]; do
    sleep "$SETTLE_SECONDS"
  done
  echo "$state"
}

# Puts the job back into the queue, unless Slurm does that, or has cancelled it; never returns. The
# exit code is that of a stopped run, and nobody's: the job is no longer this shell's.
requeue() {
  if [[ $(job_state) != RUNNING ]]; then
    say "Slurm ends this job: saved is $(latest)"
    exit 75
  fi
  [[ $(latest) != "$begun" ]] || being_preempted || check_progress
  say "back into the queue, to go on from $(latest)"
  scontrol requeue "$SLURM_JOB_ID" && exit 75
  refuse "job $SLURM_JOB_ID: cannot go back into the queue (JobRequeue of this Slurm, or" \
    "--no-requeue); the same sbatch line goes on from $(latest)"
}

# Whether the partition's GraceTime runs, at whose end Slurm requeues the job.
being_preempted() {
  scontrol show job --oneliner "$SLURM_JOB_ID" | grep -q ' PreemptTime=[0-9]'
}

# Counts this failure, or a time limit that came before the first step; stops a job that only goes
# round. A preemption, a requeue by hand or a lost node end this shell, and are not counted.
check_progress() {
  local failures=$run/slurm/failures here same
  here="$SLURM_JOB_ID $(latest)"
  echo "$here" >>"$failures"
  same=$(grep -cxF "$here" "$failures")
  ((same < FAILURES_AT_ONE_PLACE)) ||
    refuse "job $SLURM_JOB_ID: failed $FAILURES_AT_ONE_PLACE times at checkpoint $(latest), and" \
      "wrote no new one; mend what the log says of these starts (or lower train.save_every," \
      "or raise the time limit), and submit again: it goes on from there"
}

check_time() {
  local end minutes
  # "Unknown" where there is no limit.
  end=$(date -d "$(squeue -h -j "$SLURM_JOB_ID" -o %e)" +%s 2>/dev/null) || return 0
  minutes=$(((end - $(date +%s)) / 60))
  ((minutes >= SHORT_MINUTES)) ||
    say "warning: the time limit ends this job in $minutes minutes, and the save begins 10" \
      "minutes before (--signal); a start takes minutes too: ask for $SHORT_MINUTES minutes at" \
      "least (cluster.train_time, SBATCH_TIMELIMIT or --time)"
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
        "before training; run $(quoted slurm/chain.sh "$experiment" "${rest[@]}")"
  done
}
