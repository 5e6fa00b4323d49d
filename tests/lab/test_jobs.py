"""A comparison as jobs of a cluster, one for each combination."""

import subprocess

import yaml

from hybridnorm_jax.commands.main import main


def test_a_slurm_array_trains_each_combination_by_its_number(arguments, tmp_path, capsys):
    assert main(["lab", "compare", *arguments, "--emit-jobs=slurm"]) == 0
    file = tmp_path / "lab/jobs.sbatch"
    assert f"Next: sbatch {file}" in capsys.readouterr().out
    text = file.read_text()
    assert "#SBATCH --array=0-3\n" in text
    assert subprocess.run(["bash", "-n", file], check=False).returncode == 0
    # The script itself, with programs of ours in the place of SLURM's and Python.
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for name, body in {
        "srun": '"$@"; exit $?',
        "python": f'printf "%s\\n" "$@" > {tmp_path}/asked; exit 75',
        "scontrol": f'echo "$@" > {tmp_path}/requeued',
    }.items():
        (bin_dir / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin_dir / name).chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "71"}
    environment = {"PATH": f"{bin_dir}:/usr/bin:/bin", "PYTHON": str(bin_dir / "python"), **slurm}
    assert subprocess.run(["bash", file], env=environment, check=False).returncode == 75
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[:4] == ["-m", "hybridnorm_jax", "lab", "compare"]
    assert asked[4:] == [*arguments, "distributed.initialize=false", "--only=3"]
    assert (tmp_path / "requeued").read_text() == "requeue 71_3\n"


def test_a_jobset_has_a_pod_for_each_combination(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["lab", "compare", *arguments, "run.dir=gs://bucket/runs", "--emit-jobs=jobset"]) == 0
    (job,) = yaml.safe_load((tmp_path / "jobs.yaml").read_text())["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (4, 4, "Indexed")
    (script,) = spec["template"]["spec"]["containers"][0]["args"]
    assert "'schemes=[pre,post]'" in script
    assert '--only="$JOB_COMPLETION_INDEX"' in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
