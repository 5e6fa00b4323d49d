#!/usr/bin/env bash
# Trains on a Cloud TPU VM slice that exists already, of one host or many. Run it on your own machine:
#
#   launch/tpu_vm.sh install                                       copy this repository to every host and install it
#   launch/tpu_vm.sh start   550m key=value ...                    train, or resume the run
#   launch/tpu_vm.sh dry-run 550m key=value ...                    compile only; prints mesh, batches and memory
#   launch/tpu_vm.sh status | log | stop                           is it running; the first host's log; stop and save
#
# It makes and deletes no TPU. `start` again with the same arguments resumes the run. docs/clusters.md explains more.
set -euo pipefail

TPU_NAME=${TPU_NAME:-}                  # of the TPU VM, which must be READY
ZONE=${ZONE:-}                          # its zone, such as us-east5-a
PROJECT=${PROJECT:-}                    # empty: gcloud's own
RUN_DIR=${RUN_DIR:-}                    # run.dir, which all hosts must see: gs://BUCKET/runs
REMOTE=${REMOTE:-hybridnorm_jax}        # directory on the hosts, in the home of the user who logs in
PYTHON=${PYTHON:-python3.11}            # on the hosts; 3.11 or newer

usage() {
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

need() {
    if [ -z "${!1}" ]; then
        echo "error: $1 is not set: $1=... launch/tpu_vm.sh" >&2
        exit 2
    fi
}

flags() {
    printf '%s\n' "--zone=$ZONE"
    if [ -n "$PROJECT" ]; then printf '%s\n' "--project=$PROJECT"; fi
}

# on WORKER COMMAND: run a shell command on one host, or on all.
on() {
    gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${FLAGS[@]}" --worker="$1" --command="$2"
}

install() {
    local archive
    archive=$(mktemp -d)
    # Bound now: when the trap runs, the local variable is gone.
    # shellcheck disable=SC2064
    trap "rm -rf '$archive'" EXIT
    git -C "$(dirname "$0")/.." archive --format=tar.gz --output="$archive/hybridnorm_jax.tar.gz" HEAD
    gcloud compute tpus tpu-vm scp "$archive/hybridnorm_jax.tar.gz" "$TPU_NAME:hybridnorm_jax.tar.gz" "${FLAGS[@]}" \
        --worker=all
    on all "set -e
        mkdir -p $(printf %q "$REMOTE")
        tar -xzf hybridnorm_jax.tar.gz -C $(printf %q "$REMOTE")
        cd $(printf %q "$REMOTE")
        $PYTHON -m venv .venv || { echo 'install $PYTHON and its venv module first' >&2; exit 1; }
        .venv/bin/python -m pip install --quiet --upgrade pip
        .venv/bin/python -m pip install --quiet -e '.[tpu]'"
}

# The arguments of `hybridnorm train`, quoted for a shell on the host.
quoted() {
    printf '%q ' "$@" "run.dir=$RUN_DIR"
}

# The log and the process id stay on each host; standard input is closed, so the end of the connection ends nothing.
start() {
    on all "set -e
        cd $(printf %q "$REMOTE")
        if [ -f train.pid ] && kill -0 \$(cat train.pid) 2>/dev/null; then
            echo \"\$(hostname): already training\" >&2; exit 1
        fi
        nohup setsid .venv/bin/hybridnorm train $(quoted "$@") >> train.log 2>&1 < /dev/null &
        echo \$! > train.pid
        echo \"\$(hostname): started\""
}

[ $# -ge 1 ] || usage
action=$1
shift
case $action in
    install | start | dry-run | status | log | stop) ;;
    *) usage ;;
esac
command -v gcloud >/dev/null || { echo "error: gcloud is not installed: cloud.google.com/sdk" >&2; exit 2; }
need TPU_NAME
need ZONE
mapfile -t FLAGS < <(flags)

here=$(printf %q "$REMOTE")
case $action in
    install) install ;;
    start)
        need RUN_DIR
        [ $# -ge 1 ] || usage
        start "$@"
        ;;
    dry-run)
        need RUN_DIR
        [ $# -ge 1 ] || usage
        on all "cd $here && .venv/bin/hybridnorm train $(quoted "$@") --dry-run"
        ;;
    status) on all "cd $here && kill -0 \$(cat train.pid) 2>/dev/null && echo \"\$(hostname): training\" ||
        { echo \"\$(hostname): not training\"; tail -n 2 train.log; }" ;;
    log) on 0 "tail -n 50 -f $here/train.log" ;;
    # SIGTERM: all processes agree on a step, save, and end with status 75.
    stop) on all "kill -TERM \$(cat $here/train.pid)" ;;
esac
