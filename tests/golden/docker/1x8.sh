#!/bin/bash
# The container of a run. `pipeline launch` wrote this file and writes it anew;
# what it says comes from the run's config.yaml (cluster, docker).
set -euo pipefail
mkdir -p -- /home/me/lab/runs/first /nvme/scratch
exec docker run \
  --rm --label=pipeline.run=/home/me/lab/runs/first --stop-timeout=150 \
  --user=1000:1000 --read-only --tmpfs=/tmp:mode=1777 --cap-drop=ALL --security-opt=no-new-privileges \
  --ulimit=memlock=-1 --ulimit=stack=67108864 --gpus=all \
  --shm-size=8g \
  --mount=type=bind,source=/nvme/scratch,target=/scratch \
  --mount=type=bind,source=/home/me/lab/runs/first,target=/scratch/runs/first \
  --mount=type=bind,source=/home/me/lab/shards/digits,target=/scratch/shards/digits,readonly \
  --mount=type=bind,source=/etc/site,target=/etc/site,readonly \
  --mount=type=bind,source=/nvme,target=/nvme \
  --env=PIPELINE_TARGET=docker \
  --env=WANDB_API_KEY \
  --env=AWS_SECRET_ACCESS_KEY \
  --env-file=/home/me/secrets.env \
  pipeline train runs/first/config.yaml
