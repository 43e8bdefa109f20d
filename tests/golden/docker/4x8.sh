#!/bin/bash
# One of 4 containers of a run. `pipeline launch` wrote this file and writes it anew;
# what it says comes from the run's config.yaml (cluster, docker).
set -euo pipefail

node=${1:-none}
if [[ ! $node =~ ^(0|[1-9][0-9]*)$ ]] || ((node >= 4)); then
  echo "node $node: give the number of this machine, 0 to 3, each once; 0 has the address that all are told" >&2
  exit 2
fi

mkdir -p -- /shared/runs/first /nvme/cache /nvme/scratch
exec docker run \
  --rm --label=pipeline.run=/shared/runs/first --stop-timeout=150 \
  --user=1000:1000 --read-only --tmpfs=/tmp:mode=1777 --cap-drop=ALL --security-opt=no-new-privileges \
  --ulimit=memlock=-1 --ulimit=stack=67108864 --gpus=all \
  --shm-size=8g \
  --network=host \
  --mount=type=bind,source=/nvme/scratch,target=/scratch \
  --mount=type=bind,source=/shared/runs/first,target=/shared/runs/first \
  --mount=type=bind,source=/nvme/cache,target=/cache \
  --mount=type=bind,source=/etc/site,target=/etc/site,readonly \
  --mount=type=bind,source=/nvme,target=/nvme \
  --env=PIPELINE_TARGET=docker \
  --env=NCCL_SOCKET_IFNAME=ib0 \
  --env=GLOO_SOCKET_IFNAME=ib0 \
  --env=MASTER_ADDR=node1 \
  --env=MASTER_PORT=29400 \
  --env=PIPELINE_NODE="$node" \
  --env=WANDB_API_KEY \
  --env=AWS_SECRET_ACCESS_KEY \
  --env-file=/home/me/secrets.env \
  --device=/dev/infiniband \
  pipeline train /shared/runs/first/config.yaml
