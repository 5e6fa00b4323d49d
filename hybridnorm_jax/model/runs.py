"""The layers of a model in order, and the runs of them that one loop can compute."""

import dataclasses
from collections.abc import Iterable

from hybridnorm_jax.model.placement import BlockPlacement, Scales, Starts, SublayerName


@dataclasses.dataclass(frozen=True)
class Layer:
    """What one layer of a model is, as far as layers differ.

    Attributes:
      placement: where it normalizes.
      has_experts: whether its feed-forward layer is one of experts.
      window: how many positions a token sees, its own and those just before; 0: all.
      rotation: of q and k: 1 the model's first, 2 its second, 0 none.
    """

    placement: BlockPlacement
    has_experts: bool = False
    window: int = 0
    rotation: int = 1

    def may_follow(self, other: "Layer") -> bool:
        """Whether one loop can compute both: they differ in numbers alone."""
        return self.has_experts == other.has_experts and self.placement.structure == other.placement.structure


@dataclasses.dataclass(frozen=True)
class Run:
    """Consecutive layers of one structure: one scan.

    Attributes:
      start: number of the first layer, from 0.
      layers: first to last.
    """

    start: int
    layers: tuple[Layer, ...]

    @property
    def structure(self) -> BlockPlacement:
        """What the placements of the layers have in common, with every scale 1."""
        return self.layers[0].placement.structure

    @property
    def has_experts(self) -> bool:
        """Whether the feed-forward layers are of experts."""
        return self.layers[0].has_experts

    @property
    def length(self) -> int:
        """The number of layers."""
        return len(self.layers)

    @property
    def window(self) -> int | None:
        """The window of all layers, see Layer; None: they differ."""
        first, *others = {layer.window for layer in self.layers}
        return None if others else first

    def within(self, seq: int) -> "Run":
        """This run for sequences of this length: a window that hides nothing of them is none."""
        layers = (dataclasses.replace(each, window=each.window if each.window < seq else 0) for each in self.layers)
        return dataclasses.replace(self, layers=tuple(layers))

    @property
    def rotations(self) -> list[int]:
        """The rotations that its layers have, see Layer, each once."""
        return sorted({layer.rotation for layer in self.layers})

    @property
    def rotation(self) -> int | None:
        """The rotation of all layers; None: they differ."""
        return self.rotations[0] if len(self.rotations) == 1 else None

    @property
    def places_of_rotations(self) -> list[int]:
        """Of each layer the place of its rotation in `rotations`."""
        return [self.rotations.index(layer.rotation) for layer in self.layers]

    def scales(self, sublayer: SublayerName) -> Scales[tuple[float, ...] | None]:
        """Of each scale of this sublayer one number per layer, or None where it is 1 in every layer."""
        layers = [getattr(layer.placement, sublayer).scales for layer in self.layers]
        return Scales(
            residual=_unless_all_one(layer.residual for layer in layers),
            branch=_unless_all_one(layer.branch for layer in layers),
            input=_unless_all_one(layer.input for layer in layers),
            side=_unless_all_one(layer.side for layer in layers),
        )

    def starts(self, sublayer: SublayerName) -> Starts[tuple[float, ...] | None]:
        """Of each learned scale of this sublayer one start per layer, or None where it is 1 in every layer."""
        layers = [getattr(layer.placement, sublayer).starts for layer in self.layers]
        return Starts(
            pre=_unless_all_one(layer.pre for layer in layers),
            branch=_unless_all_one(layer.branch for layer in layers),
            layer_scale=_unless_all_one(layer.layer_scale for layer in layers),
        )


def _unless_all_one(values: Iterable[float]) -> tuple[float, ...] | None:
    column = tuple(values)
    return None if all(value == 1.0 for value in column) else column


def runs(layers: Iterable[Layer]) -> tuple[Run, ...]:
    """Group consecutive layers that differ in numbers only."""
    found: list[Run] = []
    for number, layer in enumerate(layers):
        if found and layer.may_follow(found[-1].layers[-1]):
            found[-1] = dataclasses.replace(found[-1], layers=(*found[-1].layers, layer))
        else:
            found.append(Run(start=number, layers=(layer,)))
    return tuple(found)
