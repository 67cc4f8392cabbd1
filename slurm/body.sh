# shellcheck shell=bash
# The common body of the batch scripts in this folder; they source it with a config and settings. See docs/slurm.md.
#
# Hooks, all of them environment variables (sbatch --export=ALL,NAME=VALUE):
#   SETUP=FILE            sourced first: `module load`, proxies, ...
#   VENV=FOLDER           a venv to activate; default: the project's .venv, if no other environment is named
#   CONDA_ENV=NAME        or a conda environment
#   CONTAINER="COMMAND"   or a prefix that runs a command in a container, e.g. apptainer exec --nv image.sif
#   RANKS_PER_NODE=N      processes per node; default: one per GPU, or one without GPUs
#   RDZV_ADDRESS=ADDRESS  rendezvous address; default: the first node's NodeAddr
#   MAX_REQUEUES=N        how often this script may requeue its job; default: 20
#   PREFLIGHT=0|1         run python -m launch.doctor first; default: on several nodes
#   PREFLIGHT_SECONDS=N   how long it waits for all nodes, which may import torch at different speeds; default: 60
#   TORCHRUN="OPTIONS"    further options of torchrun, e.g. --max-restarts=2
set -uo pipefail
: "${project:?is set by the script that sources this}"
# A job that was submitted from within another inherits what Slurm does not set for it: array, restarts, options of steps.
if [ -n "${SLURM_JOB_ID:-}" ] && shown=$(scontrol -o show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 1p) && [ -n "$shown" ]; then
    [[ $shown == *" ArrayJobId="* ]] || unset "${!SLURM_ARRAY_@}"
    [[ ! $shown =~ \ Restarts=([0-9]+)\  ]] || export SLURM_RESTART_COUNT="${BASH_REMATCH[1]}"
fi
# Without them a step gets all GPUs of the job.
unset "${!SLURM_CPU_BIND@}" SLURM_GPU_BIND SLURM_GPUS SLURM_GPUS_PER_NODE SLURM_GPUS_PER_SOCKET SLURM_GPUS_PER_TASK \
    SLURM_TRES_PER_TASK SLURM_NTASKS_PER_GPU
memory=("${!SLURM_MEM_PER_@}") # srun accepts only one of CPU, GPU and NODE
[ "${#memory[@]}" -lt 2 ] || unset "${memory[@]}"
# One task of an array has the array's id as its job id; with it, scontrol would change all tasks.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-${SLURM_JOB_ID:-}}

logs=""
log() {
    printf '%s slurm job %s: %s\n' "$(date +%FT%T)" "$SLURM_JOB_ID" "$*"
    [ -z "$logs" ] || printf '%s slurm job %s: %s\n' "$(date +%FT%T)" "$SLURM_JOB_ID" "$*" >>"$logs/$SLURM_JOB_ID.log"
}

exit_with() {
    local code=$1
    shift
    log "$*"
    exit "$code"
}

set_comment() {
    scontrol update "jobid=$job" "comment=$1" || true
}

activate() {
    set +u # users' files may read variables that are not set
    if [ -n "${SETUP:-}" ]; then
        # shellcheck source=/dev/null
        . "$SETUP" || exit_with 2 "error: SETUP = $SETUP: it failed; fix it, or name another file"
    fi
    if [ -n "${CONDA_ENV:-}" ]; then
        { eval "$(conda shell.bash hook)" && conda activate "$CONDA_ENV"; } ||
            exit_with 2 "error: CONDA_ENV = $CONDA_ENV: could not be activated; see conda env list"
    elif [ -n "${VENV:-}" ] || { [ -z "${CONTAINER:-}" ] && [ -e "$project/.venv/bin/activate" ]; }; then
        # shellcheck source=/dev/null
        . "${VENV:-$project/.venv}/bin/activate" ||
            exit_with 2 "error: VENV = ${VENV:-}: no venv there; make one with python -m venv, or name another"
    fi
    [ ! -d "$project/distributed" ] || export PYTHONPATH="$project${PYTHONPATH:+:$PYTHONPATH}" # else it is installed
    export PYTHONUNBUFFERED=1
    export SLURM_EXPORT_ENV=ALL # else steps after `sbatch --export=NONE` would not get the environment set up here
    set -u
}

in_container() {
    # CONTAINER is split into words on purpose.
    # shellcheck disable=SC2086
    ${CONTAINER:-} "$@"
}

# bash delays a trap until the foreground child has ended, so every long command runs in the background under `wait`.
child="" signal="" child_start=0
# shellcheck disable=SC2317 # called by traps
forward() {
    [ "$signal" = TERM ] || signal=$1
    [ -n "$child" ] || return 0
    kill -s "$1" "$child" 2>/dev/null
    # srun drops signals that arrive before its tasks run, so a step younger than five seconds gets the signal twice.
    if [ $((SECONDS - child_start)) -lt 5 ]; then
        (sleep 5; kill -s "$1" "$child" 2>/dev/null) &
    fi
}

wait_for_child() {
    local code
    wait "$child"
    code=$?
    while kill -0 "$child" 2>/dev/null; do # a trap interrupted the wait
        wait "$child"
        code=$?
    done
    child=""
    return "$code"
}

run_on_every_node() {
    [ -z "$signal" ] || return 1
    child_start=$SECONDS
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="$cpus" \
        --kill-on-bad-exit=0 --wait=300 --open-mode=append --output="${logs//%/%%}/%j-%N.log" "$@" &
    child=$!
    [ -z "$signal" ] || forward "$signal" # it arrived before `child` was set
    wait_for_child
}

main() {
    [ -n "${SLURM_JOB_ID:-}" ] || { echo "error: this is a batch script; submit it: sbatch $(readlink -f "$0") ..." >&2; exit 2; }
    trap 'forward USR1' USR1
    trap 'forward TERM' TERM
    activate
    local folder head address plan run port ranks
    # On a node without the job's folder, Slurm starts the job in /tmp.
    folder=$(scontrol show job "$job" | sed -n 's/^ *WorkDir=//p' | head -n 1)
    [ -z "$folder" ] || [ . -ef "$folder" ] || export JOB_FOLDER_MISSING="$folder"
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    address=${RDZV_ADDRESS:-$(scontrol -o show node "$head" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')}

    # Input errors end the job here, before it uses any node. They would repeat, so it is not requeued.
    plan=$(mktemp) || exit_with 1 "error: no temporary file could be created; see df"
    in_container python -m launch.slurm.plan "${address:-$head}" "$@" >"$plan" ||
        { rm -f "$plan"; exit_with 2 "not started, see above"; }
    mapfile -d '' -t fields <"$plan"
    rm -f "$plan"
    [ "${#fields[@]}" -gt 0 ] || exit 0 # the run is finished
    run=${fields[0]} address=${fields[1]} port=${fields[2]} ranks=${fields[3]} cpus=${fields[4]}
    array_folder=${fields[5]} metric=${fields[6]}
    set -- "${fields[@]:7}"
    logs=$run/slurm
    mkdir -p "$logs" || exit_with 2 "error: run_dir = $run: not writable; give another with --run_dir"
    log "attempt $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST, processes per node: $ranks, rendezvous at" \
        "$address:$port; run folder $run, logs $logs/$SLURM_JOB_ID-*.log"

    if [ "${PREFLIGHT:-$((SLURM_JOB_NUM_NODES > 1))}" != 0 ] && [ -z "$signal" ]; then
        preflight "$address" "$port" "$@"
    fi
    set_comment "$(in_container python -m launch.slurm.requeue begin "$run" "$SLURM_JOB_ID")"
    run_on_every_node bash "$project/slurm/node.sh" "$address" "$port" "$ranks" "$@"
    finish "$run"
}

preflight() {
    local address=$1 port=$2 code
    shift 2
    if [ -n "${CONTAINER:-}" ]; then
        log "no preflight: it calls srun, which CONTAINER lacks; try: srun $CONTAINER python -m launch.doctor.probe"
        return
    fi
    python -m launch.doctor --address "$address" --port "$port" --seconds "${PREFLIGHT_SECONDS:-60}" "$@" >>"$logs/$SLURM_JOB_ID.log" 2>&1 &
    child=$!
    [ -z "$signal" ] || kill -s TERM "$child" # it arrived before `child` was set
    wait_for_child
    code=$?
    if [ "$code" != 0 ] && [ -z "$signal" ]; then
        set_comment "preflight: $(grep '^no go' "$logs/$SLURM_JOB_ID.log" | tail -n 1)"
        exit_with 2 "error: the preflight says no go, see $logs/$SLURM_JOB_ID.log; PREFLIGHT=0 skips it"
    fi
}

# After losing a node, Slurm restarts the job, but the old script may still run there. It must not write or requeue. A
# controller that is restarted answers again within a minute; without an answer this node may be the lost one.
is_superseded() {
    local shown deadline=$((SECONDS + 60))
    until shown=$(scontrol -o show job "$job"); do
        [ "$signal" != TERM ] && [ "$SECONDS" -lt "$deadline" ] || return 0
        sleep 5
    done
    [ "$signal" != TERM ] && [[ $shown != *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]
}

finish() {
    local run=$1 verdict code reason comment
    if is_superseded; then
        exit_with 75 "another attempt of this job has started, or Slurm does not answer; this one ends"
    fi
    { read -r verdict; read -r code; read -r reason; read -r comment; } < <(
        in_container python -m launch.slurm.requeue end "$run" "$SLURM_JOB_ID" --signal "$signal"
    )
    log "${reason:-no decision on a requeue; not requeued}"
    set_comment "${comment:-}"
    if [ -n "$array_folder" ] && [ "${verdict:-}" != requeue ]; then # there is no time for a table before a requeue
        in_container python -m launch.summary "$array_folder" ${metric:+--by "$metric"} || true
    fi
    if [ "${verdict:-}" = requeue ]; then
        trap '' TERM USR1 # the requeue sends them to this script
        scontrol requeue "$job" || exit_with 75 "error: not requeued, see above; the same sbatch command resumes"
    fi
    exit "${code:-1}"
}

main "$@"
