"""How a Hugging Face config.json states what differs from layer to layer: windows, rotations, experts."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from hybridnorm_jax.errors import UserError
from hybridnorm_jax.interop.hf_config_keys import Json, Key, none
from hybridnorm_jax.interop.hf_rope_keys import FULL, SLIDING
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.config_attention import FIRST_ROTATION, NO_ROTATION

WINDOW, LAYERS, USED = "sliding_window", "layer_types", "use_sliding_window"
# (layer, its document) -> whether the layer has a window where layer_types is absent.
Pattern = Callable[[int, Json], bool]


@dataclasses.dataclass(frozen=True)
class Windows:
    """sliding_window, and which layers have it.

    Attributes:
      default: of sliding_window where it is absent.
      is_optional: it counts where use_sliding_window is true alone, which by default it is not.
      pattern: with layer_types: which layers have it where layer_types is absent. None: all layers have it, and
        layer_types is no key of the architecture.
      numbers: further keys that the pattern reads -> their default.
    """

    default: int | None
    is_optional: bool = False
    pattern: Pattern | None = None
    numbers: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The keys that config.json may hold."""
        used = (USED,) if self.is_optional else ()
        layers = () if self.pattern is None else (LAYERS,)
        return (WINDOW, *used, *layers, *self.numbers)

    def read(self, document: Json, source: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """model.windows."""
        used = Key(USED, (), False).read(document, source) if self.is_optional else True
        window = Key(WINDOW, (), self.default, null=none, least=1).read(_without_zero(document, used), source)
        window = window if used else None
        numbers = {
            name: Key(name, (), default, null=none, least=0).read(document, source)
            for name, default in self.numbers.items()
        }
        seen = {WINDOW: window, "rope_layers": fields.get("rope_layers", ()), **numbers}
        layers = self._layers(document, source, fields["num_layers"], seen)
        if any(layers) and window is None:
            raise UserError(f"{source}: {WINDOW}=None, but layers of {SLIDING} need one")
        return {"windows": tuple((window or 0) if layer else 0 for layer in layers) if any(layers) else ()}

    def _layers(self, document: Json, source: str, num_layers: int, numbers: Json) -> list[bool]:
        """Of each layer, whether it has the window."""
        if self.pattern is None:
            return [numbers[WINDOW] is not None] * num_layers
        stated = document.get(LAYERS)
        if stated is None:
            missing = self.is_optional and numbers[WINDOW] is None
            return [not missing and self.pattern(layer, numbers) for layer in range(num_layers)]
        return _is_sliding(stated, num_layers, source)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The keys of a model; where its windows differ, one of them."""
        windows = config.layer_windows
        window = max(windows)
        keys: dict[str, Any] = {WINDOW: window or None}
        if self.is_optional:
            keys[USED] = window > 0
        if self.pattern is not None:
            keys[LAYERS] = [SLIDING if each else FULL for each in windows]
            # A class that always has layers with a window wants a number, which none of these layers reads.
            keys[WINDOW] = window or (None if self.is_optional else self.default)
        return keys


def _without_zero(document: Json, used: bool) -> Json:
    """The document, where a window that does not count is not looked at: some classes write 0 for it."""
    return document if used else {name: value for name, value in document.items() if name != WINDOW}


def _is_sliding(stated: Any, num_layers: int, source: str) -> list[bool]:
    """Of each layer, whether layer_types gives it a window."""
    if not isinstance(stated, list):
        raise UserError(f"{source}: {LAYERS}={stated!r:.80} must be a list")
    if len(stated) != num_layers:
        raise UserError(f"{source}: {LAYERS} has {len(stated)} entries, but there are {num_layers} layers")
    for kind in stated:
        if kind not in (FULL, SLIDING):
            raise UserError(f"{source}: {LAYERS}: {kind!r:.80} is not implemented; implemented: {FULL}, {SLIDING}")
    return [kind == SLIDING for kind in stated]


def every(number: str) -> Pattern:
    """All layers but each so many-th have the window; the key `number` says how many."""

    def pattern(layer: int, numbers: Json) -> bool:
        period = numbers[number]
        return period is not None and period > 0 and (layer + 1) % period != 0

    return pattern


def alternate(period: int) -> Pattern:
    """All layers but each `period`-th have the window."""
    return lambda layer, numbers: (layer + 1) % period != 0


def odd_layers_before(number: str) -> Pattern:
    """The first layer, the third and so on have the window, before the layer that the key `number` says."""
    return lambda layer, numbers: (layer + 1) % 2 == 1 and numbers[number] is not None and layer < numbers[number]


def without_rotation(layer: int, numbers: Json) -> bool:
    """The layers without rotation have the window."""
    rotations = numbers["rope_layers"]
    return bool(rotations) and not rotations[layer]


def from_layer(number: str) -> Pattern:
    """The layers from the one that the key `number` says have the window."""
    return lambda layer, numbers: numbers[number] is not None and layer >= numbers[number]


@dataclasses.dataclass(frozen=True)
class RotatingWhereWindowed:
    """Layers with a window rotate q and k, those without do not; no key says so."""

    @property
    def names(self) -> tuple[str, ...]:
        """None."""
        return ()

    def read(self, document: Json, source: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """model.rope_layers."""
        windows = fields["windows"] or (0,)
        return {"rope_layers": tuple(FIRST_ROTATION if window else NO_ROTATION for window in windows)}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Nothing."""
        return {}


@dataclasses.dataclass(frozen=True)
class NoRopeLayers:
    """no_rope_layers has 0 for each layer without rotation; where it is absent each interval-th layer has none.

    Attributes:
      interval: of no_rope_layer_interval where it is absent.
    """

    interval: int

    @property
    def names(self) -> tuple[str, ...]:
        """The keys that config.json may hold."""
        return ("no_rope_layers", "no_rope_layer_interval")

    def read(self, document: Json, source: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """model.rope_layers."""
        stated, num_layers = document.get("no_rope_layers"), fields["num_layers"]
        interval = Key("no_rope_layer_interval", (), self.interval, least=1).read(document, source)
        if stated is None:
            stated = [int((layer + 1) % interval != 0) for layer in range(num_layers)]
        if not isinstance(stated, list) or any(type(each) is not int or each not in (0, 1) for each in stated):
            raise UserError(f"{source}: no_rope_layers={stated!r:.80} must be a list of 0 and 1")
        if len(stated) != num_layers:
            raise UserError(f"{source}: no_rope_layers has {len(stated)} numbers, but there are {num_layers} layers")
        return {"rope_layers": () if all(stated) else tuple(stated)}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The keys of a model."""
        return {"no_rope_layers": [int(rotation != NO_ROTATION) for rotation in config.layer_rotations]}


@dataclasses.dataclass(frozen=True)
class DenseLayers:
    """mlp_only_layers and decoder_sparse_step: which of the layers have no experts, and how wide those are."""

    width: int

    @property
    def names(self) -> tuple[str, ...]:
        """The keys that config.json may hold."""
        return ("mlp_only_layers", "decoder_sparse_step", "intermediate_size")

    def read(self, document: Json, source: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        """model.dense_layers and model.dense_mlp_dim."""
        listed = document.get("mlp_only_layers")
        listed = [] if listed is None else listed
        if not isinstance(listed, list) or any(type(each) is not int for each in listed):
            raise UserError(f"{source}: mlp_only_layers={listed!r:.80} must be a list of numbers of layers")
        step = Key("decoder_sparse_step", (), 1, least=1).read(document, source)
        width = Key("intermediate_size", (), self.width, least=1).read(document, source)
        layers = range(fields["num_layers"])
        dense = tuple(layer for layer in layers if layer in listed or (layer + 1) % step)
        if len(dense) == len(layers):
            stated = f"mlp_only_layers={listed!r:.80}, decoder_sparse_step={step}"
            raise UserError(f"{source}: {stated}: no layer has experts, which is not implemented for this architecture")
        return {"dense_layers": dense, "dense_mlp_dim": width} if dense else {}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The keys of a model."""
        keys: dict[str, Any] = {"mlp_only_layers": list(config.dense_layers), "decoder_sparse_step": 1}
        return keys | ({"intermediate_size": config.dense_width} if config.dense_layers else {})
