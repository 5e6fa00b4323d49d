"""A comparison as separate jobs of a cluster, one for each combination: a SLURM array, or a JobSet for GKE."""

import dataclasses
import re
import shlex
from pathlib import Path

from hybridnorm_jax.config_fields import check_choice
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.lab.compare_options import Comparison

# {...} are filled in; the shell's own braces are doubled.
SLURM = """#!/usr/bin/env bash
# {count} runs, one job each, from the repository's directory on a file system that all nodes share:
#
#   sbatch {file}
#   sbatch --array=0-3 {file}        only some of them
#
# Options given to sbatch replace these. The same command again skips what has a result and resumes the rest.
#SBATCH --job-name=lab
#SBATCH --array=0-{last}
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.log
# The run gets SIGTERM five minutes before its time is up: it saves and ends with status 75.
#SBATCH --signal=TERM@300
set -euo pipefail

PYTHON=${{PYTHON:-.venv/bin/python}}      # with the extras [gpu,lab] installed
cd "${{SLURM_SUBMIT_DIR:?this is for sbatch, see the first lines}}"

status=0
srun "$PYTHON" -m hybridnorm_jax lab compare {arguments} \\
    distributed.initialize=false --only="$SLURM_ARRAY_TASK_ID" || status=$?
if [ "$status" -eq 75 ]; then
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
fi
exit "$status"
"""

JOBSET = """# {count} runs on GKE, one TPU host each; run.dir must be a bucket. Set the variables, then apply:
#
#   export SOURCE=https://github.com/OWNER/hybridnorm_jax.git REVISION=main
#   export ACCELERATOR=tpu-v5-lite-podslice TOPOLOGY=2x4 CHIPS=8
#   export SERVICE_ACCOUNT=trainer          # of Kubernetes, allowed to use the bucket (Workload Identity)
#   envsubst '$SOURCE $REVISION $ACCELERATOR $TOPOLOGY $CHIPS $SERVICE_ACCOUNT' < {file} | kubectl apply -f -
#
# Applied again after `kubectl delete jobset {name}` it skips what has a result and resumes the rest.
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {name}
spec:
  replicatedJobs:
    - name: run
      replicas: 1
      template:
        spec:
          completionMode: Indexed
          completions: {count}
          parallelism: {count}
          # How often one run may be preempted, or fail, before it is given up.
          backoffLimitPerIndex: 20
          maxFailedIndexes: {count}
          podFailurePolicy:
            rules:
              # 2 is the status of an error in the input: a restart would end the same way.
              - action: FailIndex
                onExitCodes:
                  containerName: train
                  operator: In
                  values: [2]
          template:
            spec:
              restartPolicy: Never
              serviceAccountName: ${{SERVICE_ACCOUNT}}
              terminationGracePeriodSeconds: 300
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: ${{ACCELERATOR}}
                cloud.google.com/gke-tpu-topology: ${{TOPOLOGY}}
              tolerations:
                - key: google.com/tpu
                  operator: Exists
                  effect: NoSchedule
              containers:
                - name: train
                  image: python:3.12
                  command: [bash, -euc]
                  args:
                    - |
                      git clone --quiet "${{SOURCE}}" /train
                      cd /train
                      git checkout --quiet "${{REVISION}}"
                      python -m pip install --quiet --root-user-action=ignore -e '.[tpu]'
                      # exec makes SIGTERM reach the run, which then saves.
                      exec hybridnorm lab compare {arguments} \\
                        distributed.initialize=false --only="$JOB_COMPLETION_INDEX"
                  resources:
                    limits:
                      google.com/tpu: ${{CHIPS}}
"""


@dataclasses.dataclass(frozen=True)
class JobKind:
    """A kind of jobs.

    Attributes:
      file: the name of the file that describes them.
      template: its text.
      next_step: what to do with it.
    """

    file: str
    template: str
    next_step: str


KINDS = {
    "slurm": JobKind(file="jobs.sbatch", template=SLURM, next_step="sbatch {file}"),
    "jobset": JobKind(file="jobs.yaml", template=JOBSET, next_step="see the first lines of {file}"),
}


def emit(asked: Comparison, kind: str) -> str:
    """Write the jobs into the comparison's directory, or into the current one where that is in a bucket.

    Args:
      kind: slurm or jobset.

    Returns:
      Lines that say which file was written and what to do next.

    Raises:
      ConfigError: there is no such kind, or the run.dir of a JobSet is not in a bucket.
    """
    check_choice("--emit-jobs", kind, KINDS)
    is_in_bucket = asked.directory.startswith("gs://")
    directory = Path(asked.directory)
    if kind == "jobset" and not is_in_bucket:
        raise ConfigError(f"run.dir={directory.parent}: pods share no disk; a JobSet needs run.dir=gs://...")
    jobs = KINDS[kind]
    # sbatch and kubectl read local files only.
    file = Path(jobs.file) if is_in_bucket else directory / jobs.file
    count = asked.parts
    text = jobs.template.format(
        file=file,
        count=count,
        last=count - 1,
        name=re.sub(r"[^a-z0-9]+", "-", directory.name.lower())[:40].strip("-"),
        arguments=shlex.join(asked.arguments),
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return f"{file}: {count} jobs\nNext: {jobs.next_step.format(file=file)}"
