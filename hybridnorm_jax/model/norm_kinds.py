"""NORM_KINDS, the table of every kind of norm that a model can have (`model.norm`, hn.Norm).

A kind of your own is one more entry, in a file of your own that run.plugins names:

    import jax.numpy as jnp
    import hybridnorm_jax as hn

    @hn.norm_kind("softsign", parameters=[hn.NormParameter("alpha", start=0.5)])
    def softsign(x, alpha):
        return alpha * x / (1 + jnp.abs(alpha * x))

`python train.py run.plugins=[my_norms.py] model.norm=softsign` then trains with it.

Nothing here imports JAX before a norm is computed, so that the kinds can be listed at once.
"""

import dataclasses
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Array

# It becomes part of file names, such as those of plans.
LONGEST_NAME = 60
LARGEST_SIZE = 65_536
LARGEST_START = 1_000_000
# What stands in a shape for the size of what is normalized.
WIDTH = "width"
# The arguments that a kind's function has besides x and its own parameters.
AFFINE = ("scale", "bias")
# Names that mean something else where a norm has its parameters.
TAKEN = ("x", *AFFINE, "kernel", "embedding", "linen")


@dataclasses.dataclass(frozen=True)
class NormParameter:
    """A parameter that a kind of norm has besides scale and bias.

    Attributes:
      name: of the function's argument, and of the leaf in the tree of parameters.
      shape: one or two sizes, each a number or "width", the number of channels that are normalized; (1,) is one number.
      start: the value that all of it starts at; None, for matrices: normal numbers of variance 1 / shape[0].
    """

    name: str
    shape: tuple[int | str, ...] = (1,)
    start: float | None = 1.0

    def __post_init__(self) -> None:
        is_name = isinstance(self.name, str) and self.name.isidentifier() and len(self.name) <= LONGEST_NAME
        # Flax's dictionaries of parameters have their keys as attributes, which must not hide their methods.
        if not is_name or self.name in TAKEN or self.name.startswith("_") or hasattr(dict, self.name):
            right = f"must be an identifier without a leading _, none of {', '.join(TAKEN)}, and no method of dict"
            raise ValueError(f"a norm's parameter is named {self.name!r:.80}: {right}")
        if not isinstance(self.shape, tuple) or len(self.shape) not in (1, 2) or not all(map(_is_size, self.shape)):
            right = f'must be a tuple of one or two sizes, each "{WIDTH}" or a number from 1 to {LARGEST_SIZE:,}'
            raise ValueError(f"the norm's parameter {self.name}: shape={self.shape!r:.80} {right}")
        if self.start is None:
            if len(self.shape) == 1:
                raise ValueError(f"the norm's parameter {self.name}: start=None is for matrices; must be a number")
        elif not _is_number(self.start):
            raise ValueError(f"the norm's parameter {self.name}: start={self.start!r:.80} must be a finite number")

    @property
    def is_matrix(self) -> bool:
        """Whether it has two axes."""
        return len(self.shape) == 2

    def sizes(self, width: int) -> tuple[int, ...]:
        """The shape where so many channels are normalized."""
        return tuple(width if isinstance(size, str) else size for size in self.shape)


def _is_size(size: Any) -> bool:
    return size == WIDTH or (type(size) is int and 1 <= size <= LARGEST_SIZE)


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and abs(value) <= LARGEST_START


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormKind:
    """A kind of norm: its function, and what the library has to know of it.

    Attributes:
      name: the key in NORM_KINDS, and the value of model.norm.
      function: the name of one in norm_functions.py, or a plugin's function of (x, **parameters), which gets its scale
        and bias from the library.
      formula: of the whole, w the scale and b the bias.
      source: the paper and the code that it was compared with.
      parameters: those besides scale and bias.
      settings: which of "eps", "axis" and "width" the function takes.
      usual_bias: whether hn.Norm has a bias where it is not asked.
      is_layer_norm: whether the kind subtracts the mean and divides by the deviation, so that a Pre-LN model of it
        converts to Pre-RMSNorm.
      drops_last: whether it reads zero-mean vectors that are stored without their last element.
      for_heads: whether norms of q, k, v and the context may be of this kind.
      in_kernels: whether an attention kernel can apply it to the heads on its way in.
    """

    name: str
    function: "str | Callable[..., Any]"
    formula: str = ""
    source: str = ""
    parameters: tuple[NormParameter, ...] = ()
    settings: tuple[str, ...] = ()
    usual_bias: bool = False
    is_layer_norm: bool = False
    drops_last: bool = False
    for_heads: bool = True
    in_kernels: bool = False

    @property
    def is_plugin(self) -> bool:
        """Whether the function is a user's own."""
        return not isinstance(self.function, str)

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """The names of the parameters besides scale and bias."""
        return tuple(parameter.name for parameter in self.parameters)

    @property
    def has_wide_matrices(self) -> bool:
        """Whether it has matrices over the channels, which heads cannot have one each of."""
        return any(parameter.is_matrix and WIDTH in parameter.shape for parameter in self.parameters)

    @property
    def callable(self) -> "Callable[..., Array]":
        """(x, scale, bias, **parameters, **settings) -> the normalized array."""
        from hybridnorm_jax.model import norm_functions

        if isinstance(self.function, str):
            function: Callable[..., Array] = getattr(norm_functions, self.function)
            return function
        return functools.partial(norm_functions.plugin_norm, self.name, self.function)


def _gate(name: str, shape: tuple[int | str, ...]) -> NormParameter:
    return NormParameter(name, shape=shape, start=None)


_KINDS = (
    NormKind(
        name="rmsnorm",
        function="rms_norm",
        formula="w * x / sqrt(mean(x^2) + eps) + b",
        source="RMSNorm, as in Pre-RMSNorm (2305.14858)",
        settings=("eps", "axis"),
        in_kernels=True,
    ),
    NormKind(
        name="layernorm",
        function="layer_norm",
        formula="w * (x - mean(x)) / sqrt(variance(x) + eps) + b",
        source="LayerNorm, as in Pre-RMSNorm (2305.14858)",
        settings=("eps", "axis"),
        usual_bias=True,
        is_layer_norm=True,
        in_kernels=True,
    ),
    NormKind(
        name="crmsnorm",
        function="crms_norm",
        formula="w * x / sqrt((sum(x^2) + sum(x)^2) / width + eps) + b",
        source="CRMSNorm, Pre-RMSNorm (2305.14858), eq. 5",
        settings=("eps", "width"),
        drops_last=True,
        for_heads=False,  # a head is no zero-mean vector
    ),
    NormKind(
        name="dyt",
        function="dyt",
        formula="w * tanh(alpha * x) + b",
        source="DyT (2503.10622); compared with the authors' code (jiachenzhu/DyT)",
        parameters=(NormParameter("alpha", start=0.5),),
        usual_bias=True,
    ),
    NormKind(
        name="derf",
        function="derf",
        formula="w * erf(alpha * x + shift) + b",
        source="Derf (2512.10938); compared with the authors' code (zlab-princeton/Derf)",
        parameters=(NormParameter("alpha", start=0.5), NormParameter("shift", start=0.0)),
        usual_bias=True,
    ),
    NormKind(
        name="bhyt",
        function="bhyt",
        formula="w * tanh(0.1 * lam * x / sqrt(mean(x^2) + eps)) + b",
        source="BHyT; compared with the authors' code (MLAI-Yonsei/BHyT), the class with the star, eps 1e-6",
        parameters=(NormParameter("lam", start=2.0),),
        settings=("eps", "axis"),
    ),
    NormKind(
        name="gated",
        function="gated_norm",
        formula="y * sigmoid(silu(y @ down) @ up), y = w * x / sqrt(mean(x^2) + eps) + b, rank 16",
        source="GatedNorm (2601.22966); equation only, from a third party; the starts of down and up are ours",
        parameters=(_gate("down", (WIDTH, 16)), _gate("up", (16, WIDTH))),
        settings=("eps",),
        for_heads=False,  # no published model has it there
    ),
)
NORM_KINDS: dict[str, NormKind] = {kind.name: kind for kind in _KINDS}


def norm_kind(
    name: str, *, parameters: Iterable[NormParameter] = (), formula: str = "", source: str = ""
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: enter a function of an array into NORM_KINDS.

    The function is called with x (..., width) and its parameters, by name, all in float32 at least. It returns an array
    of the shape and dtype of x. The library multiplies by the learned scale and adds the bias, as the model's keys
    say.

    Args:
      name: of the kind, as model.norm will name it.
      parameters: those that the function has besides x.
      formula, source: text for tables.

    Raises:
      ValueError: the name is taken; two parameters have one name; the function does not take x and the parameters; it
        fails, or returns another shape or dtype.
    """

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        _check_name(name)
        if not isinstance(parameters, Iterable):
            raise ValueError(f"norm kind {name!r}: parameters={parameters!r:.80}: must be a list of hn.NormParameter")
        own = tuple(parameters)
        _check_arguments(name, function, own)
        from hybridnorm_jax.model.norm_functions import check_plugin_norm

        check_plugin_norm(name, function, {parameter.name: parameter.sizes(8) for parameter in own})
        NORM_KINDS[name] = NormKind(name=name, function=function, parameters=own, formula=formula, source=source)
        return function

    return enter


def _check_name(name: Any) -> None:
    if not (isinstance(name, str) and name.isprintable() and 0 < len(name) <= LONGEST_NAME and name != "auto"):
        raise ValueError(f"a norm kind's name must be a text of 1 to {LONGEST_NAME} characters, not {name!r:.80}")
    if name in NORM_KINDS:
        raise ValueError(f"a norm kind named {name!r} already exists")


def _check_arguments(name: str, function: Any, parameters: tuple[Any, ...]) -> None:
    """Raise ValueError unless the function takes x and these parameters, and nothing else that it needs."""
    for parameter in parameters:
        if not isinstance(parameter, NormParameter):
            raise ValueError(f"norm kind {name!r}: parameters must be of hn.NormParameter, not {parameter!r:.80}")
    names = [parameter.name for parameter in parameters]
    for parameter in names:
        if names.count(parameter) > 1:
            raise ValueError(f"norm kind {name!r}: two parameters are named {parameter!r}")
    right = f"must be a function of one array x{''.join(f', {each}' for each in names)}"
    if isinstance(function, type) or not callable(function):
        raise ValueError(f"norm kind {name!r}: {right}, not {type(function).__name__}")
    try:
        inspect.signature(function).bind(object(), **dict.fromkeys(names))
    except (TypeError, ValueError) as error:
        raise ValueError(f"norm kind {name!r}: {right}; {error}") from error
