"""Runs every scheme through golden tensors, gradients, generation, export and conversion, and keeps the results.

    python -m tests.scheme_checks                  all schemes, about a quarter of an hour on two cores
    python -m tests.scheme_checks hybrid span      these

docs/results/schemes.json keeps one row for each scheme; docs/write_schemes.py makes the page's table of it. The program
stands beside the tests, because it needs their NumPy decoder and their golden tensors, which no wheel has.
"""

import dataclasses
import datetime
import functools
import json
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# As pytest has it: test files import their helpers by name.
sys.path.insert(0, str(Path(__file__).parent))

import hybridnorm_jax as hn
from hybridnorm_jax.interop.architectures import config_from_json
from hybridnorm_jax.model.abstract_params import abstract_params
from tests import authors_models
from tests.exported_models import TOKENS, config_of, draw, export, ids, in_torch, torch
from tests.generation.test_generate import TINY, assert_cached_is_whole
from tests.interop import test_authors
from tests.interop.test_architectures import READ, tolerance
from tests.model import test_goldens, test_two_streams
from tests.model.numpy_decoder import forward
from tests.scheme_results import RESULTS, digest
from tests.schemes import keys_of, stored_scale

GOLDENS = Path(__file__).parent / "goldens"
STEP = 1e-5
# Central differences of STEP leave STEP^2 times a third derivative, and the rounding of float64 over STEP.
GRADIENT_TOLERANCE = 1e-6


def golden_tests() -> Iterator[tuple[str, str, Callable[[], None]]]:
    """(scheme, golden, the check that reproduces it): tensors of authors' code first, then those of transformers."""
    for name, (scheme, _) in test_goldens.CASES.items():
        check = test_goldens.test_logits_loss_and_gradients_are_the_authors
        yield scheme, f"hybridnorm_official_{name}", functools.partial(check, name)
    for name, (project, keys) in authors_models.CASES.items():
        scheme = keys.get("scheme", hn.PROJECTS[project].keys.get("scheme"))
        yield scheme, name, functools.partial(test_authors.test_a_model_of_the_authors_is_reproduced, name)
    for name in ("siamese_post_pre_deit", "siamese_post_pre_deit_causal"):
        check = test_two_streams.test_siamese_norms_vision_transformer_is_reproduced
        yield "siamese_post_pre", name, functools.partial(check, name)
    for directory in transformers_goldens():
        document = json.loads((directory / "config.json").read_text())
        scheme = config_from_json(document, "config.json")[1].scheme
        yield (
            scheme,
            f"transformers {directory.name.removeprefix('hf_')}",
            functools.partial(_as_in_transformers, directory),
        )


def transformers_goldens() -> list[Path]:
    """The directories of decoders whose logits transformers computed in float32 from end to end."""
    older = [path.parent for path in sorted(GOLDENS.glob("hf_*/golden.npz")) if "bf16" not in path.parent.name]
    return [*older, *(GOLDENS / "architectures" / name for name in READ)]


def _as_in_transformers(directory: Path) -> None:
    config, params = hn.load_huggingface(directory)
    with np.load(directory / "golden.npz") as golden:
        logits = jax.jit(hn.Decoder(config).apply)({"params": params}, golden["tokens"])
        np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=tolerance(golden["logits"]))


@functools.cache
def _goldens_by_scheme() -> dict[str, dict[str, Callable[[], None]]]:
    found: dict[str, dict[str, Callable[[], None]]] = {}
    for scheme, golden, check in golden_tests():
        # A scheme by another name has the goldens of its twin.
        twins = [name for name in hn.SCHEMES if scheme in hn.SCHEMES and _is_twin(name, scheme)]
        for name in twins:
            found.setdefault(name, {})[golden] = check
    return found


def _is_twin(name: str, other: str) -> bool:
    """Whether two names stand for one model."""
    same = {"name": "", "block": None, "source": "", "checked": None}
    ours, theirs = hn.SCHEMES[name], hn.SCHEMES[other]
    is_same = dataclasses.replace(ours, **same) == dataclasses.replace(theirs, **same)
    return is_same and all(ours.placements(depth) == theirs.placements(depth) for depth in (1, 2, 3, 12, 29))


def golden(scheme: str) -> list[str]:
    """The golden files that the scheme reproduces, each run now."""
    checks = _goldens_by_scheme().get(scheme, {})
    for check in checks.values():
        check()
    return list(checks)


def gradients(scheme: str) -> dict[str, float]:
    """Our loss and gradient in float64 against the NumPy decoder: its loss, and its central differences.

    Of each parameter the derivative in one random direction is compared, relative to the norm of its gradient.
    """
    sizes = TINY | {"num_layers": 4}
    config = hn.ModelConfig(**keys_of(scheme), **sizes, dtype="float64", param_dtype="float64")
    tokens = np.random.default_rng(1).integers(0, 61, (2, 12)).astype(np.int32)
    with jax.enable_x64(True):
        params = _drawn_wide(config)

        def loss(params):
            logits = hn.Decoder(config).apply({"params": params}, tokens)
            return -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1).mean()

        ours, gradient = jax.device_get(jax.jit(jax.value_and_grad(loss))(params))
    leaves, tree = jax.tree.flatten(params)
    rng, errors = np.random.default_rng(2), []
    for place, (leaf, slope) in enumerate(zip(leaves, jax.tree.leaves(gradient), strict=True)):
        direction = rng.standard_normal(leaf.shape)
        direction /= np.linalg.norm(direction)

        def moved(by, place=place, leaf=leaf, direction=direction):
            changed = [*leaves[:place], leaf + by * direction, *leaves[place + 1 :]]
            return _numpy_loss(config, jax.tree.unflatten(tree, changed), tokens)

        difference = (moved(STEP) - moved(-STEP)) / (2 * STEP)
        errors.append(abs(difference - np.sum(slope * direction)) / np.linalg.norm(slope))
    found = {"loss": abs(float(ours) - _numpy_loss(config, params, tokens)), "gradient": float(max(errors))}
    assert found["loss"] < 1e-12, found
    assert found["gradient"] < GRADIENT_TOLERANCE, found
    return found


def _drawn_wide(config: hn.ModelConfig) -> Any:
    """Parameters so large that no gradient is near the rounding of the loss; no two norms are alike."""
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        centre = stored_scale(path, config) if path[-1].key == "scale" else 0.0
        return (centre + 0.3 * (centre or 1) * rng.standard_normal(shape.shape)).astype(shape.dtype)

    return jax.tree.map_with_path(leaf, abstract_params(config))


def _numpy_loss(config: hn.ModelConfig, params: Any, tokens: np.ndarray) -> float:
    logits = forward(config, params, tokens)[:, :-1]
    logits = logits - logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return float(-np.take_along_axis(log_p, tokens[:, 1:, None], -1).mean())


def generation(scheme: str) -> str:
    """Logits of a text read token by token, with the cache of keys and values, are those of the whole text."""
    config = hn.ModelConfig(**keys_of(scheme), **TINY)
    assert_cached_is_whole(config, draw(config), read=1, first=np.array([0, 0]))
    return "cached = whole"


def exported(scheme: str) -> float:
    """The largest difference of logits in float64 between our Decoder and the PyTorch files of `hybridnorm export`."""
    with tempfile.TemporaryDirectory() as directory, jax.enable_x64(True):
        config = config_of(scheme, dtype="float64", param_dtype="float64")
        config, params, path = export(Path(directory) / "model", config)
        logits = np.asarray(jax.jit(hn.Decoder(config).apply)({"params": params}, TOKENS))
        with torch.no_grad():
            difference = float(np.abs(in_torch(path)(ids(TOKENS)).logits.numpy() - logits).max())
    assert difference < 1e-12, difference
    return difference


def converted(scheme: str) -> str:
    """The conversion of the scheme's LayerNorm model to both cheaper forms, equal in float64; or why it is refused."""
    keys = {"norm": "layernorm", "norm_bias": True, "activation": "gelu"}
    config = config_of(scheme, dtype="float64", param_dtype="float64", **keys)
    forms = (hn.equivalence.to_pre_rmsnorm, hn.equivalence.to_pre_crmsnorm)
    with jax.enable_x64(True):
        params = draw(config)
        obstacle = config.pre_layernorm_obstacle
        if obstacle is not None:
            for form in forms:
                with pytest.raises(hn.ConfigError, match=re.escape(obstacle)):
                    form(config, params)
            return obstacle.removeprefix(f"model.scheme={scheme}: ")
        expected = jax.jit(hn.Decoder(config).apply)({"params": params}, TOKENS)
        for form in forms:
            cheaper, theirs = form(config, params)
            assert cheaper.norm != "layernorm"
            logits = jax.jit(hn.Decoder(cheaper).apply)({"params": theirs}, TOKENS)
            np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-10)
    return "yes"


CHECKS: dict[str, Callable[[str], Any]] = {
    "golden": golden,
    "gradients": gradients,
    "generation": generation,
    "export": exported,
    "convert": converted,
}


def row(scheme: str) -> dict[str, Any]:
    """What all checks of a scheme give; the first that fails raises."""
    found = {name: check(scheme) for name, check in CHECKS.items()}
    return {"digest": digest(scheme), **found, "date": datetime.date.today().isoformat(), "machine": machine()}


def machine() -> str:
    """The machine and the versions, in words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")] or [platform.machine()]
    versions = f"JAX {jax.__version__}, NumPy {np.__version__}, PyTorch {torch.__version__}"
    return f"a CPU ({names[0]}), {versions}, Python {platform.python_version()}"


def main(names: list[str]) -> None:
    """Check these schemes, or all, and write their rows; a scheme that is no longer in the table loses its row."""
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names or hn.SCHEMES:
        rows[name] = row(name)
        rows = {scheme: rows[scheme] for scheme in hn.SCHEMES if scheme in rows}
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
        print(name, rows[name], flush=True)
        jax.clear_caches()


if __name__ == "__main__":
    main(sys.argv[1:])
