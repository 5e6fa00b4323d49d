#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster that xpk (github.com/AI-Hypercomputer/xpk) has made:
#
#   launch/xpk.sh 550m key=value ...                               train, or resume the run
#   DRY_RUN=1 launch/xpk.sh 550m key=value ...                     xpk shows what it would do
#
# xpk runs pods on the host's network and as the image's user, so the nodes' own service account needs the rights to
# RUN_DIR, and the image is to be built with RUN_AS=0: the devices of a TPU are root's. docs/clusters.md explains more.
set -euo pipefail

CLUSTER=${CLUSTER:-}            # as `xpk cluster list` names it
PROJECT=${PROJECT:-}            # empty: gcloud's own
ZONE=${ZONE:-}                  # empty: gcloud's own
RUN_NAME=${RUN_NAME:-}          # of the workload and of the run; the same name resumes
RUN_DIR=${RUN_DIR:-}            # run.dir: gs://BUCKET/runs
IMAGE=${IMAGE:-}                # built from Dockerfile with EXTRA=tpu and RUN_AS=0
TPU_TYPE=${TPU_TYPE:-}          # of one slice, such as v6e-64 or v5p-256
SLICES=${SLICES:-1}             # mesh.replica is to be a multiple of it
DRY_RUN=${DRY_RUN:-}

if [ $# -eq 0 ]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
for name in CLUSTER RUN_NAME RUN_DIR IMAGE TPU_TYPE; do
    if [ -z "${!name}" ]; then
        echo "error: $name is not set: $name=... launch/xpk.sh" >&2
        exit 2
    fi
done
command -v xpk >/dev/null || { echo "error: xpk is not installed: pip install xpk" >&2; exit 2; }

options=(
    "--cluster=$CLUSTER" "--workload=$RUN_NAME" "--docker-image=$IMAGE" "--tpu-type=$TPU_TYPE" "--num-slices=$SLICES"
    # 75: told to stop, and saved; 76: train.stall_exit; 1: a fault. Not 2, an error in the input. xpk adds 127 to 255.
    --max-restarts=50 "--restart-on-exit-codes=1,75,76" --termination-grace-period-seconds=300
)
if [ -n "$PROJECT" ]; then options+=("--project=$PROJECT"); fi
if [ -n "$ZONE" ]; then options+=("--zone=$ZONE"); fi
if [ -n "$DRY_RUN" ]; then options+=(--dry-run); fi

# Quoted for the shell of the pod. exec: SIGTERM is for hybridnorm, which then saves.
command=$(printf '%q ' exec hybridnorm train "$@" "run.name=$RUN_NAME" "run.dir=$RUN_DIR")distributed.initialize=true
xpk workload create "${options[@]}" "--command=$command"
