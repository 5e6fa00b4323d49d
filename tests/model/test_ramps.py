"""Branches that grow with the training step: how they grow, what a step makes of a model, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import others_are_long

import hybridnorm_jax as hn
from hybridnorm_jax.interop.architectures import config_to_json
from hybridnorm_jax.model.ramps import ramp_lengths
from hybridnorm_jax.model.schemes_that_grow import growing
from tests.schemes import keys_of

TINY = {"d_model": 16, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 24, "vocab_size": 61}
IN_FLOAT64 = {"dtype": "float64", "param_dtype": "float64"}
GROWING = [name for name in hn.schemes() if hn.SCHEMES[name].block(0, 1).grows]
UNGROWN = {
    "prores_pre": "pre",
    "prores_post": "post_final_norm",
    "prores_sandwich": "sandwich",
    "prores_deepnorm": "deepnorm_final_norm",
    "branch_norm": "post",
}


def _config(scheme, **keys):
    return hn.ModelConfig(scheme=scheme, **(TINY | IN_FLOAT64 | keys))


def test_every_scheme_that_grows_has_one_that_does_not():
    assert set(UNGROWN) == set(GROWING)


def test_deeper_layers_grow_for_longer():
    # From floor(10 / 4) in three equal steps.
    assert ramp_lengths("by_depth", 4, 10) == pytest.approx((2, 14 / 3, 22 / 3, 10), rel=1e-15)
    assert ramp_lengths("by_depth", 1, 10) == (10,)
    assert ramp_lengths("together", 3, 10) == (10, 10, 10)


@pytest.mark.parametrize("scheme", others_are_long(GROWING, ["prores_pre", "prores_post", "branch_norm"]))
def test_a_step_is_one_more_factor_of_every_branch(scheme, random_params, tokens):
    """Given with the call it makes what the configuration of that step makes, whose placements have plain numbers."""
    config = _config(scheme, ramp_steps=10, branch_multiplier=0.5)
    with jax.enable_x64(True):
        params = random_params(config)
        apply = jax.jit(hn.Decoder(config).apply)
        for step in (0, 1, 5, 10, 11):
            given = apply({"params": params}, tokens, step=step)
            fixed = config.at_step(step)
            expected = jax.jit(hn.Decoder(fixed).apply)({"params": params}, tokens)
            np.testing.assert_allclose(given, expected, rtol=0, atol=1e-12)
    scales = [placement.feed_forward.branch_scale for placement in config.at_step(5).placements]
    lengths = (10,) * 4 if scheme == "branch_norm" else (2, 14 / 3, 22 / 3, 10)
    np.testing.assert_allclose(scales, [0.5 * min(1, 5 / length) for length in lengths], rtol=1e-15)


def test_a_ramp_goes_on_from_run_to_run(random_params, tokens):
    """The first block of hybrid_star is a run of its own."""
    hn.scheme("hybrid_star_growing")(
        lambda layer, depth: growing(hn.SCHEMES["hybrid_star"].block(layer, depth), "by_depth")
    )
    config = _config("hybrid_star_growing", ramp_steps=10)
    assert [run.length for run in config.runs] == [1, 3]
    with jax.enable_x64(True):
        params = random_params(config)
        given = jax.jit(hn.Decoder(config).apply)({"params": params}, tokens, step=5)
        expected = jax.jit(hn.Decoder(config.at_step(5)).apply)({"params": params}, tokens)
        np.testing.assert_allclose(given, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scheme", GROWING)
def test_when_all_has_grown_the_model_is_the_usual_one(scheme):
    grown = _config(scheme, ramp_steps=10).at_step(10**6)
    assert grown.ramp_at == 10
    usual = _config(UNGROWN[scheme])
    assert (grown.placements, grown.has_final_norm) == (usual.placements, usual.has_final_norm)
    assert grown.initializer_name == usual.initializer_name


def test_the_gradient_of_a_branch_is_the_smaller_the_less_it_has_grown(random_params, tokens):
    config = _config("prores_pre", ramp_steps=10, num_layers=1)
    with jax.enable_x64(True):
        params = random_params(config)

        def size(params, step):
            return jnp.square(hn.Decoder(config).apply({"params": params}, tokens, step=step)).mean()

        gradients = [jax.grad(size)(params, step)["run_0"]["attention"]["out"]["kernel"] for step in (0, 1, 9)]
        norms = [jnp.linalg.norm(gradient) for gradient in gradients]
        assert norms[0] == 0 < norms[1] < norms[2]


def test_what_can_be_said_of_a_step_and_what_not():
    growing = hn.Decoder(_config("prores_pre", **dict.fromkeys(IN_FLOAT64, "float32")))
    tokens = jnp.zeros((1, 2), jnp.int32)
    params = growing.init(jax.random.key(0), tokens)
    with pytest.raises(ValueError, match=r"^step: the branches of model\.scheme=prores_pre grow .* config\.at_step"):
        growing.apply(params, tokens)
    with pytest.raises(ValueError, match=r"^step: nothing in this model grows"):
        hn.Decoder(growing.config.at_step(1)).apply(params, tokens, step=1)
    with pytest.raises(
        hn.UserError, match=r"^config: the branches of model\.scheme=prores_pre grow .* config\.at_step"
    ):
        hn.generate(growing.config, params["params"], [[1]], max_new_tokens=1)
    with pytest.raises(hn.UserError, match=r"^model\.scheme=prores_pre: its branches grow .* model\.ramp_at"):
        config_to_json(growing.config, "hybridnorm")
    with pytest.raises(ValueError, match=r"^placement: its branches grow"):
        hn.Block(growing.config, growing.config.placements[0]).init(jax.random.key(0), jnp.zeros((1, 2, 16)))
    assert "grow with the training step" in growing.config.pre_layernorm_obstacle


@pytest.mark.parametrize("step", [-1, 2.5, True, "a", np.array([1, 2]), np.int32(-3)])
def test_a_step_is_one_whole_number(step, random_params, tokens):
    config = hn.ModelConfig(scheme="prores_pre", **TINY)
    with pytest.raises(ValueError, match=r"^step=.*: must be one whole number, at least 0"):
        hn.Decoder(config).apply({"params": random_params(config)}, tokens, step=step)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"scheme": "pre", "ramp_at": 3}, r"model\.ramp_at=3: no branch of model\.scheme=pre grows"),
        ({"scheme": "pre", "ramp_steps": 3}, r"model\.ramp_steps=3: no branch"),
        ({"scheme": "prores_pre", "ramp_steps": 3}, r"model\.ramp_steps=3: must be at least model\.num_layers=4"),
        ({"scheme": "prores_pre", "ramp_at": -1}, r"model\.ramp_at=-1: must be at least 0"),
    ],
)
def test_keys_that_mean_nothing_are_refused(keys, message):
    with pytest.raises(hn.ConfigError, match=f"^{message}"):
        hn.ModelConfig(**(TINY | keys))
    with pytest.raises(ValueError, match=r"^branch_ramp: not with a side stream"):
        hn.SublayerPlacement(side="written", branch_ramp="together")
    with pytest.raises(ValueError, match=r"^branch_ramp='slowly' must be one of"):
        hn.SublayerPlacement(branch_ramp="slowly")


def test_schemes_of_tests_are_at_a_step():
    assert keys_of("pre") == {"scheme": "pre"}
    assert not hn.ModelConfig(**keys_of("prores_pre")).grows
