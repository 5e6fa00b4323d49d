"""What a RunConfig compiles to: model, optimizer, and the two jitted steps on one mesh."""

import copy
import dataclasses
import math
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybridnorm_jax.config.key_lookup import flatten
from hybridnorm_jax.config.run_config import RunConfig, TrainSection
from hybridnorm_jax.config_fields import check
from hybridnorm_jax.equivalence.comparison import compare_forms, compare_norm
from hybridnorm_jax.equivalence.decoder_forms import Conversion
from hybridnorm_jax.equivalence.forms import conversion_of
from hybridnorm_jax.equivalence.invariants import assert_measured, tolerances
from hybridnorm_jax.equivalence.measurements import Measured
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.kernels.attention_backends import capability_of, resolve_backend, sequence_multiple
from hybridnorm_jax.kernels.expert_dispatch import ExpertSize, resolve_dispatch
from hybridnorm_jax.kernels.loss_kernels import check_loss_kernel
from hybridnorm_jax.mesh.batch_shares import BatchShare, batch_parts, batch_sharding, batch_share
from hybridnorm_jax.mesh.device_mesh import make_mesh, use_mesh
from hybridnorm_jax.mesh.fit_checks import check_experts, check_sequence
from hybridnorm_jax.mesh.sharding_rules import resolve_rules
from hybridnorm_jax.mesh.split_axes import split_axes
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.model.config_feed_forward import CLAMPED
from hybridnorm_jax.model.decoder import Decoder
from hybridnorm_jax.model.encoder_config import EncoderConfig
from hybridnorm_jax.model.loss import LossSums
from hybridnorm_jax.training.grouped_steps import GroupedSteps, PureSteps
from hybridnorm_jax.training.layer_measures import Measures, make_watch
from hybridnorm_jax.training.microbatches import microbatches_of
from hybridnorm_jax.training.optimizers.chain import make_optimizer
from hybridnorm_jax.training.optimizers.directions import Places
from hybridnorm_jax.training.optimizers.schedules import StepNumbers, step_numbers
from hybridnorm_jax.training.state import TrainState, abstract_state, make_beginning, make_fresh_state, make_initializer
from hybridnorm_jax.training.step import (
    Batch,
    Convert,
    Measure,
    StepOptions,
    document_inputs,
    make_eval_step,
    make_train_step,
)
from hybridnorm_jax.training.xla_options import readable_refusals, step_options


def check_precision(model: ModelConfig) -> None:
    """Raise ConfigError for a float64 that JAX would silently narrow."""
    for name in ("dtype", "param_dtype"):
        narrow = getattr(model, name) != "float64" or jax.config.jax_enable_x64
        check(narrow, f"model.{name}", "float64", "needs JAX_ENABLE_X64=1 in the environment")


# Keys that no step is compiled with: they are arguments of it (StepNumbers), or matter outside of it.
_NOT_COMPILED = (
    "optimizer.learning_rate",
    "optimizer.final_ratio",
    "optimizer.warmup_steps",
    "optimizer.warmup_tokens",
    "optimizer.wsd_decay_fraction",
    "optimizer.piecewise",
    "optimizer.rate_factors",
    "optimizer.weight_decays",
    "optimizer.weight_decay",
    "optimizer.muon_rate_factor",
    "train.steps",
    "train.seed",
    "train.data_seed",
    "train.max_bad_steps",
    "train.stall_seconds",
    "train.stall_exit",
    "train.log_every",
    "train.watch_every",
    "train.profile",
    "train.sample_tokens",
    "train.sample_prompt",
    "init_from",
    "init_optimizer",
    "init_plain",
)
_SECTIONS_NOT_COMPILED = ("run.", "data.", "checkpoint.", "eval.", "distributed.")
_SEGMENTS = "data.segment_ids"
# Maps of numbers that are arguments of the step -> what of them is compiled: how many there are, or their names.
_COMPILED_OF_MAPS = {"optimizer.piecewise": len, "optimizer.rate_factors": list, "optimizer.weight_decays": list}


def compiled_values(config: RunConfig) -> dict[str, Any]:
    """Dotted key -> value, for the keys that decide which steps are compiled."""
    values = dict(flatten(dataclasses.asdict(config)))
    compiled = {
        path: value
        for path, value in values.items()
        if path not in _NOT_COMPILED and not path.startswith(_SECTIONS_NOT_COMPILED)
    }
    compiled[_SEGMENTS] = config.data.keeps_documents_apart
    return compiled | {path: compiled_of(values[path]) for path, compiled_of in _COMPILED_OF_MAPS.items()}


class Program:
    """The steps of one run. Building it checks everything that can be checked before compilation.

    Attributes:
      config, mesh: as named; `rules` say what lies on which axis of the mesh.
      backend, dispatch: what computes attention, and the experts (None without any).
      remat: what the backward pass computes again.
      model: what the loss computes; `conversion` makes its parameters of the state's, None where they are the same.
      microbatches: into how many a step is divided on these devices, and how large each is.
      abstract_state: shapes, dtypes and shardings of the training state.
      compiler_options: what XLA is told about the training step.
      grouped: the steps of several runs that share these, for lab/together.py; nothing of them is compiled before use.

    Raises:
      ConfigError: the mesh does not fit the devices or the experts, or the attention backend, the dispatch of the
        experts or the kernel of the loss cannot do what is asked.
    """

    def __init__(self, config: RunConfig, mesh: Mesh | None = None, *, remat: str | None = None):
        """Build and check.

        Args:
          mesh: None: over the devices at hand, as the configuration says.
          remat: in the place of model.remat, see remat_choice.py.
        """
        if isinstance(config.model, EncoderConfig):
            raise ConfigError("model: an encoder, which no run trains; examples/image_classification.py trains one")
        self.config = config
        self.remat = config.model.remat if remat is None else remat
        self.mesh = make_mesh(config.mesh.sizes) if mesh is None else mesh
        self.rules = resolve_rules(config.mesh.rules)
        check_precision(config.model)
        self._check_devices()
        self.dispatch = self._resolve_dispatch()
        self.backend = self._resolve_backend()
        self._check_sequence()
        self.microbatches = microbatches_of(config.train, batch_parts(self.mesh, self.rules))
        self._check_watch()
        resolved = {"attention": self.backend, "expert_dispatch": self.dispatch or "auto", "remat": self.remat}
        model = dataclasses.replace(config.model, **resolved)
        self.conversion = _conversion(model, config.train)
        self.model = Decoder(model if self.conversion is None else self.conversion.config)
        self._check_loss_kernel()
        self._optimizer_of = partial(
            make_optimizer,
            config.optimizer,
            unit_matrices=config.model.scheme_rule.sphere,
            width_ratio=config.model.width_ratio,
            places=Places(self.mesh, self.rules),
        )
        optimizer = self._optimizer_of(self.numbers)
        options = {"spike_window": config.train.spike_window, "has_average": config.optimizer.averages}
        initialize = make_initializer(config.model, optimizer, **options)
        self.abstract_state = abstract_state(initialize, self.mesh, self.rules)
        self.compiler_options = step_options(self.platform)
        self._fresh_state = make_fresh_state(initialize, self.abstract_state)
        places = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        self._state_with = jax.jit(make_beginning(optimizer, **options), out_shardings=places)
        pure = PureSteps(train=self._pure_train_step(), evaluate=self._pure_eval_step(), watch=self._pure_watch())
        self._train_step = self._jit_train_step(pure.train)
        self._eval_step = jax.jit(pure.evaluate)
        self._watch = jax.jit(pure.watch, out_shardings=self._whole)
        self.grouped = GroupedSteps(
            pure, self.abstract_state, mesh=self.mesh, rules=self.rules, compiler_options=self.compiler_options
        )

    @cached_property
    def numbers(self) -> StepNumbers:
        """What the compiled training step takes as arguments."""
        train = self.config.train
        return step_numbers(
            self.config.optimizer, steps=train.steps, tokens_per_step=self.config.tokens_per_step, seed=train.seed
        )

    def sharing(self, config: RunConfig) -> "Program | None":
        """The program of another run that computes with these compiled steps; None where its own are others."""
        if compiled_values(config) != compiled_values(self.config):
            return None
        other = copy.copy(self)
        other.config = config
        other.__dict__.pop("numbers", None)
        return other

    @property
    def platform(self) -> str:
        """Of the devices: cpu | gpu | tpu."""
        return self.mesh.devices.flat[0].platform

    @property
    def _convert(self) -> Convert | None:
        return None if self.conversion is None else self.conversion.convert

    @property
    def _whole(self) -> NamedSharding:
        """Of what any process can read, such as metrics."""
        return NamedSharding(self.mesh, PartitionSpec())

    def _check_devices(self) -> None:
        """Raise ConfigError where experts cannot be split over the mesh."""
        check_experts(self.config.model.num_experts, self.mesh)

    def _check_sequence(self) -> None:
        """Raise ConfigError where sequences or chunks of the loss cannot be split over the mesh."""
        train, tile = self.config.train, sequence_multiple(self.backend)
        check_sequence(train.seq_len, train.loss_chunk, self.mesh, tile, self.rules)

    def _check_loss_kernel(self) -> None:
        """Raise ConfigError where train.loss_kernel cannot compute this loss on these devices."""
        name, model = self.config.train.loss_kernel, self.model.config
        with use_mesh(self.mesh, self.rules):
            check_loss_kernel(
                name,
                platform=self.platform,
                dtype=model.dtype,
                width=model.whole_width,
                capped=model.logit_cap is not None,
                more_than_table=model.more_than_head_table,
                split_by=split_axes("vocab", model.vocab_size),
            )

    def _check_watch(self) -> None:
        """Raise ConfigError where a device has fewer sequences than are to be watched."""
        train, share = self.config.train, self.microbatches.size // batch_parts(self.mesh, self.rules)
        if train.watch_every is not None:
            right = f"must be at most {share}, a device's share of a microbatch"
            check(train.watch_sequences <= share, "train.watch_sequences", train.watch_sequences, right)

    def _resolve_dispatch(self) -> str | None:
        """What computes the experts on these devices; None without any."""
        model = self.config.model
        if not model.num_experts:
            return None
        size = ExpertSize(embed=model.d_model + model.mlp_bias, mlp=model.mlp_dim)  # biases ride on one more channel
        return resolve_dispatch(
            model.expert_dispatch,
            platform=self.platform,
            dtype=model.dtype,
            size=size,
            clamped=model.activation == CLAMPED,
        )

    def _resolve_backend(self) -> str:
        """What computes attention on these devices."""
        model = self.config.model
        return resolve_backend(
            model.attention,
            platform=self.platform,
            dtype=model.dtype,
            head_dim=model.head_dim,
            segment_ids=self.config.data.keeps_documents_apart,
            capability=capability_of(self.mesh.devices.flat[0]),
            features=model.score_features(self.config.train.seq_len),
        )

    def _pure_train_step(self) -> Callable:
        """(state, batch, numbers) -> (state, metrics, measured invariants)."""
        train = self.config.train
        options = StepOptions(
            optimizer=self.config.optimizer,
            chunk=train.loss_chunk,
            kernel=train.loss_kernel,
            z_loss=train.z_loss,
            balance_loss=train.balance_loss,
            router_z_loss=train.router_z_loss,
            skip_spikes_sigma=train.skip_spikes_sigma,
        )
        return make_train_step(
            self.model,
            self._optimizer_of,
            options,
            convert=self._convert,
            measure=_measure(self.config) if train.check_invariants else None,
        )

    def _jit_train_step(self, step: Callable) -> Callable:
        """The step, compiled; the state's memory is used again."""
        places = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        return jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(places, self._whole, None),
            compiler_options=self.compiler_options,
        )

    def _pure_eval_step(self) -> Callable:
        """(parameters, batch, step) -> loss sums."""
        train = self.config.train
        return make_eval_step(self.model, chunk=train.loss_chunk, kernel=train.loss_kernel, convert=self._convert)

    def _pure_watch(self) -> Callable:
        """(state, batch, numbers) -> measures of every layer."""
        return make_watch(
            self.model,
            self._optimizer_of,
            shares=batch_parts(self.mesh, self.rules),
            sequences=self.config.train.watch_sequences,
            chunk=self.config.train.loss_chunk,
            convert=self._convert,
        )

    @property
    def share(self) -> BatchShare:
        """The stretch of every batch that this process reads."""
        return batch_share(self.mesh, self.rules)

    @property
    def eval_batch_size(self) -> int:
        """Sequences per evaluation batch, over all devices: eval.batch_size, made a multiple of the mesh's split."""
        parts = batch_parts(self.mesh, self.rules)
        asked = self.config.eval.batch_size or self.microbatches.size
        return math.ceil(asked / parts) * parts

    @property
    def eval_sequences(self) -> int | None:
        """How many sequences of each validation set are scored, the same on any number of devices; None: all."""
        batches = self.config.eval.batches
        return None if batches is None else batches * (self.config.eval.batch_size or self.config.microbatch_size)

    def fresh_state(self) -> TrainState:
        """The state before the first step."""
        return self._fresh_state(jax.random.key(self.config.train.seed))

    def state_with(self, params: Any) -> TrainState:
        """The state before the first step of a run that begins with these parameters."""
        return self._state_with(params)

    def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        """One update; `state` is donated. `batch` is this process's (microbatches, sequences, positions) in NumPy.

        Raises:
          InvariantError: with train.check_invariants, the first invariant that does not hold.
        """
        with use_mesh(self.mesh, self.rules), readable_refusals():
            state, metrics, measured = self._train_step(state, self.put(batch, leading=1), self.numbers)
        if measured is not None:
            assert_measured(state.step, measured, tolerances(self.config.model, self.platform))
        return state, metrics

    def watch(self, state: TrainState, batch: Batch) -> Measures:
        """Measures of every layer for a batch as train_step takes it, before that step; `state` stays."""
        with use_mesh(self.mesh, self.rules):
            return self._watch(state, self.put(batch, leading=1), self.numbers)

    def lower_train_step(self) -> jax.stages.Lowered:
        """The train step lowered for this mesh, from shapes alone."""
        with use_mesh(self.mesh, self.rules):
            return self.trace_train_step().lower()

    def trace_train_step(self) -> jax.stages.Traced:
        """The train step as JAX traces it, from shapes alone."""
        train = self.config.train
        shape = (*self.microbatches, train.seq_len)
        dtypes = {"tokens": np.int32, "targets": np.int32, "weights": np.float32}
        if self.config.data.keeps_documents_apart:
            dtypes |= {"segment_ids": np.int32, "positions": np.int32}
        place = batch_sharding(self.mesh, 1, self.rules)
        batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, dtype in dtypes.items()}
        with use_mesh(self.mesh, self.rules):
            return self._train_step.trace(self.abstract_state, batch, self.numbers)

    def eval_step(self, params: Any, batch: Batch, *, step: jax.Array | None = None) -> LossSums:
        """Loss sums of one batch; `batch` is this process's (sequences, positions) in NumPy.

        Args:
          step: of training, where the model's branches grow with it.
        """
        with use_mesh(self.mesh, self.rules):
            return self._eval_step(params, self.put(batch, leading=0), step)

    def put(self, batch: dict[str, np.ndarray], leading: int) -> Batch:
        """This process's rows as global arrays, sequences (dimension `leading`) over the data axes."""
        sharding = batch_sharding(self.mesh, leading, self.rules)
        return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def _conversion(model: ModelConfig, train: TrainSection) -> Conversion | None:
    """To the form that the loss computes; None: to no other."""
    if train.equivalent_form == "none":
        return None
    return conversion_of(model, train.equivalent_form, pad_to=train.equivalent_pad_to)


def _measure(config: RunConfig) -> Measure:
    """What train.check_invariants measures in every step: (the state's parameters, one sequence) -> Measured."""
    compare = compare_norm
    if not config.model.norm_kind.drops_last:
        compare = partial(compare_forms, pad_to=config.train.equivalent_pad_to)

    def measure(params: Any, batch: Batch) -> Measured:
        return compare(config.model, params, batch["tokens"], **document_inputs(batch))

    return measure
