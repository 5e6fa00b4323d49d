"""The planner: what a plan knows, and plans that agree with docs/planning.md."""

import dataclasses
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import pytest

from hybridnorm_jax.commands import plan as command
from hybridnorm_jax.commands.main import main
from hybridnorm_jax.errors import ConfigError, UserError
from hybridnorm_jax.planning import compilation, plan_table, topologies
from hybridnorm_jax.planning import plan_report as report
from hybridnorm_jax.planning.compilation import plan, read_config
from hybridnorm_jax.planning.topologies import parse_topology

REPOSITORY = Path(__file__).parents[2]
# study_gpu says how another configuration is trained, and has no model to plan.
CONFIGS = sorted(file for file in (REPOSITORY / "configs").glob("*.yaml") if file.stem != "study_gpu")
TABLE = REPOSITORY / "docs" / "planning.md"
TINY = ["model.d_model=64", "model.num_heads=2", "model.num_layers=3", "model.mlp_dim=128", "train.seq_len=128"]
QUICKSTART, MOE_QUICKSTART = (str(REPOSITORY / "configs" / f"{name}.yaml") for name in ("quickstart", "moe_quickstart"))


# ---- plans


@cache
def _simulated(gigabytes, *arguments):
    return plan(read_config([QUICKSTART, *TINY, *arguments]), parse_topology(f"gpu:8x{gigabytes}GB"))


@pytest.fixture
def simulated(monkeypatch):
    """A plan on this process's eight devices, as GPUs of so many GB."""
    monkeypatch.setattr(compilation, "devices_of", lambda _: jax.devices())
    return _simulated


def test_a_plan_for_gpus_knows_shares_and_says_what_it_does_not_know(simulated):
    whole, split = simulated(80), simulated(80, "mesh.data=2", "mesh.fsdp=4")
    assert whole.parameters == whole.parameters_per_device == split.parameters
    assert split.parameters / 4 <= split.parameters_per_device < split.parameters / 3.5  # all but the norms
    assert split.memory.arguments < whole.memory.arguments / 3
    assert 0 <= split.memory.arguments - split.state_bytes < 16 * split.config.tokens_per_step
    assert "all-gather" not in whole.collectives.kinds
    assert split.collectives.kinds["all-gather"].bytes > 0
    # Once per step and device, every gradient is summed over all devices; the rest are scalars of the metrics.
    gradients = 4 * whole.parameters
    assert gradients <= whole.collectives.kinds["all-reduce"].bytes < gradients + 4096
    assert whole.fits is None
    assert "unknown" in report.text(whole)
    assert "CPU devices stand for the GPUs" in report.text(whole)
    assert report.as_json(split)["memory_per_device"]["temporaries"] == split.memory.temporaries
    assert (whole.roofline, whole.most_mfu) == (None, None)  # nobody knows which GPU it is


@pytest.mark.usefixtures("simulated")
def test_the_parameters_of_norms_are_counted(monkeypatch):
    # They are counted before anything is compiled, so this compiler gives up at once.
    monkeypatch.setattr(compilation, "compile_within_memory", lambda lowered, **options: (None, "no room"))
    keys = ("model.scheme=pre", "model.tie_embeddings=true")
    plain, gated = (
        plan(read_config([QUICKSTART, *TINY, *keys, *more]), parse_topology("gpu:8x80GB"))
        for more in ((), ("model.norm=gated", "model.learned_embedding_scale=true"))
    )
    # Of the seven norms of three layers two matrices each, which no mesh splits, and the scale of the embedding.
    assert gated.parameters - plain.parameters == 7 * 2 * 64 * 16 + 1


def test_what_does_not_hold_the_state_does_not_fit(simulated):
    small = dataclasses.replace(simulated(80), topology=parse_topology("gpu:8x0.0001GB"))
    assert small.fits is False
    assert "no: the state alone needs" in report.text(small)


SPLIT = ("mesh.data=1", "mesh.fsdp=8", "model.scheme=pre")
IN_A_LOOP = ("model.scan_unroll=1",)


@pytest.mark.parametrize("setting", [IN_A_LOOP, pytest.param((), marks=pytest.mark.long)], ids=["loop", "as usual"])
def test_layers_send_what_their_number_says(setting, simulated):
    sent = [simulated(80, *SPLIT, *setting, f"model.num_layers={layers}").collectives for layers in (3, 5, 7)]
    gathered = [found.kinds["all-gather"].bytes for found in sent]
    assert gathered[1] - gathered[0] == gathered[2] - gathered[1] > 0
    assert [found.unknown_loops for found in sent] == [0, 0, 0]


def test_layers_compute_what_their_number_says(simulated):
    """The products of the layers grow by the same with every layer; the loss's stay.

    In a loop: XLA for CPUs leaves some products without a name, and there the loop says whose they are.
    """
    counts = [simulated(80, *SPLIT, *IN_A_LOOP, f"model.num_layers={layers}").counts for layers in (3, 5, 7)]
    for part, each in (("layers forward", 1), ("layers backward", 1), ("loss", 0), ("optimizer", 0), ("rest", 0)):
        flops = [found.product_flops[part] for found in counts]
        assert flops[1] - flops[0] == flops[2] - flops[1]
        assert (flops[1] > flops[0]) == bool(each)
    assert all(not found.unknown_loops and not found.unknown_kernels for found in counts)


def test_a_batch_that_the_mesh_does_not_divide_is_refused(simulated):
    with pytest.raises(ConfigError, match=r"train.batch_size / train.grad_accumulation: 4 sequences"):
        simulated(80, "train.batch_size=4")


def test_the_model_flops_are_those_of_mfu(simulated):
    found = simulated(80)
    assert found.model_flops == found.model_flops_per_token * found.config.train.batch_size * 128


def test_a_compiler_that_gives_up_is_quoted_in_one_line(monkeypatch):
    def give_up(lowered, **options):
        raise jax.errors.JaxRuntimeError("INTERNAL: Couldn't find output tile sizes that satisfy hlo: %dot.504\n\tmore")

    monkeypatch.setattr(compilation, "compile_within_memory", give_up)
    with pytest.raises(UserError, match=r"^the compiler gives up on this program: INTERNAL: .* %dot\.504$"):
        compilation._compile(None, dumped=False)


def test_data_files_may_be_missing():
    assert read_config([str(REPOSITORY / "configs" / "151m.yaml")]).data.files == ("not-read",)
    with pytest.raises(ConfigError, match="scheem"):
        read_config([QUICKSTART, "model.scheem=pre"])


# ---- the command


def run(*arguments):
    """The command in a process of its own, as JAX has not started there."""
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    line = [sys.executable, "-m", "hybridnorm_jax", "plan", *arguments]
    return subprocess.run(line, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.long
def test_the_command_simulates_gpus():
    done = run(QUICKSTART, *TINY, "mesh.tensor=2", "--topology", "2xgpu:2x80GB", "--json")
    assert done.returncode == command.UNKNOWN, done.stderr
    found = json.loads(done.stdout)
    assert (found["devices"], found["mesh"]["data"], found["mesh"]["tensor"]) == (4, 2, 2)
    assert (found["attention"], found["fits"], found["simulated"]) == ("xla", None, True)


def test_flags_for_cpus_do_not_end_a_plan_for_tpus(monkeypatch):
    """libtpu reads XLA_FLAGS too, and ends the process at a flag that it does not have."""
    pytest.importorskip("libtpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_gpu_of_another_version=1")
    code = "import sys; from hybridnorm_jax.planning.topologies import devices_of, parse_topology; "
    code += "print(len(devices_of(parse_topology('v6e:2x2'))))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "4\n"), done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v5e:1x1"], "name a configuration"),
        ([QUICKSTART, "--topology", "v5e:3x3"], "no such slice"),
        ([QUICKSTART, "model.scheem=pre", "--topology", "gpu:8x80GB"], "did you mean 'model.scheme'?"),
        (["nowhere.yaml", "--topology", "gpu:8x80GB"], "nowhere.yaml"),
        (["--table", "docs/planning.md", QUICKSTART, "model.scheme=pre"], "as they are"),
        (["--table", "README.md", QUICKSTART], "between which the table is written"),
    ],
)
def test_wrong_input_ends_in_one_line(arguments, message, capsys):
    assert main(["plan", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert (printed.err.count("\n"), printed.out) == (1, "")


@pytest.mark.parametrize(("topology", "extra"), [("v5e:1x1", "tpu"), ("h100:1", "plan-gpu")])
def test_a_missing_compiler_is_named(topology, extra, monkeypatch, capsys):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda _: None)
    assert main(["plan", QUICKSTART, "--topology", topology]) == 2
    assert f"pip install 'hybridnorm-jax[{extra}]'" in capsys.readouterr().err


def test_a_file_without_a_topology_needs_one(tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("model: {d_model: 64, num_heads: 2}\n")
    assert main(["plan", str(file)]) == 2
    assert "# Topology: v5p:4x4x4" in capsys.readouterr().err


# ---- docs/planning.md


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_configuration_fits_the_topology_it_names(file):
    rows = plan_table.read_table(TABLE)
    topology = command.meant_for(file)
    assert str(parse_topology(topology)) == topology
    row = rows[plan_table.row_name(file.stem, topology)]
    assert (row["topology"], row["fits"]) == (topology, "yes")
    config = read_config([str(file)])
    assert row["sequences"].startswith(f"{config.train.grad_accumulation} x ") == (config.train.grad_accumulation > 1)


def test_rows_are_written_and_read_again(tmp_path):
    file = tmp_path / "table.md"
    file.write_text(f"before\n\n{plan_table.BEGIN}\n{plan_table.END}\n\nafter\n")
    rows = {
        f"{name} h100:8": dict.fromkeys(plan_table.COLUMNS, "1") | {"configuration": name, "topology": "h100:8"}
        for name in ("b", "a")
    }
    plan_table.write_table(file, rows)
    found = plan_table.read_table(file)
    assert (found, list(found)) == (rows, ["a h100:8", "b h100:8"])
    content = file.read_text()
    assert (content.startswith("before\n\n"), content.endswith("\n\nafter\n")) == (True, True)
    file.write_text(content.replace("| a |", "| a | more |"))
    with pytest.raises(UserError, match="a row of its table has 16 cells, not 15"):
        plan_table.read_table(file)
    file.write_text("no marks")
    with pytest.raises(UserError, match="between which the table is written"):
        plan_table.write_table(file, rows)


# ---- the TPU compiler


@pytest.mark.parametrize(
    ("file", "topology", "mesh", "names"),
    [
        (QUICKSTART, "v5p:2x2x1", ["mesh.data=1", "mesh.fsdp=-1"], {"splash_mha_fwd_residuals"}),
        (
            MOE_QUICKSTART,
            "v6e:2x2",
            ["mesh.expert=4"],
            {"splash_mha_fwd_residuals", "experts_hidden", "experts_d_hidden"},
        ),
        (QUICKSTART, "2xv5e:2x2", ["mesh.replica=2"], {"splash_mha_fwd_residuals"}),
    ],
)
def test_the_step_compiles_for_tpu_with_its_kernels(file, topology, mesh, names):
    pytest.importorskip("libtpu")
    done = run(file, "model.num_layers=2", "model.dtype=bfloat16", *mesh, "--topology", topology, "--json")
    assert (done.returncode, done.stderr) == (command.FITS, "")
    found = json.loads(done.stdout)
    assert names <= set(found["pallas_kernels"])
    assert found["collectives_per_step_and_device"]
    assert ("all-reduce between slices" in found["collectives_per_step_and_device"]) == (found["slices"] > 1)
    assert found["loops_of_unknown_length"] == 0


@pytest.mark.slow
def test_what_has_no_room_does_not_fit():
    pytest.importorskip("libtpu")
    done = run(QUICKSTART, "train.batch_size=65536", "--topology", "v5e:1x1", "--json")
    assert (done.returncode, done.stderr) == (command.DOES_NOT_FIT, "")
    found = json.loads(done.stdout)
    assert found["memory_per_device"] is None
    assert "exceeds available HBM (15.75G)" in found["refusal"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart", "moe_quickstart"])
def test_the_table_holds(name):
    pytest.importorskip("libtpu")
    file = REPOSITORY / "configs" / f"{name}.yaml"
    row = plan_table.read_table(TABLE)[plan_table.row_name(name, command.meant_for(file))]
    done = run(str(file), "--json")
    assert (done.returncode, done.stderr) == (command.FITS, "")
    found = json.loads(done.stdout)
    # The same compiler allocates the same; the table has three digits. Another one may need more or less.
    tolerance = 0.005 if row["made"].endswith(f", {found['versions']}") else 0.2
    counts = found["counts_per_step_and_device"]
    flops = sum(counts["product_flops"].values()) + sum(counts["kernel_flops"].values())
    for column, number in {
        "peak": found["memory_per_device"]["peak"] / 2**30,
        "TFLOP": flops / 1e12,
        "memory": sum(counts["memory_bytes"].values()) / 2**30,
    }.items():
        assert number == pytest.approx(float(row[column]), rel=tolerance), column


# ---- the GPU compiler


@pytest.mark.parametrize(
    ("arguments", "attention", "kernels"),
    [
        ([QUICKSTART, "mesh.data=1", "mesh.fsdp=-1"], "cudnn", set()),
        (
            [MOE_QUICKSTART, "mesh.expert=4", "data.segment_ids=true"],
            "flash",
            {
                "flash_forward",
                "flash_d_query",
                "flash_d_key_value",
                "experts_hidden",
                "experts_outputs",
                "experts_d_hidden",
                "experts_d_rows",
                "experts_d_input_kernels",
                "experts_d_output_kernels",
            },
        ),
    ],
)
def test_the_step_compiles_for_gpus_that_are_not_here(arguments, attention, kernels):
    pytest.importorskip("jax_plugins.xla_cuda13")
    done = run(*arguments, "model.num_layers=2", "model.dtype=bfloat16", "--topology", "2xh100:2", "--json")
    assert (done.returncode, done.stderr) == (command.FITS, "")
    found = json.loads(done.stdout)
    assert (found["attention"], found["devices"], found["slices"]) == (attention, 4, 2)
    assert set(found["pallas_kernels"]) == kernels
    counts = found["counts_per_step_and_device"]
    assert (counts["unknown_kernels"], counts["unknown_loops"]) == ([], [])
    assert min(counts["product_flops"]["layers forward"], counts["kernel_flops"]["layers forward"]) > 0
    assert min(counts["sent_inside"], counts["sent_between"]) > 0
    assert set(found["roofline_seconds"]) == {"arithmetic", "HBM", "NVLink", "network"}
    assert 0 < found["upper_bound_mfu"] < 1


def test_with_fsdp_other_work_runs_beside_every_gathering_of_parameters():
    pytest.importorskip("jax_plugins.xla_cuda13")
    setting = ["model.num_layers=4", "model.dtype=bfloat16", "train.batch_size=64", "mesh.data=1", "mesh.fsdp=8"]
    done = run(QUICKSTART, *setting, "--topology", "h100:8", "--json")
    assert (done.returncode, done.stderr) == (command.FITS, "")
    alone = json.loads(done.stdout)["collectives_without_overlap"]
    assert [name for name in alone if name.startswith("all-gather")] == []


@pytest.mark.slow
def test_what_is_too_large_for_a_gpu_compiles_and_does_not_fit():
    pytest.importorskip("jax_plugins.xla_cuda13")
    done = run(QUICKSTART, "train.batch_size=65536", "--topology", "h100:1", "--json")
    assert done.returncode == command.DOES_NOT_FIT, done.stderr  # XLA says there that it cannot make it smaller
    found = json.loads(done.stdout)
    assert found["memory_per_device"]["peak"] > found["usable_memory_per_device"]
