#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, as the JobSet in gke_jobset.yaml. Run it where kubectl knows the cluster:
#
#   launch/gke.sh start   550m key=value ...                       train, or resume the run
#   launch/gke.sh dry-run 550m key=value ...                       compile only; prints mesh, batches and memory
#   launch/gke.sh render  550m key=value ...                       print the JobSet, and apply nothing
#   launch/gke.sh status | log | stop                              its pods; the first pod's log; stop and save
#
# The variables below say where; docs/clusters.md explains them, and what the cluster must have.
set -euo pipefail

RUN_NAME=${RUN_NAME:-}                      # of the JobSet and of the run; the same name resumes
RUN_DIR=${RUN_DIR:-}                        # run.dir: gs://BUCKET/runs
DATA_BUCKET=${DATA_BUCKET:-}                # mounted at /data, read-only
IMAGE=${IMAGE:-}                            # built from Dockerfile with EXTRA=tpu
ACCELERATOR=${ACCELERATOR:-tpu-v6e-slice}   # tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice
TOPOLOGY=${TOPOLOGY:-}                      # of one slice, such as 8x8
SLICES=${SLICES:-1}                         # mesh.replica is to be a multiple of it
CHIPS_PER_HOST=${CHIPS_PER_HOST:-4}
SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-trainer} # of Kubernetes, allowed to use both buckets
FILES=${FILES:-}                            # a directory with plugins and configurations; on the pods it is files/

template=$(dirname "$0")/gke_jobset.yaml
variables=(RUN_NAME IMAGE ACCELERATOR TOPOLOGY SLICES HOSTS CHIPS_PER_HOST SERVICE_ACCOUNT DATA_BUCKET QUOTED)

fail() {
    echo "error: $1" >&2
    exit 2
}

usage() {
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

need() {
    local name
    for name; do
        [ -n "${!name}" ] || fail "$name is not set: $name=... launch/gke.sh"
    done
}

installed() {
    command -v "$1" >/dev/null || fail "$1 is not installed"
}

check() {
    need RUN_NAME RUN_DIR DATA_BUCKET IMAGE TOPOLOGY
    # The names of pods are those of the JobSet with 20 characters more, and may have 63.
    [[ $RUN_NAME =~ ^[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
        fail "RUN_NAME=$RUN_NAME: must be at most 40 small letters, digits and '-'"
    [[ $RUN_DIR == gs://?* ]] || fail "RUN_DIR=$RUN_DIR: all pods must see it: gs://BUCKET/runs"
    # A number that begins with 0 would be octal for bash, and one of 20 digits another one.
    [[ $TOPOLOGY =~ ^[1-9][0-9]{0,3}(x[1-9][0-9]{0,3}){1,2}$ ]] || fail "TOPOLOGY=$TOPOLOGY: must be such as 8x8 or 4x4x8"
    [[ $SLICES =~ ^[1-9][0-9]*$ ]] || fail "SLICES=$SLICES: must be a number from 1"
    [[ $CHIPS_PER_HOST =~ ^[1-9][0-9]*$ ]] || fail "CHIPS_PER_HOST=$CHIPS_PER_HOST: must be a number from 1"
    local chips=$((${TOPOLOGY//x/*}))
    [ $((chips % CHIPS_PER_HOST)) -eq 0 ] || fail "CHIPS_PER_HOST=$CHIPS_PER_HOST: must divide the $chips chips of TOPOLOGY"
    HOSTS=$((chips / CHIPS_PER_HOST))
    if [ -n "$FILES" ] && [ ! -d "$FILES" ]; then fail "FILES=$FILES: must be a directory"; fi
}

# The JobSet with the arguments of `hybridnorm train`; every one of them is quoted for the shell in the pod.
render() {
    local name listed=""
    QUOTED=$(printf '%q ' "$@" "run.name=$RUN_NAME" "run.dir=$RUN_DIR")distributed.initialize=true
    export QUOTED HOSTS
    for name in "${variables[@]}"; do
        export "${name?}"
        listed+="\${$name} "
    done
    envsubst "$listed" <"$template"
}

start() {
    if [ -n "$(kubectl get jobset "$RUN_NAME" --ignore-not-found --output=name)" ]; then
        fail "there is a JobSet $RUN_NAME already: launch/gke.sh stop deletes it, the run stays"
    fi
    if [ -n "$FILES" ]; then
        kubectl create configmap "$RUN_NAME-files" --from-file="$FILES" --dry-run=client --output=yaml |
            kubectl apply --filename=-
    else # those of a start before would be mounted
        kubectl delete configmap "$RUN_NAME-files" --ignore-not-found
    fi
    render "$@" | kubectl apply --filename=-
}

[ $# -ge 1 ] || usage
action=$1
shift
case $action in
    start | dry-run | render)
        [ $# -ge 1 ] || usage
        check
        installed envsubst
        ;;
    status | log | stop) need RUN_NAME ;;
    *) usage ;;
esac
[ "$action" = render ] || installed kubectl

case $action in
    start) start "$@" ;;
    dry-run) start "$@" --dry-run ;;
    render) render "$@" ;;
    status)
        kubectl get jobset "$RUN_NAME"
        kubectl get pods --selector="jobset.sigs.k8s.io/jobset-name=$RUN_NAME"
        ;;
    log)
        selector=jobset.sigs.k8s.io/jobset-name=$RUN_NAME,jobset.sigs.k8s.io/job-index=0
        kubectl logs --follow --container=train --tail=50 \
            --selector="$selector,batch.kubernetes.io/job-completion-index=0"
        ;;
    # All pods get SIGTERM: the processes agree on a step and save within the grace period.
    stop)
        kubectl delete jobset "$RUN_NAME"
        kubectl delete configmap "$RUN_NAME-files" --ignore-not-found
        ;;
esac
