"""Kinds of norms: their authors' numbers, NumPy in float64, a user's own, and models that have them."""

import dataclasses
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from covering import others_are_long

import hybridnorm_jax as hn
from hybridnorm_jax.interop.architectures import config_to_json
from hybridnorm_jax.interop.huggingface import save_huggingface
from hybridnorm_jax.model.abstract_params import abstract_params
from tests.model.fresh_leaves import fresh_leaves

GOLDENS = Path(__file__).parents[1] / "goldens" / "placements"
PAGE = Path(__file__).parents[2] / "docs" / "placements.md"
SIZES = {"d_model": 32, "num_layers": 3, "num_heads": 4, "vocab_size": 61}
OURS = {"weight": "scale"}
# Kinds for norms on the whole stream; CRMSNorm's is another stream, with tests of its own.
KINDS = [name for name, kind in hn.NORM_KINDS.items() if not kind.drops_last]


def _golden(name):
    with np.load(GOLDENS / f"{name}.npz") as file:
        return dict(file)


def _part(golden, prefix):
    return {name.removeprefix(prefix): array for name, array in golden.items() if name.startswith(prefix)}


def _error(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize(("theirs", "kind"), [("dyt", "dyt"), ("derf", "derf"), ("bhyt_star", "bhyt")])
def test_a_module_of_the_authors_is_reproduced(theirs, kind):
    golden = _golden("norm_kinds")
    params, grads = (
        {OURS.get(name, name): array for name, array in _part(golden, f"{theirs}/{part}/").items()}
        for part in ("param", "grad")
    )
    norm = hn.Norm(kind=kind, epsilon=1e-6, use_bias="bias" in params)
    assert jax.tree.map(np.shape, norm.init(jax.random.key(0), golden["x"])["params"]) == jax.tree.map(np.shape, params)
    output, back = jax.vjp(lambda params, x: norm.apply({"params": params}, x), params, golden["x"])
    np.testing.assert_allclose(output, golden[f"{theirs}/output"], rtol=0, atol=1e-6)
    ours, d_x = back(jnp.asarray(golden["cotangent"]))
    assert _error(d_x, golden[f"{theirs}/grad_x"]) < 1e-5
    for name, gradient in grads.items():
        assert _error(ours[name], gradient) < 1e-5, name


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _rms(x, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def _gated(x, p, eps):
    y = _rms(x, eps) * p["scale"] + p["bias"]
    hidden = y @ p["down"]
    return y * _sigmoid((hidden * _sigmoid(hidden)) @ p["up"])


REFERENCES = {
    "rmsnorm": lambda x, p, eps: _rms(x, eps) * p["scale"] + p["bias"],
    "layernorm": lambda x, p, eps: _rms(x - x.mean(-1, keepdims=True), eps) * p["scale"] + p["bias"],
    "dyt": lambda x, p, eps: np.tanh(p["alpha"] * x) * p["scale"] + p["bias"],
    "derf": lambda x, p, eps: np.vectorize(math.erf)(p["alpha"] * x + p["shift"]) * p["scale"] + p["bias"],
    "bhyt": lambda x, p, eps: np.tanh(0.1 * p["lam"] * _rms(x, eps)) * p["scale"] + p["bias"],
    "gated": _gated,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_its_formula_in_float64(kind):
    rng = np.random.default_rng(0)
    x = 2 * rng.standard_normal((3, 24))
    with jax.enable_x64(True):
        norm = hn.Norm(kind=kind, use_bias=True, epsilon=1e-3, param_dtype=jnp.float64)
        params = norm.init(jax.random.key(0), jnp.asarray(x))["params"]
        params = jax.tree.map(lambda leaf: np.asarray(leaf + 0.3 * rng.standard_normal(leaf.shape)), params)
        ours = norm.apply({"params": params}, jnp.asarray(x))
        assert ours.dtype == jnp.float64
    np.testing.assert_allclose(ours, REFERENCES[kind](x, params, 1e-3), rtol=1e-12, atol=1e-13)


def _config(kind, **keys):
    return hn.ModelConfig(scheme="hybrid_star", norm=kind, mlp_dim=48, learned_embedding_scale=True, **SIZES | keys)


def _loss(config, params, tokens):
    logits = jax.jit(hn.Decoder(config).apply)({"params": params}, tokens[:, :-1])
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1).mean()


@pytest.mark.parametrize("kind", others_are_long(KINDS, ["gated"]))
def test_a_model_learns_and_its_unrolled_layers_are_the_scanned_ones(kind):
    config = _config(kind, remat="full")
    tokens = np.random.default_rng(1).integers(0, 61, (2, 9))
    params = jax.jit(hn.Decoder(config).init)(jax.random.key(0), tokens)["params"]
    optimizer = optax.adam(1e-2)

    @jax.jit
    def train(params, state):
        def step(carry, _):
            params, state = carry
            loss, gradient = jax.value_and_grad(lambda params: _loss(config, params, tokens))(params)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), loss

        (params, _), losses = jax.lax.scan(step, (params, state), None, length=20)
        return params, losses

    trained, losses = train(params, optimizer.init(params))
    assert losses[-1] < 0.7 * losses[0]
    assert np.isfinite(losses).all()
    from hybridnorm_jax.generation.ready_parameters import ready

    scanned = jax.jit(hn.Decoder(config).apply)({"params": trained}, tokens)
    unrolled = jax.jit(hn.Decoder(config, unrolled=True).apply)({"params": ready(config, trained)}, tokens)
    np.testing.assert_allclose(scanned, unrolled, rtol=0, atol=1e-5 * np.abs(scanned).max())


def test_parameters_start_as_the_keys_say():
    config = hn.ModelConfig(
        scheme="peri", norm="derf", mlp_dim=48, norm_alpha=(0.8, 0.3, 0.2), norm_shift=(0.1,), **SIZES
    )
    found = fresh_leaves(config, "_norm/")
    for place in ("pre", "branch"):
        np.testing.assert_allclose(found[f"run_0/attention_{place}_norm/alpha"], 0.8)
        np.testing.assert_allclose(found[f"run_0/feed_forward_{place}_norm/alpha"], 0.3)
    for name in ("embedding_norm", "final_norm"):
        np.testing.assert_allclose(found[f"{name}/alpha"], 0.2)
        np.testing.assert_allclose(found[f"{name}/shift"], 0.1)
    heads = fresh_leaves(dataclasses.replace(config, scheme="hybrid"), "_norm/")
    np.testing.assert_allclose(heads["run_0/attention/q_norm/alpha"], 0.8)


def test_the_llama_of_the_documentation_starts_as_in_the_paper():
    """DyT (2503.10622), LLaMA 7B: alpha 0.8 in attention and 0.2 elsewhere, no bias, the embedding times sqrt(d)."""
    block = re.search(r"```yaml\n# dyt_7b\.yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    keys = yaml.safe_load(block)["model"]
    assert hn.ModelConfig(**keys).d_model == 4096
    small = hn.ModelConfig(**(keys | SIZES | {"mlp_dim": 48}))
    found = fresh_leaves(small, "norm/|scale/")
    norms = ("run_0/attention_pre_norm", "run_0/feed_forward_pre_norm", "final_norm")
    assert found.keys() == {f"{norm}/{name}" for norm in norms for name in ("alpha", "scale")} | {
        "embedding_scale/scale"
    }
    assert [float(found[f"{norm}/alpha"].ravel()[0]) for norm in norms] == pytest.approx([0.8, 0.2, 0.2])
    np.testing.assert_allclose(found["embedding_scale/scale"], 32**0.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"norm": "dytt"}, r"^model\.norm=dytt: not known"),
        ({"norm": "rmsnorm", "norm_alpha": (0.5,)}, r"^model\.norm_alpha=.*no norm with alpha: its norms are rmsnorm"),
        ({"norm": "dyt", "norm_shift": (0.5,)}, r"^model\.norm_shift=.*no norm with shift: its norms are dyt"),
        ({"norm": "dyt", "norm_alpha": (0.5, 0.2)}, r"^model\.norm_alpha=.*must be one number, or three"),
        ({"norm": "derf", "norm_shift": (0.5,) * 4}, r"^model\.norm_shift=.*must be one number, or three"),
        (
            {"norm": "dyt", "norm_alpha": (float("nan"),)},
            r"^model\.norm_alpha=.*must be at least -1,000 and at m",
        ),
        ({"norm": "dyt", "norm_alpha": ("x",)}, r"^model\.norm_alpha=.*must be a number"),
        # Nothing in this scheme is normalized inside a branch.
        (
            {"attention_norm": "dyt", "norm_alpha": (0.5,)},
            r"^model\.norm_alpha=.*no norm with alpha: its norms are rms",
        ),
        ({"norm": "gated", "norm_alpha": (0.5,)}, r"^model\.norm_alpha=.*no norm with alpha: its norms are gated"),
        ({"norm": "bhyt", "norm_shift": (0.5,)}, r"^model\.norm_shift=.*no norm with shift: its norms are bhyt"),
        ({"attention_norm": "gated"}, r"^model\.attention_norm=gated: not known"),
        ({"attention_norm": "crmsnorm"}, r"^model\.attention_norm=crmsnorm: not known"),
    ],
)
def test_what_a_kind_does_not_have_is_refused(keys, message):
    with pytest.raises(hn.ConfigError, match=message):
        hn.ModelConfig(scheme="pre", **SIZES, **keys)


@pytest.mark.parametrize("form", ["pre_rmsnorm", "pre_crmsnorm"])
@pytest.mark.parametrize("kind", [name for name, kind in hn.NORM_KINDS.items() if not kind.is_layer_norm])
def test_conversion_names_the_kind_it_refuses(kind, form):
    for config in (
        hn.ModelConfig(scheme="pre", norm=kind, **SIZES),
        hn.EncoderConfig(scheme="pre", norm=kind, d_model=32, num_layers=2, num_heads=4),
    ):
        with pytest.raises(hn.ConfigError, match=f"^model.norm={kind}: only LayerNorm"):
            hn.equivalence.conversion_of(config, form)


def test_a_learned_embedding_scale_is_refused_where_it_cannot_be():
    config = hn.ModelConfig(scheme="pre", norm="layernorm", learned_embedding_scale=True, **SIZES)
    with pytest.raises(hn.ConfigError, match=r"^model\.learned_embedding_scale=true: only LayerNorm at the entrance"):
        hn.equivalence.to_pre_rmsnorm(config, {})
    with pytest.raises(hn.ConfigError, match=r"^model\.learned_embedding_scale=true: an Encoder does not have it"):
        hn.EncoderConfig(learned_embedding_scale=True)
    with pytest.raises(hn.UserError, match=r"llama cannot express model\.learned_embedding_scale=true"):
        config_to_json(dataclasses.replace(config, norm="rmsnorm"), "llama")


def test_a_checkpoint_without_the_numbers_of_a_kind_is_refused():
    """OLMo's code has norms with a scale and a bias alone."""
    config = hn.ModelConfig(scheme="pre", norm="dyt", mlp_dim=24, tie_embeddings=True, **(SIZES | {"num_layers": 1}))
    shapes = {"wte": (61, 32), "ln_f": (32,), "blocks.0.attn_norm": (32,), "blocks.0.ff_norm": (32,)}
    shapes |= {"blocks.0.att_proj": (96, 32), "blocks.0.attn_out": (32, 32)}
    shapes |= {"blocks.0.ff_proj": (48, 32), "blocks.0.ff_out": (32, 24)}
    arrays = {f"transformer.{name}.weight": np.ones(shape, np.float32) for name, shape in shapes.items()}
    assert "final_norm" in hn.params_from_olmo(dataclasses.replace(config, norm="rmsnorm"), arrays)
    with pytest.raises(hn.UserError, match=r"alpha: a parameter of this model, but their code does not have it$"):
        hn.params_from_olmo(config, arrays)


# ---- A user's own


@pytest.fixture
def softsign():
    @hn.norm_kind("softsign", parameters=[hn.NormParameter("alpha", start=0.7), hn.NormParameter("v", ("width",))])
    def function(x, alpha, v):
        return alpha * x / (1 + jnp.abs(v * x))

    yield
    del hn.NORM_KINDS["softsign"]


@pytest.mark.usefixtures("softsign")
@pytest.mark.parametrize("keys", [{"norm": "softsign"}, {"scheme": "hybrid", "attention_norm": "softsign"}])
def test_a_users_own_kind_is_neither_exported_nor_converted(keys, tmp_path, random_params):
    config = hn.ModelConfig(**{"scheme": "pre", "mlp_dim": 48, **SIZES, **keys})
    params = random_params(config)
    key = next(name for name, value in keys.items() if value == "softsign")
    right = "a kind of a plugin's, which the PyTorch code beside exported weights does not have; it has rmsnorm, "
    for architecture in (None, "hybridnorm"):
        with pytest.raises(hn.UserError, match=f"^model\\.{key}=softsign: {right}") as refusal:
            save_huggingface(tmp_path / "out", config, params, architecture=architecture)
        assert "\n" not in str(refusal.value)
        assert not (tmp_path / "out").exists()
    with pytest.raises(hn.ConfigError, match=r"^model\.(norm=softsign|norm=rmsnorm.*): only LayerNorm"):
        hn.equivalence.conversion_of(config, "pre_rmsnorm")


def test_matrices_of_a_kind_are_one_for_all_heads():
    hn.norm_kind("mixing", parameters=[hn.NormParameter("m", ("width", 3), start=None)])(lambda x, m: x + (x @ m).sum())
    config = hn.ModelConfig(scheme="hybrid", norm="mixing", mlp_dim=48, **SIZES)
    assert abstract_params(config)["run_0"]["attention"]["q_norm"]["m"].shape == (3, 8, 3)
    right = r"^model\.attention_norm_per_head=true: norms of the kind mixing have matrices"
    with pytest.raises(hn.ConfigError, match=right):
        dataclasses.replace(config, attention_norm_per_head=True)


@pytest.mark.usefixtures("softsign")
def test_shapes_are_those_of_the_kind_that_has_the_name_now():
    config = _config("softsign")
    assert "v" in abstract_params(config)["final_norm"]
    del hn.NORM_KINDS["softsign"]
    hn.norm_kind("softsign", parameters=[hn.NormParameter("name")])(lambda x, name: name * x)
    assert abstract_params(config)["final_norm"].keys() == {"scale", "name"}


@pytest.mark.usefixtures("softsign")
def test_a_users_own_kind_gets_its_scale_and_bias_from_the_library():
    x = jnp.asarray([[1.0, -3.0, 2.0]])
    norm = hn.Norm(kind="softsign", use_bias=True, starts={"alpha": 2.0})
    params = norm.init(jax.random.key(0), x)["params"]
    assert jax.tree.map(np.shape, params) == {"scale": (3,), "bias": (3,), "alpha": (1,), "v": (3,)}
    params |= {"scale": jnp.full(3, 5.0), "bias": jnp.ones(3)}
    np.testing.assert_allclose(norm.apply({"params": params}, x), 5 * 2 * x / (1 + abs(x)) + 1, rtol=1e-6)
    config = _config("softsign", norm_alpha=(0.1,))
    np.testing.assert_allclose(fresh_leaves(config, "alpha")["final_norm/alpha"], 0.1)


@pytest.mark.parametrize(
    ("name", "parameters", "function", "message"),
    [
        ("dyt", (), lambda x: x, "a norm kind named 'dyt' already exists"),
        ("", (), lambda x: x, "a norm kind's name must be a text"),
        ("mine", (), 3, "must be a function of one array x, not int"),
        ("mine", (), lambda: 1, "must be a function of one array x; too many"),
        ("mine", (), lambda x, y: x, "must be a function of one array x; missing a required argument: 'y'"),
        ("mine", ("a", "a"), lambda x, a: x, "two parameters are named 'a'"),
        ("mine", ("scale",), lambda x, scale: x, "a norm's parameter is named 'scale': must be an identifier"),
        ("mine", ("x",), lambda x: x, "a norm's parameter is named 'x'"),
        (
            "mine",
            ("items",),
            lambda x, items: x,
            "a norm's parameter is named 'items': must be an identifier with",
        ),
        ("mine", ("_a",), lambda x, _a: x, "a norm's parameter is named '_a'"),
        ("auto", (), lambda x: x, "a norm kind's name must be a text"),
        ("mine", (), jnp.ndarray, "must be a function of one array x, not"),
        ("mine", (), lambda x: np.ones(x.shape), "must return an array, not ndarray"),
        ("mine", (), lambda x: np.asarray(x), "raises TracerArrayConversionError: The numpy.ndarray conversion"),
        (
            "mine",
            (),
            lambda x: x.astype(jnp.bfloat16),
            "must return an array of this dtype and shape, not bfloat16[2, 3,",
        ),
        ("mine", (), lambda x: x if x.sum() > 0 else -x, "raises TracerBoolConversionError: Attempted boolean"),
        ("mine", (), lambda x: x[0], "must return an array of this dtype and shape, not float32[3, 8]"),
        ("mine", (), lambda x: x > 0, "must return an array of this dtype and shape, not bool[2, 3, 8]"),
        ("mine", (), lambda x: None, "must return an array, not NoneType"),
        ("mine", (), lambda x: 1 / 0, "raises ZeroDivisionError"),
    ],
)
def test_what_is_no_norm_is_refused_where_it_is_registered(name, parameters, function, message):
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        hn.norm_kind(name, parameters=[hn.NormParameter(each) for each in parameters])(function)
    assert "\n" not in str(refusal.value)
    assert "mine" not in hn.NORM_KINDS
