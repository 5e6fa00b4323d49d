"""What the arguments of a comparison combine, and which of them are refused."""

import pytest
from small_comparisons import SMALL, without

from hybridnorm_jax.errors import UserError
from hybridnorm_jax.lab import compare, compare_options


def test_the_default_is_the_configurations_learning_rate(arguments):
    asked = compare_options.comparison(without(arguments, "learning_rates", "run.name"))
    assert {config.optimizer.learning_rate for config in asked.configs} == {2e-3}
    assert asked.directory.rpartition("/")[2].startswith("compare-lab-")
    assert {config.train.data_seed for config in asked.configs} == {0}
    kept = compare_options.comparison([*arguments, "train.data_seed=7"])
    assert {config.train.data_seed for config in kept.configs} == {7}


def test_each_scheme_has_the_standard_deviation_of_its_own_initializer():
    """As if model.scheme had named it; a number that is set is for all."""
    words = ["schemes=[pre,simple_norm]", "seeds=[0]", "run.name=lab", *SMALL]
    configs = compare_options.comparison(words).configs
    assert [config.model.init_std for config in configs] == pytest.approx([40**-0.5, 0.02])
    given = compare_options.comparison([*words, "model.init_std=0.1"]).configs
    assert [config.model.init_std for config in given] == [0.1, 0.1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep=[1e-3]"], "sweep=[0.001]: a grid needs at least two rates"),
        (["sweep=[1e-3,2e-3]", "sweep_seeds=[1]"], "sweep_seeds=[1]: must have none of seeds, and has [1]"),
        (
            ["sweep=[1e-3,2e-3]", "optimizer.learning_rate=1.0"],
            "optimizer.learning_rate=1.0: sweep=[...] sets it here",
        ),
        (["sweep=[1e-3,2e-3]", "data.validation_fraction=0"], "sweep=[0.001, 0.002]: needs a validation set to choose"),
        (["tokens=640", "train.steps=3"], "train.steps=3: tokens=... sets it here"),
        (["tokens=10"], "tokens=10: must be at least the 64 tokens of a step"),
        (["tokens=640", "flops=1e9"], "flops=1000000000.0: cannot be set together with tokens"),
    ],
)
def test_wrong_protocols_are_refused(arguments, message):
    sizes = [each for each in SMALL if not each.startswith("train.steps")]
    with pytest.raises(UserError) as refusal:
        compare_options.comparison([*sizes, "seeds=[0,1]", *arguments])
    assert message in str(refusal.value)


def test_variants_are_crossed_with_schemes_and_named(arguments):
    variants = 'variants=[model.num_layers=2,"model.num_layers=3 optimizer.warmup_steps=1"]'
    asked = compare_options.comparison([*arguments, variants, "seeds=[0]"])
    assert {config.run.group for config in asked.configs} == {"lab"}
    named = {config.run.name: (config.model.num_layers, config.optimizer.warmup_steps) for config in asked.configs}
    assert named == {
        f"{scheme}-{variant}-lr0.001-seed0": numbers
        for scheme in ("pre", "post")
        for variant, numbers in (("num_layers=2", (2, 0)), ("num_layers=3-warmup_steps=1", (3, 1)))
    }


def test_a_budget_decides_the_steps(arguments):
    sizes = without(arguments, "train.steps")
    asked = compare_options.comparison([*sizes, "tokens=700"])
    assert {config.train.steps for config in asked.configs} == {10}
    operations = compare.step_operations(asked.configs[0])
    asked = compare.with_budget(compare_options.comparison([*sizes, f"flops={4.2 * operations}"]))
    assert asked.contestants[0].config.train.steps == 4
    with pytest.raises(UserError, match=r"^train\.steps=1: must be more than the 2 steps of warm-up"):
        compare.with_budget(compare_options.comparison([*sizes, "flops=1", "optimizer.warmup_steps=2"]))


@pytest.mark.parametrize(
    ("arguments", "directory"),
    [
        (["train.steps=90"], "compare-lab-steps=90"),
        (["train.steps=90", "sweep=[1e-3,2e-3]"], "compare-lab-steps=90-sweep"),
        (["tokens=1024000"], "compare-lab-tokens=1.024e+06"),
        (["run.name=mine", "sweep=[1e-3,2e-3]"], "mine"),
    ],
)
def test_another_protocol_has_another_directory(arguments, directory):
    assert compare_options.comparison(arguments).directory.rpartition("/")[2] == directory
