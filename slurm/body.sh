# shellcheck shell=bash
# The body that the scripts of this folder share; they source it with a config and overrides. See docs/slurm.md.
#
# Hooks, all of them environment variables (sbatch --export=ALL,NAME=VALUE):
#   SETUP=FILE            sourced first: `module load`, proxies, ...
#   VENV=FOLDER           a venv to activate; the project's .venv where that exists and nothing else is named
#   CONDA_ENV=NAME        or a conda environment
#   CONTAINER="COMMAND"   or a prefix that runs a command inside: apptainer exec --nv image.sif
#   RANKS_PER_NODE=N      processes a node; one a GPU (one, without GPUs) if not given
#   RDZV_ADDRESS=ADDRESS  where nodes meet; the first node's NodeAddr if not given
#   MAX_REQUEUES=N        how often this script requeues its job; 20 if not given
#   PREFLIGHT=0|1         python -m launch.doctor before the run; on several nodes unless 0
#   TORCHRUN="OPTIONS"    further options of torchrun: --max-restarts=2
set -uo pipefail
: "${project:?is set by the script that sources this}"

say() {
    printf '%s slurm job %s: %s\n' "$(date +%FT%T)" "$SLURM_JOB_ID" "$*"
    [ -z "${logs:-}" ] || printf '%s slurm job %s: %s\n' "$(date +%FT%T)" "$SLURM_JOB_ID" "$*" >>"$logs/$SLURM_JOB_ID.log"
}

end_with() {
    local code=$1
    shift
    say "$*"
    exit "$code"
}

activate() {
    if [ -n "${SETUP:-}" ]; then
        # shellcheck source=/dev/null
        . "$SETUP" || end_with 2 "error: SETUP = $SETUP: it failed; fix it, or name another file"
    fi
    if [ -n "${CONDA_ENV:-}" ]; then
        { eval "$(conda shell.bash hook)" && conda activate "$CONDA_ENV"; } ||
            end_with 2 "error: CONDA_ENV = $CONDA_ENV: could not be activated; see conda env list"
    elif [ -n "${VENV:-}" ] || { [ -z "${CONTAINER:-}" ] && [ -e "$project/.venv/bin/activate" ]; }; then
        # shellcheck source=/dev/null
        . "${VENV:-$project/.venv}/bin/activate" ||
            end_with 2 "error: VENV = ${VENV:-}: no venv there; make one with python -m venv, or name another"
    fi
    [ ! -d "$project/distributed" ] || export PYTHONPATH="$project${PYTHONPATH:+:$PYTHONPATH}" # else the package is installed
    export PYTHONUNBUFFERED=1
}

inside() {
    # CONTAINER is words, not one word.
    # shellcheck disable=SC2086
    ${CONTAINER:-} "$@"
}

# bash runs a trap only when the child in the foreground has ended, so every long child runs behind and is waited for.
step="" signal="" begun=0
# shellcheck disable=SC2317 # traps call it
forward() {
    [ "$signal" = TERM ] || signal=$1
    [ -n "$step" ] || return 0
    kill -s "$1" "$step" 2>/dev/null
    # srun drops what comes before its tasks run, so a young step is told again, if the first time did not end it.
    if [ $((SECONDS - begun)) -lt 5 ]; then
        (sleep 5; kill -s "$1" "$step" 2>/dev/null) &
    fi
}

on_every_node() {
    [ -z "$signal" ] || return 1
    begun=$SECONDS
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="$cpus" \
        --kill-on-bad-exit=0 --wait=300 --open-mode=append --output="${logs//%/%%}/%j-%N.log" "$@" &
    step=$!
    [ -z "$signal" ] || forward "$signal" # which came in between
    local code
    wait "$step"
    code=$?
    while kill -0 "$step" 2>/dev/null; do # a trap ended the wait, not the step
        wait "$step"
        code=$?
    done
    step=""
    return "$code"
}

main() {
    [ -n "${SLURM_JOB_ID:-}" ] || { echo "error: this is a batch script; submit it: sbatch $(readlink -f "$0") ..." >&2; exit 2; }
    trap 'forward USR1' USR1
    trap 'forward TERM' TERM
    activate
    local folder head address plan run port ranks
    # Where the job's folder is missing, Slurm starts it in /tmp.
    folder=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *WorkDir=//p' | head -n 1)
    [ -z "$folder" ] || [ . -ef "$folder" ] || export JOB_FOLDER_MISSING="$folder"
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    address=${RDZV_ADDRESS:-$(scontrol -o show node "$head" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')}

    # Everything that can be wrong ends here, before any node works; it would repeat, so there is no requeue.
    plan=$(mktemp) || end_with 1 "error: no temporary file could be made; see df"
    inside python -m launch.slurm.plan "${address:-$head}" "$@" >"$plan" || { rm -f "$plan"; end_with 2 "not started, see above"; }
    mapfile -d '' -t facts <"$plan"
    rm -f "$plan"
    [ "${#facts[@]}" -gt 0 ] || exit 0 # finished before
    run=${facts[0]} address=${facts[1]} port=${facts[2]} ranks=${facts[3]} cpus=${facts[4]}
    logs=$run/slurm
    mkdir -p "$logs" || end_with 2 "error: run_dir = $run: cannot be written; give another with --run_dir"
    scontrol update "jobid=$SLURM_JOB_ID" "comment=$(inside python -m launch.slurm.requeue begin "$run" "$SLURM_JOB_ID")" || true
    say "attempt $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST, $ranks processes a node, meeting at $address:$port;" \
        "run folder $run, logs $logs/$SLURM_JOB_ID-*.log"

    if [ "${PREFLIGHT:-$((SLURM_JOB_NUM_NODES > 1))}" != 0 ]; then
        preflight "$address" "$port" "${facts[@]:5}"
    fi
    on_every_node bash "$project/slurm/node.sh" "$address" "$port" "$ranks" "${facts[@]:5}"
    decide "$run" "$?"
}

preflight() {
    local address=$1 port=$2
    shift 2
    if [ -n "${CONTAINER:-}" ]; then
        say "no preflight: it calls srun, which is not there inside CONTAINER; try: srun $CONTAINER python -m launch.doctor.probe"
        return
    fi
    python -m launch.doctor --address "$address" --port "$port" "$@" >>"$logs/$SLURM_JOB_ID.log" 2>&1 &
    step=$!
    wait "$step"
    local code=$?
    while kill -0 "$step" 2>/dev/null; do
        wait "$step"
        code=$?
    done
    step=""
    if [ "$code" != 0 ] && [ -z "$signal" ]; then
        scontrol update "jobid=$SLURM_JOB_ID" "comment=preflight: $(grep '^no go' "$logs/$SLURM_JOB_ID.log" | tail -n 1)"
        end_with 2 "error: the preflight says no go, see $logs/$SLURM_JOB_ID.log; PREFLIGHT=0 goes on without it"
    fi
}

# Slurm starts a job anew while the script of a node that it lost lives on; that one must neither write nor requeue.
succeeded() {
    local told
    told=$(scontrol -o show job "$SLURM_JOB_ID") || return 0
    [ "$signal" != TERM ] && [[ $told != *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]
}

decide() {
    local run=$1 code=$2 verdict reason comment
    if succeeded; then
        end_with 75 "another attempt of this job has begun, or Slurm cannot be asked; this one ends"
    fi
    { read -r verdict; read -r code; read -r reason; read -r comment; } < <(
        inside python -m launch.slurm.requeue end "$run" "$SLURM_JOB_ID" --signal "$signal"
    )
    say "${reason:-the ending could not be told; not requeued}"
    scontrol update "jobid=$SLURM_JOB_ID" "comment=${comment:-}" || true
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
        inside python -m launch.summary "$(dirname "$run")" || true
    fi
    if [ "${verdict:-}" = requeue ]; then
        trap '' TERM USR1 # which the requeue sends to this script
        scontrol requeue "$SLURM_JOB_ID" || end_with 75 "error: not requeued, see above; the same sbatch goes on from here"
    fi
    exit "${code:-1}"
}

main "$@"
