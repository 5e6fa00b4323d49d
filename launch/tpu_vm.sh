#!/usr/bin/env bash
# Trains on a Cloud TPU VM slice that exists already, of one host or many. Run it on your own machine:
#
#   launch/tpu_vm.sh install                                       copy the commit to every host and install it
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
FILES=${FILES:-}                        # a directory with plugins and configurations; on the hosts it is files/

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

# copy FILE: put a file of this machine into the home directory on every host.
copy() {
    gcloud compute tpus tpu-vm scp "$1" "$TPU_NAME:$(basename "$1")" "${FLAGS[@]}" --worker=all
}

install() {
    local repository
    repository=$(dirname "$0")/..
    git -C "$repository" archive --format=tar.gz --output="$SCRATCH/hybridnorm_jax.tar.gz" HEAD
    if [ -n "$(git -C "$repository" status --porcelain)" ]; then
        echo "note: the hosts get the commit; changes that are not committed stay here (FILES=DIRECTORY sends files)" >&2
    fi
    copy "$SCRATCH/hybridnorm_jax.tar.gz"
    on all "set -e
        mkdir -p $here
        rm -rf $here/hybridnorm_jax $here/configs
        tar -xzf hybridnorm_jax.tar.gz -C $here
        cd $here
        $PYTHON -m venv .venv || { echo 'install $PYTHON and its venv module first' >&2; exit 1; }
        .venv/bin/python -m pip install --quiet --upgrade pip
        .venv/bin/python -m pip install --quiet -e '.[tpu]'"
}

# What is not in the repository. The hosts get it anew at every start, so that what was deleted here is gone there.
send_files() {
    [ -n "$FILES" ] || return 0
    tar -czf "$SCRATCH/hybridnorm_files.tar.gz" -C "$FILES" .
    copy "$SCRATCH/hybridnorm_files.tar.gz"
    on all "set -e
        rm -rf $here/files
        mkdir -p $here/files
        tar -xzf hybridnorm_files.tar.gz -C $here/files"
}

# The arguments of `hybridnorm train`, quoted for a shell on the host.
quoted() {
    printf '%q ' "$@" "run.dir=$RUN_DIR" distributed.initialize=true
}

# The log and the process id stay on each host; standard input is closed, so the end of the connection ends nothing.
start() {
    on all "set -e
        cd $here
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
if [ -n "$FILES" ] && [ ! -d "$FILES" ]; then
    echo "error: FILES=$FILES: must be a directory" >&2
    exit 2
fi
mapfile -t FLAGS < <(flags)
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT

here=$(printf %q "$REMOTE")
case $action in
    install) install ;;
    start)
        need RUN_DIR
        [ $# -ge 1 ] || usage
        send_files
        start "$@"
        ;;
    dry-run)
        need RUN_DIR
        [ $# -ge 1 ] || usage
        send_files
        on all "cd $here && .venv/bin/hybridnorm train $(quoted "$@") --dry-run"
        ;;
    status) on all "cd $here && kill -0 \$(cat train.pid) 2>/dev/null && echo \"\$(hostname): training\" ||
        { echo \"\$(hostname): not training\"; tail -n 2 train.log; }" ;;
    log) on 0 "tail -n 50 -f $here/train.log" ;;
    # SIGTERM: all processes agree on a step, save, and end with status 75.
    stop) on all "kill -TERM \$(cat $here/train.pid)" ;;
esac
