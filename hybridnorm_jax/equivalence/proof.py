"""Evidence that a converted model is the one it was made of: differences of logits and means of streams, as a table."""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from hybridnorm_jax.config import ModelConfig
from hybridnorm_jax.equivalence.decoder_forms import Conversion, conversion_of
from hybridnorm_jax.equivalence.invariants import forward
from hybridnorm_jax.norms import zero_mean_defect

ARITHMETICS = ("float64", "float32", "bfloat16")
WRITTEN = "as written"
# Two float64 forward passes differ by 1e-15 to 1e-12; a wrong conversion by 1e-3 at least.
LARGEST_RELATIVE = 1e-9
# Rounding parameters to float32 moves logits by 1e-7 to 1e-5.
LARGEST_WRITTEN = 1e-4


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of the logits of two models on the same tokens: largest and mean absolute difference, and the largest logit."""

    largest: float
    mean: float
    logit: float

    @property
    def relative(self) -> float:
        """The largest difference over the largest logit; 0 where nothing differs."""
        return self.largest / self.logit if self.logit else (math.inf if self.largest else 0.0)


@dataclasses.dataclass(frozen=True)
class Proof:
    """What was measured.

    Attributes:
      logits: (row, name of the tokens) -> Difference; the rows are float64 (parameters converted in float64), "as
        written" (parameters as they are written, in float64 arithmetic), float32 and bfloat16 (both models in that
        arithmetic, the converted one as written).
      means: column -> largest |mean| / rms of the full-width stream after the embedding and after every block; the
        columns are "Pre-LN" (in float64) and the arithmetics.
      parameters: number of parameters before and after.
    """

    logits: Mapping[tuple[str, str], Difference]
    means: Mapping[str, np.ndarray]
    parameters: tuple[int, int]

    @property
    def holds(self) -> bool:
        """Whether the conversion agrees to LARGEST_RELATIVE, and what is written to LARGEST_WRITTEN, on all tokens."""
        limits = {"float64": LARGEST_RELATIVE, WRITTEN: LARGEST_WRITTEN}
        # Written so that NaN fails.
        return all(row.relative <= limits[name] for (name, _), row in self.logits.items() if name in limits)

    def worst(self, name: str) -> float:
        """The largest relative difference in this row."""
        return max(row.relative for (row_name, _), row in self.logits.items() if row_name == name)


def prove(
    config: ModelConfig,
    params: Any,
    conversion: Conversion,
    written: Any,
    tokens: Mapping[str, Int[Array, "batch seq"]],
) -> Proof:
    """Compare the model with its converted form on every set of tokens in every arithmetic; needs jax_enable_x64.

    Args:
      params: of the Pre-LN model of this config.
      written: parameters of conversion.config as they will be used; float32 and bfloat16 arithmetic runs on these,
        float64 arithmetic on parameters converted in float64.
      tokens: name -> tokens.
    """
    full = conversion_of(config, "pre_rmsnorm")
    exact = cast(params, jnp.float64)
    exact_form, centred = conversion.convert(exact), full.convert(exact)
    logits: dict[tuple[str, str], Difference] = {}
    means: dict[str, list] = {}
    for name, ids in tokens.items():
        for arithmetic in ARITHMETICS:
            ours, theirs = (exact, exact_form) if arithmetic == "float64" else (params, written)
            expected, stream = _run(dataclasses.replace(config, dtype=arithmetic), ours, ids)
            found, _ = _run(dataclasses.replace(conversion.config, dtype=arithmetic), theirs, ids)
            logits[arithmetic, name] = _difference(found, expected)
            if arithmetic == "float64":
                wide = cast(written, jnp.float64)
                rounded, _ = _run(dataclasses.replace(conversion.config, dtype=arithmetic), wide, ids)
                logits[WRITTEN, name] = _difference(rounded, expected)
                means.setdefault("Pre-LN", []).append(_means(stream))
            narrow = centred if arithmetic == "float64" else cast(centred, jnp.float32)
            _, stream = _run(dataclasses.replace(full.config, dtype=arithmetic), narrow, ids)
            means.setdefault(arithmetic, []).append(_means(stream))
    sizes = tuple(sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) for tree in (params, written))
    return Proof(logits, {name: np.max(columns, axis=0) for name, columns in means.items()}, sizes)


def cast(params: Any, dtype: Any) -> Any:
    """All parameters in this dtype."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


def table(proof: Proof) -> str:
    """The proof as aligned text."""
    sets = list(dict.fromkeys(name for _, name in proof.logits))
    lines = [
        "logits, converted - original (absolute; relative: largest over the largest logit)",
        f"{'':12}" + "".join(f"{name:>28}" for name in sets),
    ]
    lines.append(f"{'arithmetic':12}" + f"{'max':>9}{'mean':>9}{'relative':>10}" * len(sets))
    for arithmetic in ("float64", WRITTEN, "float32", "bfloat16"):
        rows = [proof.logits[arithmetic, name] for name in sets]
        cells = [f"{row.largest:9.1e}{row.mean:9.1e}{row.relative:10.1e}" for row in rows]
        lines.append(f"{arithmetic:12}" + "".join(cells))
    lines += [
        "",
        "largest |mean| / rms of the full stream: the original's, and in Pre-RMSNorm form",
        f"{'after':12}" + "".join(f"{name:>10}" for name in proof.means),
    ]
    for layer in range(len(proof.means["Pre-LN"])):
        place = "embedding" if layer == 0 else f"block {layer}"
        lines.append(f"{place:12}" + "".join(f"{column[layer]:10.1e}" for column in proof.means.values()))
    before, after = proof.parameters
    lines += ["", f"parameters: {before:,} -> {after:,} (norms' are folded into biases, a tied head is untied)"]
    return "\n".join(lines)


@partial(jax.jit, static_argnums=0)
def _run(config: ModelConfig, params: Any, tokens: Array) -> tuple[Array, Array]:
    return forward(config, params, tokens)


def _difference(found: Array, expected: Array) -> Difference:
    gap = jnp.abs(found.astype(jnp.float64) - expected.astype(jnp.float64))
    return Difference(float(gap.max()), float(gap.mean()), float(jnp.abs(expected).max()))


def _means(streams: Array) -> np.ndarray:
    # zero_mean_defect counts in units of a random vector's mean, rms / sqrt(width).
    return np.asarray(jax.vmap(zero_mean_defect)(streams)) / streams.shape[-1] ** 0.5
