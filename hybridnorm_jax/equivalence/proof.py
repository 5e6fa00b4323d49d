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

from hybridnorm_jax.equivalence.decoder_forms import Conversion
from hybridnorm_jax.equivalence.expert_choices import TIE, compare_routing
from hybridnorm_jax.equivalence.forms import conversion_of
from hybridnorm_jax.equivalence.forward_pass import ForwardPass, compared, forward
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.norm_functions import zero_mean_defect

ARITHMETICS = ("float64", "float32", "bfloat16")
WRITTEN = "as written"
# Two float64 forward passes differ by 1e-15 to 1e-12; a wrong conversion by 1e-3 at least.
LARGEST_RELATIVE = 1e-9
# Rounding parameters to float32 moves logits by 1e-7 to 1e-5.
LARGEST_WRITTEN = 1e-4


@dataclasses.dataclass(frozen=True)
class Choices:
    """How two mixtures of experts chose on the same tokens; see expert_choices.py.

    Attributes:
      differ: share of the choices, one for each token and layer, that differ.
      left_out: share of the tokens, or of an encoder's inputs, that such a choice has reached.
      rest: largest absolute difference of the other tokens' logits.
      routers: as RoutingDifference's, the largest of all layers.
      ties: as RoutingDifference's, the largest of all layers.
    """

    differ: float
    left_out: float
    rest: float
    routers: float
    ties: float


@dataclasses.dataclass(frozen=True)
class Difference:
    """How the logits of two models differ on the same tokens.

    Attributes:
      largest: absolute difference.
      mean: absolute difference.
      logit: the largest absolute value that was expected.
      choices: None for models without experts.
    """

    largest: float
    mean: float
    logit: float
    choices: Choices | None = None

    @property
    def relative(self) -> float:
        """The largest difference over the largest logit; 0 where nothing differs."""
        return self._over_logit(self.largest)

    @property
    def unexplained(self) -> float:
        """`relative`, less what experts that tie explain.

        With experts, the largest of: the difference of logits that no different choice has reached, over the largest
        logit; the difference of routers; the gap of scores that should tie, in units of what that difference explains.
        Infinite where every token was reached, so that no logits were compared.
        """
        choices = self.choices
        if choices is None:
            return self.relative
        if choices.left_out == 1:
            return math.inf
        # np.max, unlike max, keeps NaN.
        return float(np.max([self._over_logit(choices.rest), choices.routers, choices.ties / TIE]))

    def _over_logit(self, difference: float) -> float:
        if self.logit:
            return difference / self.logit
        return math.inf if difference else 0.0


@dataclasses.dataclass(frozen=True)
class Proof:
    """What was measured.

    Attributes:
      compared: what `logits` is about, in words: of most encoders it is not logits.
      logits: (row, name of the tokens) -> Difference; the rows are float64 (parameters converted in float64), "as
        written" (parameters as they are written, in float64 arithmetic), float32 and bfloat16 (both models in that
        arithmetic, the converted one as written).
      means: column -> largest |mean| / rms of the full-width stream after the embedding and after every block; the
        columns are "Pre-LN" (in float64) and the arithmetics.
      parameters_before: number of parameters of the Pre-LN model.
      parameters_after: number of parameters of the converted one.
    """

    compared: str
    logits: Mapping[tuple[str, str], Difference]
    means: Mapping[str, np.ndarray]
    parameters_before: int
    parameters_after: int

    @property
    def holds(self) -> bool:
        """Whether the conversion agrees to LARGEST_RELATIVE, and what is written to LARGEST_WRITTEN, on all tokens."""
        # Written so that NaN fails.
        return self.worst("float64") <= LARGEST_RELATIVE and self.worst(WRITTEN) <= LARGEST_WRITTEN

    def worst(self, name: str) -> float:
        """The largest relative difference in this row; "as written", experts that tie may excuse one (`unexplained`).

        Rounding parameters to float32 moves scores far enough to meet a tie among thousands; float64 arithmetic is not.
        """
        rows = [row for (row_name, _), row in self.logits.items() if row_name == name]
        return float(np.max([row.unexplained if name == WRITTEN else row.relative for row in rows]))


@dataclasses.dataclass(frozen=True)
class _Trees:
    """The parameters that run in one arithmetic: of the Pre-LN model, converted, and in Pre-RMSNorm form."""

    original: Any
    converted: Any
    centred: Any


def prove(
    config: ModelConfig,
    params: Any,
    conversion: Conversion,
    written: Any,
    tokens: Mapping[str, Int[Array, "batch seq"]],
) -> Proof:
    """Compare the model with its converted form on every set of tokens in every arithmetic; needs jax_enable_x64.

    Args:
      config: of the Pre-LN model.
      params: of the Pre-LN model.
      conversion: of models of this config.
      written: parameters of conversion.config as they will be used; float32 and bfloat16 arithmetic runs on these,
        float64 arithmetic on parameters converted in float64.
      tokens: name -> tokens.
    """
    full = conversion_of(config, "pre_rmsnorm")
    exact = cast(params, jnp.float64)
    wide = _Trees(original=exact, converted=conversion.convert(exact), centred=full.convert(exact))
    narrow = _Trees(original=params, converted=written, centred=cast(wide.centred, jnp.float32))
    logits: dict[tuple[str, str], Difference] = {}
    means: dict[str, list[np.ndarray]] = {name: [] for name in ("Pre-LN", *ARITHMETICS)}
    for name, ids in tokens.items():
        for arithmetic in ARITHMETICS:
            trees = wide if arithmetic == "float64" else narrow
            expected = _run(dataclasses.replace(config, dtype=arithmetic), trees.original, ids)
            converted = dataclasses.replace(conversion.config, dtype=arithmetic)
            logits[arithmetic, name] = _difference(config, _run(converted, trees.converted, ids), expected)
            if arithmetic == "float64":
                rounded = _run(converted, cast(written, jnp.float64), ids)
                logits[WRITTEN, name] = _difference(config, rounded, expected)
                means["Pre-LN"].append(_means(expected.stream))
            centred = _run(dataclasses.replace(full.config, dtype=arithmetic), trees.centred, ids)
            means[arithmetic].append(_means(centred.stream))
    return Proof(
        compared=compared(config),
        logits=logits,
        means={name: np.max(columns, axis=0) for name, columns in means.items()},
        parameters_before=_number_of_parameters(params),
        parameters_after=_number_of_parameters(written),
    )


def _number_of_parameters(params: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


@partial(jax.jit, static_argnums=1)
def cast(params: Any, dtype: Any) -> Any:
    """All parameters in this dtype."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


def table(proof: Proof) -> str:
    """The proof as aligned text."""
    lines = _logits_table(proof)
    lines += [
        "",
        "largest |mean| / rms of the full stream: the original's, and in Pre-RMSNorm form",
        f"{'after':12}" + "".join(f"{name:>10}" for name in proof.means),
    ]
    for layer in range(len(proof.means["Pre-LN"])):
        place = "embedding" if layer == 0 else f"block {layer}"
        lines.append(f"{place:12}" + "".join(f"{column[layer]:10.1e}" for column in proof.means.values()))
    sizes = f"{proof.parameters_before:,} -> {proof.parameters_after:,}"
    lines += ["", f"parameters: {sizes} (what norms had is folded into what reads them)"]
    return "\n".join(lines)


def _logits_table(proof: Proof) -> list[str]:
    """A line for each arithmetic, with some columns for each set of tokens."""
    sets = list(dict.fromkeys(name for _, name in proof.logits))
    routed = any(row.choices for row in proof.logits.values())
    columns = f"{'max':>9}{'mean':>9}{'relative':>10}"
    if routed:
        columns += f"{'choices':>9}{'tokens':>8}{'rest':>9}"
    lines = [
        f"{proof.compared}, converted - original (absolute; relative: largest over the largest expected)",
        f"{'':12}" + "".join(f"{name:>{len(columns)}}" for name in sets),
        f"{'arithmetic':12}" + columns * len(sets),
    ]
    for arithmetic in ("float64", WRITTEN, "float32", "bfloat16"):
        lines.append(f"{arithmetic:12}" + "".join(_cells(proof.logits[arithmetic, name]) for name in sets))
    if routed:
        lines += [
            "choices: how many differ, of all tokens in all layers; where experts' scores tie, rounding decides, and",
            "what follows differs by more. tokens: how many that reaches; rest: max of all others, - if none is left",
        ]
    return lines


def _cells(row: Difference) -> str:
    """The columns of one set of tokens."""
    cells = f"{row.largest:9.1e}{row.mean:9.1e}{row.relative:10.1e}"
    if row.choices is None:
        return cells
    rest = "-" if row.choices.left_out == 1 else f"{row.choices.rest:.1e}"
    return cells + f"{row.choices.differ:9.2%}{row.choices.left_out:8.1%}{rest:>9}"


@partial(jax.jit, static_argnums=0)
def _run(config: ModelConfig, params: Any, tokens: Array) -> ForwardPass:
    return forward(config, params, tokens)


def _difference(config: ModelConfig, found: ForwardPass, expected: ForwardPass) -> Difference:
    gap, largest, mean, logit = _gaps(found.output, expected.output)
    choices = None
    if expected.routing is not None:
        routing = compare_routing(found.routing, expected.routing, is_causal=config.is_causal)
        left_out = routing.left_out[-1]
        if left_out.shape != gap.shape[:2]:  # one row of all that an encoder gives
            left_out = left_out.any(-1, keepdims=True)
        choices = Choices(
            differ=float(routing.chosen.mean()),
            left_out=float(left_out.mean()),
            rest=float(jnp.where(left_out[..., None], 0, gap).max()),
            routers=float(routing.routers.max()),
            ties=float(routing.ties.max()),
        )
    return Difference(
        largest=float(largest),
        mean=float(mean),
        logit=float(logit),
        choices=choices,
    )


@jax.jit
def _gaps(found: Array, expected: Array) -> tuple[Array, Array, Array, Array]:
    """The absolute differences in float64, the largest of them and their mean; and the largest absolute value."""
    gap = jnp.abs(found.astype(jnp.float64) - expected.astype(jnp.float64))
    return gap, gap.max(), gap.mean(), jnp.abs(expected).max()


def _means(streams: Array) -> np.ndarray:
    # zero_mean_defect counts in units of a random vector's mean, rms / sqrt(width).
    return np.asarray(_defects(streams)) / streams.shape[-1] ** 0.5


_defects = jax.jit(jax.vmap(zero_mean_defect))
