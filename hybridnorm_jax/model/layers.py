"""The trunk of a model: its runs of blocks, each run under one nn.scan. Decoder and Encoder both call it."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core.scope import LazyRng
from jaxtyping import Array, Float, Int

from hybridnorm_jax.config_fields import present
from hybridnorm_jax.kernels.backend_names import SAVED
from hybridnorm_jax.kernels.precision import wide_dtype
from hybridnorm_jax.model.block import Block, LayerInputs, SharedInputs
from hybridnorm_jax.model.config import AUTO_REMAT, ModelConfig
from hybridnorm_jax.model.config_sizes import LONGEST_CONTEXT
from hybridnorm_jax.model.formula import ALL_ONE, StartArrays, Streams, shares
from hybridnorm_jax.model.input_checks import check_step
from hybridnorm_jax.model.placement import Scales, Starts, SublayerName
from hybridnorm_jax.model.ramps import ramp_lengths
from hybridnorm_jax.model.rotation import stacked
from hybridnorm_jax.model.runs import Run
from hybridnorm_jax.model.signal_measures import PROBE, SIGNAL
from hybridnorm_jax.model.watched_streams import CHOSEN, DEFECT, ROUTER, STREAM

_ATTENTION = jax.checkpoint_policies.save_only_these_names(SAVED)
# Of every layer its own.
COLLECTIONS = ("params", "intermediates", STREAM, DEFECT, ROUTER, CHOSEN, SIGNAL, PROBE)
# The streams of keys that a block draws from.
KEYS = ("params", "dropout")
# A window as wide as any text, where the layers of a run differ in theirs.
UNLIMITED = 2 * LONGEST_CONTEXT
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "all_but_attention": _ATTENTION,
    # With attention's result kept, the scores it came from, which are products too, need not be.
    "dots": jax.checkpoint_policies.save_from_both_policies(jax.checkpoint_policies.checkpoint_dots, _ATTENTION),
    "dots_no_batch": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
}


class ScannedBlock(Block):
    """Block as nn.scan calls it, with what differs between the layers of a run as scanned inputs.

    Attributes:
      run_has_experts: whether the feed-forward layers of the run are of experts.
      run_window: how many positions a token sees in all layers of the run; 0: all, or as LayerInputs says.
      deterministic: no dropout.
    """

    run_has_experts: bool = False
    run_window: int = 0
    deterministic: bool = True

    @property
    def window(self) -> int:
        """How many positions a token sees; 0: all."""
        return self.run_window

    @property
    def has_experts(self) -> bool:
        """Whether the feed-forward layer is one of experts."""
        return self.run_has_experts

    def __call__(  # type: ignore[override]
        self, streams: Streams, layer: LayerInputs, shared: SharedInputs
    ) -> tuple[Streams, None]:
        """(the streams after this block, None)."""
        # Flax folds a module's path into its keys, and the path of this block says which run it belongs to. So it gets
        # the layer's own keys, into which Flax then folds the path inside the block. No child may exist before this.
        present(self.scope).rngs = {name: LazyRng.create(key) for name, key in layer.keys.items()}
        return self.transform(streams, layer, shared, deterministic=self.deterministic), None


def through_layers(
    module: Any,
    streams: Streams,
    shared: SharedInputs,
    *,
    deterministic: bool,
    step: Int[Array, ""] | int | None = None,
    unrolled: bool = False,
) -> Streams:
    """The streams behind all layers of a model.

    Called in a compact method of `module`, whose parameters those of the layers become: `run_<i>`, or `layer_<i>` where
    unrolled.

    Args:
      module: a Decoder or an Encoder; it has a `config`.
      streams: before the first layer.
      shared: what is the same for all layers.
      deterministic: no dropout.
      step: of training, for branches that grow with it; see ramps.py.
      unrolled: no loop over the layers, see Decoder.

    Raises:
      ValueError: branches grow, and no step is given; or the other way round.
    """
    config: ModelConfig = module.config
    if module.is_initializing():
        step = 0 if config.grows else None
    elif config.grows and step is None:
        grow = f"the branches of model.scheme={config.scheme} grow with the training step"
        raise ValueError(f"step: {grow}; give it, or build the model of config.at_step(step)")
    elif step is not None and config.grows:
        check_step(step)
    elif step is not None:
        raise ValueError("step: nothing in this model grows with the training step; leave it out")
    keys = {name: module.make_rng(name) for name in KEYS if module.has_rng(name)}
    for number, run in enumerate(config.runs):
        run = run if unrolled else run.within(streams.main.shape[1])  # a cache may be longer than what is read at once
        layers = layer_inputs(run, config, keys, step=step, initializing=module.is_initializing())
        if unrolled:
            streams = _one_by_one(config, run, streams, layers, shared, deterministic=deterministic)
        else:
            of_run = _with_rotation(shared, run)
            blocks = _scanned(config, run, f"run_{number}", deterministic=deterministic, has_keys=bool(keys))
            streams, _ = blocks(streams, layers, of_run)
    return streams


def _with_rotation(shared: SharedInputs, run: Run) -> SharedInputs:
    """`shared` with the rotation of these layers, or with those that they choose from."""
    if run.rotation is not None:
        return dataclasses.replace(shared, rotations={}, rotation=shared.rotations.get(run.rotation))
    return dataclasses.replace(shared, rotations={}, rotation=stacked(shared.rotations, run.rotations))


def _one_by_one(
    config: ModelConfig, run: Run, streams: Streams, layers: LayerInputs, shared: SharedInputs, *, deterministic: bool
) -> Streams:
    """The blocks of a run, each by itself."""
    block = partial(
        ScannedBlock,
        config,
        placement=run.structure,
        run_has_experts=run.has_experts,
        deterministic=deterministic,
    )
    for place in range(run.length):
        layer = jax.tree.map(itemgetter(place), layers)
        kind = run.layers[place]
        layer = layer.replace(window=None, rotation=None)
        own = dataclasses.replace(shared, rotations={}, rotation=shared.rotations.get(kind.rotation))
        streams, _ = block(name=f"layer_{run.start + place}", run_window=kind.window)(streams, layer, own)
    return streams


def _scanned(config: ModelConfig, run: Run, name: str, *, deterministic: bool, has_keys: bool) -> nn.Module:
    """The blocks of a run, one after the other: (Streams, layer_inputs(run), SharedInputs) -> (Streams, None)."""
    # Flax can trace the block once more, to look for variables that all layers share. There are none, and tracing takes
    # longer than computing a small model. But the count of a block's keys goes on from one tracing to the next and is
    # folded into them: where there are keys, the same seed would give other numbers.
    block = ScannedBlock
    if config.remat not in ("none", AUTO_REMAT):
        # A loop keeps XLA from merging what is computed again with what was computed first; without one, a barrier.
        no_loop = config.scan_unroll >= run.length
        block = nn.remat(ScannedBlock, policy=REMAT_POLICIES[config.remat], prevent_cse=no_loop)
    scanned = nn.scan(
        block,
        variable_axes=dict.fromkeys(COLLECTIONS, 0),
        split_rngs=dict.fromkeys(KEYS, False),  # see ScannedBlock
        in_axes=(0, nn.broadcast),
        length=run.length,
        unroll=min(config.scan_unroll, run.length),
        check_constancy_invariants=has_keys,
    )
    return scanned(
        config=config,
        placement=run.structure,
        run_has_experts=run.has_experts,
        run_window=run.window or 0,
        deterministic=deterministic,
        name=name,
    )


def layer_inputs(
    run: Run,
    config: ModelConfig,
    keys: Mapping[str, Array],
    *,
    step: Int[Array, ""] | int | None = None,
    initializing: bool = False,
) -> LayerInputs:
    """The scanned inputs of a run: numbers of its layers, their scales and keys, and in what else they differ.

    A layer's keys depend on its number in the model and not on the run that it belongs to: so all schemes draw the same
    numbers for it.

    Args:
      config: of the model; the scales are in its dtype, in float32 at least.
      keys: of the whole model, by the name of their stream.
      step: of training, where branches grow with it.
      initializing: the layers draw their parameters, and so need to know where their learned scales start.
    """
    wide = wide_dtype(config.dtype)

    def columns(sublayer: SublayerName) -> Scales[Float[Array, " layers"] | None]:
        scales = Scales(*map(column, run.scales(sublayer)))
        ramp = getattr(run.structure, sublayer).branch_ramp
        if ramp is None:
            return scales
        lengths = ramp_lengths(ramp, config.num_layers, config.ramp_length)[run.start : run.start + run.length]
        share = shares(jnp.asarray(lengths, wide), 0 if step is None else step)
        return scales._replace(branch=share if scales.branch is None else share * scales.branch)

    def column(values: tuple[float, ...] | None) -> Float[Array, " layers"] | None:
        return None if values is None else jnp.asarray(np.asarray(values), wide)

    def starts(sublayer: SublayerName) -> StartArrays:
        if not initializing:
            return ALL_ONE
        of_layers = run.starts(sublayer)
        return Starts(
            pre=column(of_layers.pre), branch=column(of_layers.branch), layer_scale=column(of_layers.layer_scale)
        )

    layers = jnp.arange(run.start, run.start + run.length)
    return LayerInputs(
        layer=layers,
        attention=columns("attention"),
        feed_forward=columns("feed_forward"),
        attention_starts=starts("attention"),
        feed_forward_starts=starts("feed_forward"),
        keys={name: jax.vmap(partial(jax.random.fold_in, key))(layers) for name, key in keys.items()},
        window=None if run.window is not None else jnp.asarray([layer.window or UNLIMITED for layer in run.layers]),
        rotation=None if run.rotation is not None else jnp.asarray(run.places_of_rotations),
    )
