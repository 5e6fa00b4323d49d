"""The sizes of a model, and how its keys are checked: the first of the classes that ModelConfig is made of."""

import dataclasses
from typing import Any

from hybridnorm_jax.config_fields import Filled, check, key

# Limits of several keys, and of all together. The largest models that were trained have 10^12 parameters.
WIDEST = 1_048_576
MOST_LAYERS = 10_000
MOST_HEADS = 65_536
MOST_EXPERTS = 65_536
LONGEST_CONTEXT = 16_777_216
MOST_PARAMETERS = 10**14


@dataclasses.dataclass(frozen=True)
class SizeKeys:
    """The scheme and the sizes."""

    scheme: str = key("hybrid_star", "norm placement, a name in hybridnorm_jax.SCHEMES")
    d_model: int = key(768, "width of the residual stream", at_least=1, at_most=WIDEST)
    num_layers: int = key(12, "number of blocks (attention + feed-forward)", at_least=1, at_most=MOST_LAYERS)
    num_heads: int = key(12, "query heads", at_least=1, at_most=MOST_HEADS)
    num_kv_heads: Filled[int] = key(None, "key and value heads; null: num_heads", at_least=1, at_most=MOST_HEADS)
    head_dim: Filled[int] = key(None, "width of one head; null: d_model / num_heads", at_least=1, at_most=WIDEST)
    mlp_dim: Filled[int] = key(
        None,
        "width of the feed-forward layer, or of each expert; null: 4 d_model, or 8/3 d_model for gated ones",
        at_least=1,
        at_most=16 * WIDEST,
    )
    vocab_size: int = key(50304, "rows of the token embedding", at_least=1, at_most=16_777_216)

    def _fill(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check(self, name: str, is_right: bool, right: str) -> None:
        """Raise ConfigError(`model.name=value: right`) unless this field is right."""
        check(is_right, f"model.{name}", getattr(self, name), right)

    def _fill_sizes(self) -> None:
        """Replace null by the value it stands for, so that every reader sees plain numbers."""
        if self.num_kv_heads is None:
            self._fill("num_kv_heads", self.num_heads)
        if self.head_dim is None:
            divisible = self.d_model % self.num_heads == 0
            self._check("num_heads", divisible, f"must divide model.d_model={self.d_model}, or set model.head_dim")
            self._fill("head_dim", self.d_model // self.num_heads)

    def _check_heads(self) -> None:
        divisible = self.num_heads % self.num_kv_heads == 0
        self._check("num_kv_heads", divisible, f"must divide model.num_heads={self.num_heads}")

    def _by_layer(self, pattern: tuple[int, ...], otherwise: int) -> tuple[int, ...]:
        """A number for each layer: the pattern again and again, or the same number everywhere where it is empty."""
        whole = pattern or (otherwise,)
        return tuple(whole[layer % len(whole)] for layer in range(self.num_layers))
