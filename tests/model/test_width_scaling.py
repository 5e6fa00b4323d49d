"""model.base_width: how parameters of each kind start and how fast they move (muP, 2203.03466, tables 3 and 8)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import others_are_long

import hybridnorm_jax as hn
from hybridnorm_jax.config.run_config import OptimizerSection
from hybridnorm_jax.equivalence.forms import conversion_of
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.model.abstract_params import abstract_params
from hybridnorm_jax.model.width_scaling import kind_of
from hybridnorm_jax.training.optimizers.chain import make_optimizer
from hybridnorm_jax.training.optimizers.schedules import step_numbers
from hybridnorm_jax.training.state import init_params
from tests.model.fresh_leaves import fresh_leaves

BASE, WIDTH = 32, 128
RATIO = WIDTH / BASE
EXPERTS = {"num_experts": 4, "experts_per_token": 2, "activation": "swiglu", "shared_experts": 1}
EXPERTS |= {"shared_expert_gate": True, "balance_bias": True}
EVERYTHING = {
    **{"scheme": "hybrid", "num_layers": 2, "num_heads": 4, "positions": "learned", "max_positions": 16},
    **{"vocab_size": 211, "attention_bias": True, "head_bias": True, "attention_sinks": True, "layer_scale": True},
}
# Of the parameters, by the end of their paths: (initial std, learning rate) at m times the base width, as powers of m.
# From table 8, and of output matrices from table 3, where they are no multiplier but a std and a rate.
POWERS = {
    "token_embedding/embedding": (0, 0),
    "position_embedding/embedding": (0, 0),
    **{f"{name}/kernel": (-0.5, -1) for name in ("query", "key", "value", "out", "gate", "up", "down")},
    **{f"expert_{name}/kernel": (-0.5, -1) for name in ("gate", "up", "down")},
    **{f"{name}/kernel": (-1, -1) for name in ("head", "router", "shared_gate")},
    **{f"{name}/bias": (None, 0) for name in ("query", "key", "value", "out", "gate", "up", "down", "head")},
    **{f"{name}_layer_scale/scale": (None, 0) for name in ("attention", "feed_forward")},
    "attention/sinks": (None, 0),
    "feed_forward/balance_bias": (None, 0),
}


def _model(width, **keys):
    keys = {**EVERYTHING, **keys}
    return hn.ModelConfig(d_model=width, mlp_dim=2 * width, **keys)


def _drawn(config):
    return jax.jit(lambda key: init_params(config, key))(jax.random.key(0))


def _name(path):
    return "/".join(part.key for part in path[-2:])


def test_every_kind_starts_and_moves_as_the_tables_say():
    """Against a model of the base width; the standard deviation of n numbers is off by 1 / sqrt(2n)."""
    keys = EXPERTS | {"dense_layers": (0,)}
    wide = _drawn(_model(WIDTH, base_width=BASE, **keys))
    base = _drawn(_model(BASE, **keys))
    seen = set()
    of_base = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(base)}
    updates = {width: _first_update(params, width) for width, params in ((WIDTH, wide), (BASE, base))}
    for path, leaf in jax.tree.leaves_with_path(wide):
        name, place = _name(path), jax.tree_util.keystr(path)
        std, rate = (None, 0) if name.endswith("_norm/scale") else POWERS[name]
        seen.add(name)
        start = of_base[place]
        if std is None:
            assert len(np.unique(leaf)) == len(np.unique(start)) == 1
            assert leaf.reshape(-1)[0] == start.reshape(-1)[0]
        else:
            spread = 4 * math.hypot((2 * leaf.size) ** -0.5, (2 * start.size) ** -0.5)
            np.testing.assert_allclose(np.std(leaf) / np.std(start), RATIO**std, rtol=spread)
        # Of a gradient of ones Adam's first direction is 1.
        np.testing.assert_allclose(updates[WIDTH][place] / updates[BASE][place], RATIO**rate, rtol=1e-6)
    assert {"router/kernel", "shared_gate/kernel", "expert_down/kernel", "gate/kernel", "head/kernel"} <= seen


def _first_update(params, width):
    """Path -> how far the first step moves it, where the gradient is 1 and nothing decays."""
    config = OptimizerSection(weight_decay=0.0, learning_rate=1e-2, schedule="constant", clip=None)
    numbers = step_numbers(config, steps=10, tokens_per_step=1, seed=0)
    optimizer = make_optimizer(config, numbers, width_ratio=width / BASE)

    @jax.jit
    def updated(params):
        return optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)[0]

    updates = updated(params)
    return {jax.tree_util.keystr(path): float(leaf.reshape(-1)[0]) for path, leaf in jax.tree.leaves_with_path(updates)}


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_an_optimizer_with_other_rules_is_refused(name):
    model = _model(WIDTH, base_width=BASE, positions="rope", max_positions=None)
    hn.RunConfig(model=model, optimizer=OptimizerSection(name="lion"))
    message = rf"^model\.base_width=32: not with optimizer\.name={name}: the rules for the width are those of adamw and"
    with pytest.raises(ConfigError, match=message):
        hn.RunConfig(model=model, optimizer=OptimizerSection(name=name))


def test_the_decay_of_a_step_does_not_depend_on_the_width():
    config = OptimizerSection(weight_decay=0.5, learning_rate=1e-2, schedule="constant")
    numbers = step_numbers(config, steps=10, tokens_per_step=1, seed=0)
    params = {"run_0": {"attention": {"out": {"kernel": jnp.full((1, 4, 4, 16), 3.0)}}}}
    for ratio in (1.0, 8.0):
        optimizer = make_optimizer(config, numbers, width_ratio=ratio)
        updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
        kernel = updates["run_0"]["attention"]["out"]["kernel"]
        np.testing.assert_allclose(kernel, -1e-2 * 0.5 * 3.0, rtol=1e-6)


@pytest.mark.parametrize(
    "keys", [{"scheme": "simple_norm", "tie_embeddings": True}, pytest.param(EXPERTS, marks=pytest.mark.long)]
)
def test_at_the_base_width_nothing_changes(keys):
    plain, based = (_model(BASE, **keys), _model(BASE, base_width=BASE, base_head_dim=BASE // 4, **keys))
    assert based.logit_scale == (1.0 if keys.get("tie_embeddings") else None)
    assert based.score_scale == plain.score_scale
    ours, theirs = (_drawn(config) for config in (based, plain))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_tied_head_divides_logits_and_heads_that_grow_divide_scores():
    tied = _model(WIDTH, base_width=BASE, base_head_dim=8, tie_embeddings=True)
    assert tied.logit_scale == 1 / RATIO
    assert tied.head_dim == 32
    assert tied.score_scale == pytest.approx(math.sqrt(8) / 32, rel=1e-15)
    # The same configuration again, as a file holds it.
    assert dataclasses.replace(tied) == tied
    assert hn.ModelConfig(**dataclasses.asdict(tied)) == tied
    params = fresh_leaves(tied, "token_embedding|head/")
    assert np.std(params["token_embedding/embedding"]) == pytest.approx((2.5 * BASE) ** -0.5, rel=0.03)
    assert "head/kernel" not in params


def test_the_scale_of_the_embedding_and_simple_gpt_start_as_at_the_base_width():
    dyt = _model(WIDTH, base_width=BASE, norm="dyt", learned_embedding_scale=True)
    np.testing.assert_allclose(fresh_leaves(dyt, "scale")["embedding_scale/scale"], math.sqrt(BASE), 1e-6)
    simple = fresh_leaves(_model(WIDTH, base_width=BASE, scheme="simple_norm"), "embedding|(head|query)/kernel")
    assert np.std(simple["token_embedding/embedding"]) == pytest.approx(1, rel=0.03)
    assert np.std(simple["head/kernel"]) == pytest.approx(BASE**-0.5 / RATIO, rel=0.03)
    assert np.std(simple["run_0/attention/query/kernel"]) == pytest.approx(0.02 / RATIO**0.5, rel=0.03)


# Their parameters are of every kind there is; all others are the long tests'.
NAMED = ("hybrid_star", "ngpt", "normformer_residual", "siamese_post_pre", "simple_norm")


@pytest.mark.parametrize("scheme", others_are_long(sorted(hn.SCHEMES), NAMED))
def test_every_parameter_of_every_scheme_has_a_kind(scheme):
    params = abstract_params(hn.ModelConfig(d_model=16, num_layers=2, num_heads=2, vocab_size=8, scheme=scheme))
    for path, leaf in jax.tree.leaves_with_path(params):
        kind = kind_of(tuple(part.key for part in path))
        is_stacked = path[0].key.startswith("run_")
        # Scales of norms in heads have an axis of heads besides, and are no matrices.
        is_scale = path[-2].key.endswith(("norm", "qk_scale"))
        assert (kind == "vector") == (is_scale or leaf.ndim - is_stacked < 2)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", ["pre_rmsnorm", "pre_crmsnorm"])
def test_a_converted_model_has_the_same_factors_and_no_rules(form, tied):
    """Its rates would be of other matrices: a head that was tied may have one of its own."""
    config = _model(WIDTH, scheme="pre", norm="layernorm", base_width=BASE, base_head_dim=8, tie_embeddings=tied)
    converted = conversion_of(dataclasses.replace(config, layer_scale=False), form).config
    assert (converted.base_width, converted.base_head_dim) == (None, None)
    assert (converted.logit_scale, converted.score_scale) == (config.logit_scale, config.score_scale)


def test_a_new_kernel_has_to_be_entered():
    with pytest.raises(KeyError):
        kind_of(("run_0", "attention", "latent", "kernel"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"scheme": "ngpt", "layer_scale": False},
            r"model\.base_width=32: not with model\.scheme=ngpt, which keeps matrices at unit length",
        ),
        ({"norm": "gated"}, r"model\.base_width=32: not with model\.norm=gated, whose norms have matrices"),
        (
            {"tie_embeddings": True, "logit_scale": 2.0},
            r"model\.logit_scale=2\.0: model\.base_width=32 and a tied head make it 0\.25; leave it out",
        ),
        (
            {"base_head_dim": 8, "attention_scale": 0.5},
            r"model\.attention_scale=0\.5: model\.base_head_dim=8 makes it 0\.0883883; leave one of the two out",
        ),
    ],
)
def test_what_has_no_rule_is_refused_in_one_line(keys, message):
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        _model(WIDTH, **({"base_width": BASE} | keys))
    assert "\n" not in str(caught.value)
