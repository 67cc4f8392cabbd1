#!/bin/bash
# Starts torchrun on one node: slurm/node.sh ADDRESS PORT RANKS [ARGUMENTS OF distributed.train]; srun runs it on each node.
set -uo pipefail
address=$1 port=$2 ranks=$3
shift 3

if [ -z "${RANKS_PER_NODE:-}" ] && [ "${SLURM_GPUS_ON_NODE:-$ranks}" -lt "$ranks" ]; then
    echo "error: ${SLURMD_NODENAME:-this node} has $SLURM_GPUS_ON_NODE GPUs of this job, but the first node has $ranks;" \
        "request the same number on each: --gpus-per-node=N" >&2
    exit 2
fi

# By default Gloo uses the address of the host's name, which many systems map to loopback, and torchrun publishes that
# name. Both get the address from which this node reaches the first one instead.
# shellcheck disable=SC2086
{ read -r own; read -r interface; } < <(${CONTAINER:-} python -m launch.address "$address")
[ -z "${interface:-}" ] || export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$interface}"

# How long a save may take after a warning. Older versions of torchrun ignore this variable and wait 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}

# torchrun on the first node serves four connections per process.
files=$(ulimit -Sn)
if [ "$files" != unlimited ] && [ "$files" -lt 65536 ]; then
    ulimit -Sn 65536 2>/dev/null || ulimit -Sn "$(ulimit -Hn)" || true
fi

# A SIGUSR1 that torchrun does not handle would kill it and orphan its workers. is_host: the first node hosts the
# rendezvous; otherwise torchrun compares host names, which fails if a node has several. CONTAINER and TORCHRUN are split
# into words on purpose.
# shellcheck disable=SC2086
exec ${CONTAINER:-} python -m torch.distributed.run --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$ranks" \
    --rdzv-backend=c10d --rdzv-endpoint="$address:$port" --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    --rdzv-conf="is_host=$((SLURM_NODEID == 0)),join_timeout=300" ${own:+--local-addr="$own"} \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 ${TORCHRUN:-} -m distributed.train "$@"
