#!/bin/bash
# One torchrun on this node: slurm/node.sh ADDRESS PORT RANKS [ARGUMENTS OF distributed.train]; srun starts it on each node.
set -uo pipefail
address=$1 port=$2 ranks=$3
shift 3

# Gloo takes the address of the host's name, which many systems map to loopback; torchrun publishes that name too. So both
# are told by which address this node reaches the first one.
# shellcheck disable=SC2086
{ read -r own; read -r interface; } < <(${CONTAINER:-} python -m launch.address "$address")
[ -z "${interface:-}" ] || export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$interface}"

# How long a save may take after a warning, where torchrun can be told (2.15; older ones wait 30 s).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}

# SIGUSR1 not named here would kill torchrun and leave its workers behind. The first node hosts the rendezvous: by comparing
# names torchrun finds that out itself, except where a node has several. CONTAINER and TORCHRUN are words, not one word.
# shellcheck disable=SC2086
exec ${CONTAINER:-} python -m torch.distributed.run --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$ranks" \
    --rdzv-backend=c10d --rdzv-endpoint="$address:$port" --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    --rdzv-conf="is_host=$((SLURM_NODEID == 0)),join_timeout=300" ${own:+--local-addr="$own"} \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 ${TORCHRUN:-} -m distributed.train "$@"
