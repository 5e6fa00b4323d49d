"""A comparison trains what has no result yet, on one data order, and takes a divergence for a result."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from etils import epath
from planted_runs import Planted, plant
from small_comparisons import without

from hybridnorm_jax.commands.main import main
from hybridnorm_jax.evaluation.perplexity import Score
from hybridnorm_jax.lab import compare_options, trainer
from hybridnorm_jax.lab.run_data import read_data
from hybridnorm_jax.lab.run_files import write_object
from hybridnorm_jax.lab.runs import check_addition
from hybridnorm_jax.training.program import Program

pytestmark = pytest.mark.usefixtures("shared_programs")


class _KilledError(Exception):
    """Stands for SIGKILL."""


@pytest.fixture
def trained(monkeypatch):
    """Every step's (scheme, seed, step, tokens); NaN in post's batches of seed 0 from step 3 on; set `kill`."""
    steps, original = [], Program.train_step
    plan = {"kill": None}

    def step(self, state, batch):
        scheme, seed = self.config.model.scheme, self.config.train.seed
        at = (scheme, seed, int(state.step) + 1)
        if at == plan["kill"]:
            raise _KilledError
        steps.append((*at, batch["tokens"].copy()))
        if at[:2] == ("post", 0) and at[2] >= 3:
            batch = batch | {"weights": batch["weights"] * np.float32(np.nan)}
        return original(self, state, batch)

    monkeypatch.setattr(Program, "train_step", step)
    # What clears JAX's caches would take away what other tests compiled.
    monkeypatch.setattr(jax, "clear_caches", lambda: None)
    return steps, plan


def _results(tmp_path):
    return {file.parent.name: json.loads(file.read_text()) for file in tmp_path.glob("lab/*/result.json")}


def test_a_comparison_goes_on_after_a_divergence_and_after_a_kill(arguments, trained, tmp_path, capsys):
    steps, plan = trained
    plan["kill"] = ("post", 1, 5)  # post, seed 0 has diverged by then
    with pytest.raises(_KilledError):
        main(["lab", "compare", *arguments])
    results = _results(tmp_path)
    assert set(results) == {"pre-lr0.001-seed0", "pre-lr0.001-seed1", "post-lr0.001-seed0"}
    diverged = results["post-lr0.001-seed0"]
    assert (diverged["status"], diverged["step"], diverged["diverged_at"]) == ("diverged", 4, 4)
    assert diverged["scores"] == {}
    assert diverged["train_tokens"] == results["pre-lr0.001-seed0"]["train_tokens"] == 2000
    assert results["pre-lr0.001-seed0"]["status"] == "finished"
    assert results["pre-lr0.001-seed0"]["tokens"] == 6 * 64

    # The same data in the same order, whatever the scheme and the seed.
    orders = {}
    for scheme, seed, step, tokens in steps:
        orders.setdefault((scheme, seed), {})[step] = tokens
    for order in orders.values():
        for step, tokens in order.items():
            np.testing.assert_array_equal(tokens, orders["pre", 0][step])

    steps.clear()
    plan["kill"] = None
    capsys.readouterr()
    assert main(["lab", "compare", *arguments]) == 0
    assert [at[:3] for at in steps] == [("post", 1, 4), ("post", 1, 5), ("post", 1, 6)]
    last = _results(tmp_path)["post-lr0.001-seed1"]
    assert (last["status"], last["resumed_from"]) == ("finished", 3)
    told = capsys.readouterr().out
    assert "diverged 4" in told
    assert told.count("finished before") == 2
    assert f"lab report {tmp_path}/lab" in told
    asked = json.loads((tmp_path / "lab/comparison.json").read_text())
    assert asked["schemes"] == ["pre", "post"]
    assert asked["learning_rates"] == [1e-3]
    assert len(asked["commands"]) == 1

    steps.clear()
    assert main(["lab", "compare", *arguments, "--only=0"]) == 0
    assert steps == []
    capsys.readouterr()
    assert main(["lab", "compare", *arguments, "model.mlp_dim=32"]) == 2
    assert "holds another run (model.mlp_dim: saved 16, asked 32)" in capsys.readouterr().err


def test_a_result_of_another_configuration_is_refused_and_left(arguments, trained, tmp_path, capsys):
    one = [*without(arguments, "schemes", "seeds"), "schemes=[pre]", "seeds=[0]"]
    assert main(["lab", "compare", *one]) == 0
    run = tmp_path / "lab/pre-lr0.001-seed0"
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("batches: 1", "batches: 7"))
    assert main(["lab", "compare", *one]) == 0  # an edited config.yaml changes nothing beside a checkpoint
    (run / "config.yaml").write_text(config)

    # It was killed before its result was written: its checkpoint says with which keys it is scored.
    (run / "result.json").rename(tmp_path / "result.json")
    assert main(["lab", "compare", *one, "eval.batches=2"]) == 2
    assert f"{run} holds another run (eval.batches (1 and 2))" in capsys.readouterr().err
    (tmp_path / "result.json").rename(run / "result.json")

    shutil.rmtree(run / "checkpoints")  # as after a divergence before the first save
    saved = (run / "config.yaml").read_text()
    for argument, named in (
        ("model.mlp_dim=32", "model.mlp_dim: saved 16, asked 32"),
        ("eval.batches=2", "eval.batches (1"),
    ):
        assert main(["lab", "compare", *one, argument]) == 2
        assert named in capsys.readouterr().err
        assert (run / "config.yaml").read_text() == saved
    (run / "result.json").write_text("{}")
    assert main(["lab", "compare", *one]) == 2
    assert "result.json: status: must be" in capsys.readouterr().err


def test_a_comparison_whose_first_run_is_refused_leaves_nothing(arguments, tmp_path, capsys):
    assert main(["lab", "compare", *arguments, "train.watch_every=1", "train.watch_sequences=100"]) == 2
    assert "train.watch_sequences=100: must be at most" in capsys.readouterr().err
    assert not (tmp_path / "lab").exists()


@pytest.mark.parametrize(("name", "key"), [("tokens", "data.files"), ("held", "data.validation.held")])
def test_a_result_on_other_data_is_no_result_of_these(name, key, arguments, tmp_path, capsys):
    one = [*without(arguments, "schemes", "seeds"), "schemes=[pre]", "seeds=[0]"]
    assert main(["lab", "compare", *one]) == 0
    capsys.readouterr()
    np.save(tmp_path / f"{name}.npy", np.random.default_rng(9).integers(0, 61, 2000).astype(np.uint16))  # as large
    result = tmp_path / "lab/pre-lr0.001-seed0/result.json"
    before = result.read_text()
    assert main(["lab", "compare", *one]) == 2
    told = capsys.readouterr().err
    assert f"{key}: {name}.npy has another content than it had when {result} was saved; restore the data" in told
    assert result.read_text() == before


def test_runs_that_could_not_be_compared_with_those_beside_them_are_not_trained(arguments, trained, tmp_path, capsys):
    asked = compare_options.comparison(arguments)
    data = read_data(asked.configs[0])
    keys = tuple(without(arguments, "schemes", "seeds", "learning_rates", "run.dir", "run.name"))
    result = {"train_tokens": data.train_tokens, "data": data.files}
    plant(tmp_path / "lab", Planted("hybrid", loss=3.0, overrides=keys, result=result))
    check_addition(tmp_path / "lab", asked.configs, data, asked.command)

    other_files = result | {"data": {"data.files": [{"name": "tokens.npy", "size": 4128, "digest": "aa"}]}}
    for other, wrong in (
        (Planted("span", loss=3.0, overrides=(*keys, "eval.batches=2"), result=result), "eval.batches (1 and 2): such"),
        (Planted("span", loss=3.0, overrides=keys, result=other_files), "the files of data.files: runs on different"),
    ):
        path = plant(tmp_path / "lab", other)
        assert main(["lab", "compare", *arguments]) == 2
        told = capsys.readouterr().err
        assert f"{tmp_path}/lab: pre-lr0.001-seed0 and span-0.001-0 differ in {wrong}" in told
        assert told.endswith("cannot be compared; choose another run.name\n")
        shutil.rmtree(path)
    assert trained[0] == []


@pytest.mark.parametrize(
    ("before", "wrong"),
    [
        ("hybridnorm lab compare 'sweep=[1e-3,2e-3]'", "sweep (none and 0.001, 0.002)"),
        ("hybridnorm lab compare tokens=384", "tokens (none and 384)"),
    ],
)
def test_a_second_protocol_in_one_directory_is_refused_before_it_trains(
    before, wrong, arguments, trained, tmp_path, capsys
):
    """Also where a run of the first is one of those that are asked for now."""
    keys = tuple(without(arguments, "schemes", "seeds", "learning_rates", "run.dir", "run.name"))
    for name in ("elsewhere", "pre-lr0.001-seed0"):
        path = plant(tmp_path / "lab", Planted("pre", loss=3.0, overrides=keys, name=name, result={"command": before}))
        assert main(["lab", "compare", *arguments]) == 2
        told = capsys.readouterr().err
        assert f"were asked for with different {wrong}: runs of different protocols cannot be compared" in told
        shutil.rmtree(path)
    assert trained[0] == []


@pytest.mark.parametrize("losses", [[5.0, 4.0, 3.0, 2.0, 2.0, 2.0], [5.0, 4.0, 2.0, 3.0, 4.0, 5.0]])
def test_a_finite_run_may_have_diverged(losses, arguments, tmp_path, monkeypatch, capsys):
    """Training is replaced: metrics.jsonl says what became of it."""

    def train(config, **_):
        lines = [json.dumps({"step": 6, "train/losses": losses})]
        directory = tmp_path / "lab" / config.run.name
        directory.mkdir(exist_ok=True)
        (directory / "metrics.jsonl").write_text("\n".join(lines))
        return {"held": Score(float("nan") if config.train.seed else losses[-1], 1.0, None, 8)}

    monkeypatch.setattr(trainer, "train", train)
    assert main(["lab", "compare", *arguments]) == 0
    results = _results(tmp_path)
    assert results["pre-lr0.001-seed1"]["status"] == "diverged"  # a final loss that is not finite
    rises = losses[-1] > losses[2]
    expected = ("diverged", 3) if rises else ("finished", None)
    assert (results["pre-lr0.001-seed0"]["status"], results["pre-lr0.001-seed0"]["diverged_at"]) == expected
    assert "diverged" in capsys.readouterr().out


def test_jobs_that_write_at_once_do_not_disturb_each_other(tmp_path):
    file = epath.Path(tmp_path) / "comparison.json"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: [write_object(file, {"a": 1}) for _ in range(30)], range(4)))
    assert [path.name for path in tmp_path.iterdir()] == ["comparison.json"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("schemes=[pre,hybird]", "schemes=hybird: not known; did you mean 'hybrid'?"),
        ("seeds=[-1]", "seeds=[-1]: must be at least 0"),
        ("seeds=[0,0]", "seeds=[0, 0]: one of them is named twice"),
        ("learning_rates=[0.0]", "learning_rates=[0.0]: must be at least 1e-30"),
        ("learning_rates=0.1", "learning_rates=0.1: expected a list of numbers"),
        ("sweep=[0.1,0.2]", "sweep looks for the rates; name one of the two"),
        ("variants=[num_layers=2]", "variants=num_layers=2: must be key=value of a run"),
        ("variants=[model.scheme=pre]", "model.scheme=pre: schemes=[...] sets it here"),
        ("variants=[model.num_layer=2]", "model.num_layer"),
        ("variants=[model.num_layers=2,model.num_layers=2]", "one of them is named twice"),
        ('variants=["model.num_layers=\'2"]', "variants=model.num_layers='2: No closing quotation"),
        ('variants=[model.num_layers=2,"model.num_layers=2 "]', "pre-num_layers=2 and pre-num_layers=2 are the same"),
        ("variants=[model.num_layers=1,model.d_model=16]", "pre-num_layers=1 and pre-d_model=16 are the same runs"),
        ("variants=[train.steps=6,train.steps=7]", "pre-steps=7 differ in train.steps (6 and 7): such runs cannot be"),
        ("variants=[train.seq_len=4,train.seq_len=8]", "pre-seq_len=8 differ in train.seq_len (4 and 8)"),
        ("variants=[train.data_seed=1,train.data_seed=2]", "differ in train.data_seed (1 and 2)"),
        ("learning_rates=[1e-3,1.0000001e-3]", "pre-lr0.001-seed0: two runs have this name"),
        ("flops=0", "flops=0"),
        ("optimizer.warmup_steps=6", "train.steps=6: must be more than the 6 steps of warm-up"),
        ("model.scheme=pre", "model.scheme=pre: schemes=[...] sets it here"),
        ("optimizer.learning_rate=0.1", "learning_rates=[...] sets it here"),
        ("--only=4", "--only=4: must be in [0, 4), there are 4 combinations"),
        ("--only=x", "--only=x: must be the number of a combination"),
        ("--emit-jobs=pbs", "--emit-jobs=pbs: not known; known: jobset, slurm"),
        ("--emit-jobs=jobset", "pods share no disk; a JobSet needs run.dir=gs://..."),
        ("init_from=nowhere", "nowhere: no such directory; give a run's directory"),
        ("train.equivalent_form=pre_rmsnorm", "train.equivalent_form=pre_rmsnorm: model.norm=rmsnorm"),
    ],
)
def test_wrong_arguments_end_before_anything_is_trained(argument, message, arguments, trained, capsys):
    assert main(["lab", "compare", *arguments, argument]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert trained[0] == []


def test_no_such_command(capsys):
    assert main(["lab", "comapre"]) == 2
    assert "comapre: no such command; did you mean 'compare'?" in capsys.readouterr().err


def test_a_sweep_has_seeds_of_its_own_and_the_others_get_the_best_rate(arguments, tmp_path, monkeypatch, capsys):
    """Training is replaced: the loss is lowest at 2e-3. A second start trains nothing."""
    trained = []

    def train(config, **_):
        trained.append(config)
        (tmp_path / "lab" / config.run.name).mkdir(exist_ok=True)
        distance = abs(np.log2(config.optimizer.learning_rate / 2e-3))
        return {"held": Score(2.0 + distance + 0.001 * config.train.seed, 1.0, None, 8)}

    monkeypatch.setattr(trainer, "train", train)
    swept = [*without(arguments, "learning_rates"), "sweep=[1e-3,4e-3,2e-3]", "schemes=[post]"]
    assert main(["lab", "compare", *swept]) == 0
    assert [(config.optimizer.learning_rate, config.train.seed) for config in trained] == [
        *((rate, 100) for rate in (1e-3, 2e-3, 4e-3, 1.41e-3, 2.83e-3)),
        (2e-3, 0),
        (2e-3, 1),
    ]
    told = capsys.readouterr().out
    assert "post: of the learning rates 0.001, 0.00141, 0.002, 0.00283, 0.004 the best is 0.002\n" in told
    assert f"{'post':20}{0.002:>14g}{'2.0000':>14}{'2.0010':>14}" in told
    described = json.loads((tmp_path / "lab/comparison.json").read_text())
    assert (described["sweep"], described["sweep_seeds"]) == ([1e-3, 4e-3, 2e-3], [100])


def test_a_run_that_is_no_pair_of_the_first_one_of_its_seed_ends_the_comparison(
    arguments, tmp_path, monkeypatch, capsys
):
    """Training is replaced: hybrid read other data than post; pre is older, and recorded nothing."""
    trained = []

    def train(config, **_):
        scheme, directory = config.model.scheme, tmp_path / "lab" / config.run.name
        trained.append(scheme)
        directory.mkdir(exist_ok=True)
        if scheme != "pre":
            record = {"parameters": {}, "batches": {"1": "other" if scheme == "hybrid" else "same"}}
            (directory / "pairing.json").write_text(json.dumps(record))
        return {"held": Score(2.0, 1.0, None, 8)}

    monkeypatch.setattr(trainer, "train", train)
    assert main(["lab", "compare", *arguments, "seeds=[0]", "schemes=[pre,post,span,hybrid,peri]"]) == 2
    assert trained == ["pre", "post", "span", "hybrid"]
    wrong = "post-lr0.001-seed0 and .*hybrid-lr0.001-seed0 have the same seed, but they read other data in step 1: they"
    assert re.search(wrong, capsys.readouterr().err)


def test_runs_of_one_structure_compile_once_and_only_once(arguments, tmp_path, monkeypatch):
    built, original = [], trainer.SharedPrograms.program

    def program(self, config):
        found = original(self, config)
        built.append(found)
        return found

    monkeypatch.setattr(trainer.SharedPrograms, "program", program)
    monkeypatch.setattr(jax, "clear_caches", lambda: None)
    assert main(["lab", "compare", *arguments, "learning_rates=[1e-3,2e-3]", "schemes=[post]"]) == 0
    assert len(built) == 4
    assert len({id(each._train_step) for each in built}) == 1
    assert built[0]._train_step._cache_size() == 1
    results = _results(tmp_path).values()
    assert len({result["flops_per_step"] for result in results}) == 1
    assert all((tmp_path / "lab" / name / "pairing.json").exists() for name in _results(tmp_path))
