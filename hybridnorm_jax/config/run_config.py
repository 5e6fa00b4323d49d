"""RunConfig: a whole pretraining run. YAML files and key=value overrides are merged onto it by yaml_files.py."""

import dataclasses

from hybridnorm_jax.config_fields import check, check_choice, check_positive, key
from hybridnorm_jax.mesh.cluster import DistributedSection
from hybridnorm_jax.mesh.sharding_rules import MESH_AXES, resolve_rules
from hybridnorm_jax.model.config import ModelConfig

SOURCES = ("stdlib", "text", "tokens")
TOKEN_DTYPES = ("uint16", "uint32")
EQUIVALENT_FORMS = ("none", "pre_rmsnorm", "pre_crmsnorm")
SCHEDULES = ("cosine", "linear", "wsd", "constant")


@dataclasses.dataclass(frozen=True)
class RunSection:
    """Where a run lives and what is loaded before it."""

    name: str = key(
        "auto", "the run's files go to run.dir/run.name; auto: named after the last configuration and the overrides"
    )
    dir: str = key("runs", "directory of all runs; may be gs://")
    plugins: tuple[str, ...] = key((), "Python files or modules imported first, such as one that adds a scheme")
    wandb: bool = key(False, "also log to Weights & Biases; needs the extra `wandb`")
    wandb_project: str = key("hybridnorm_jax", "project in Weights & Biases")

    def __post_init__(self) -> None:
        check(
            self.name not in ("", ".", "..") and "/" not in self.name,
            "run.name",
            self.name,
            "must be a plain directory name",
        )
        check(bool(self.dir), "run.dir", self.dir, "must not be empty")


@dataclasses.dataclass(frozen=True)
class DataSection:
    """What is read, how it becomes tokens, and what is held out."""

    source: str = key(
        "stdlib", "stdlib (this Python's own sources) | text (.txt, .jsonl, also packed) | tokens (.npy, .bin)"
    )
    files: tuple[str, ...] = key((), "paths or glob patterns, for text and tokens")
    tokenizer: str = key("bytes", "bytes, or the path of a Hugging Face tokenizer.json")
    separator: str = key("", "token that ends a document, such as <|endoftext|>; empty: found in tokenizer.json")
    token_dtype: str = key("uint16", "dtype of raw .bin token files: uint16 | uint32 (.npy files carry their own)")
    separator_id: int | None = key(None, "id that ends a document in token files, for segment ids; null: unknown")
    text_field: str = key("text", "field of JSON records that holds the text")
    validation_fraction: float = key(0.02, "share of the data held out, chosen by a hash (docs/data.md)")
    validation: dict[str, tuple[str, ...]] = key({}, "further validation sets: name -> files, as data.files")
    segment_ids: bool = key(False, "documents do not attend to each other, and positions restart in each")
    cache_dir: str = key("~/.cache/hybridnorm_jax", "where tokenized text is kept")
    read_threads: int = key(2, "threads that read windows ahead")

    def __post_init__(self) -> None:
        check_choice("data.source", self.source, SOURCES)
        check_choice("data.token_dtype", self.token_dtype, TOKEN_DTYPES)
        needs = self.source == "stdlib" or bool(self.files)
        check(needs, "data.files", list(self.files), f"data.source={self.source} needs at least one file")
        only = self.source != "stdlib" or not self.files
        check(only, "data.files", list(self.files), "data.source=stdlib reads no files; use data.source=text")
        fraction = self.validation_fraction
        check(0 <= fraction < 1, "data.validation_fraction", fraction, "must be in [0, 1)")
        only = self.separator_id is None or self.source == "tokens"
        check(only, "data.separator_id", self.separator_id, "only for data.source=tokens; text has data.separator")
        check_positive("data", self, ("read_threads",))


@dataclasses.dataclass(frozen=True)
class TrainSection:
    """The length and shape of training."""

    steps: int = key(1000, "optimizer steps in all")
    batch_size: int = key(64, "sequences per optimizer step, over all devices and accumulation")
    seq_len: int = key(256, "tokens per sequence")
    grad_accumulation: int = key(1, "microbatches per optimizer step")
    seed: int = key(0, "seed of parameters, data order and dropout")
    data_seed: int | None = key(None, "seed of the data order; null: train.seed")
    equivalent_form: str = key(
        "none", f"cheaper form in which a Pre-LN model computes the same loss: {' | '.join(EQUIVALENT_FORMS)}"
    )
    equivalent_pad_to: int = key(1, "pre_crmsnorm: fill the stored stream up with zeros to a multiple of this")
    check_invariants: bool = key(False, "stop where the invariants of equivalent_form or crmsnorm fail; slower")
    loss_chunk: int | None = key(None, "positions per chunk of the loss, for large vocabularies; null: all at once")
    z_loss: float = key(0.0, "weight of the squared log-partition, added to the training loss")
    balance_loss: float = key(0.01, "weight of the experts' load-balancing loss, summed over layers")
    router_z_loss: float = key(0.001, "weight of the routers' squared log-partition, summed over layers")
    max_bad_steps: int = key(10, "the run stops after this many skipped steps in a row (NaN, infinity, spikes)")
    skip_spikes_sigma: float | None = key(
        None, "skip a step whose loss is this many standard deviations above the mean of the last losses; null: never"
    )
    spike_window: int = key(128, "number of last losses that skip_spikes_sigma compares with")
    stall_seconds: float | None = key(
        None,
        "seconds after which a wait (a step, a save) is reported, with the stacks of all threads; null: never",
    )
    stall_exit: bool = key(False, "end the process after such a report, with status 76")
    log_every: int = key(10, "steps between lines of metrics.jsonl")
    watch_every: int | None = key(
        None, "steps between measurements of every layer (docs/lab.md); the first step is measured too; null: none"
    )
    watch_sequences: int = key(1, "sequences of each device's share of a microbatch that watch_every measures")
    profile: bool = key(False, "write a JAX profiler trace of steps 2 to 6 to <run>/profile")
    sample_tokens: int = key(0, "tokens of sample text generated at the end")

    def __post_init__(self) -> None:
        check_choice("train.equivalent_form", self.equivalent_form, EQUIVALENT_FORMS)
        names = ("steps", "batch_size", "seq_len", "grad_accumulation", "loss_chunk", "log_every", "equivalent_pad_to")
        check_positive("train", self, (*names, "max_bad_steps", "watch_every", "watch_sequences"))
        for name in ("skip_spikes_sigma", "stall_seconds"):
            value = getattr(self, name)
            check(value is None or value > 0, f"train.{name}", value, "must be positive, or null")
        check(self.spike_window >= 2, "train.spike_window", self.spike_window, "must be at least 2")
        needs = not self.stall_exit or self.stall_seconds is not None
        check(needs, "train.stall_exit", "true", "needs train.stall_seconds")
        divides = self.batch_size % self.grad_accumulation == 0
        right = f"must divide train.batch_size={self.batch_size}"
        check(divides, "train.grad_accumulation", self.grad_accumulation, right)
        if self.loss_chunk is not None:
            right = f"must divide train.seq_len={self.seq_len}"
            check(self.seq_len % self.loss_chunk == 0, "train.loss_chunk", self.loss_chunk, right)
        for name in ("z_loss", "balance_loss", "router_z_loss"):
            check(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "must not be negative")
        check(self.sample_tokens >= 0, "train.sample_tokens", self.sample_tokens, "must not be negative")
        for name in ("seed", "data_seed"):
            value = getattr(self, name)
            check(value is None or 0 <= value < 2**32, f"train.{name}", value, "must be in [0, 2**32)")


@dataclasses.dataclass(frozen=True)
class OptimizerSection:
    """AdamW and its learning-rate schedule."""

    learning_rate: float = key(3e-4, "peak learning rate")
    final_ratio: float = key(0.1, "final learning rate / peak")
    schedule: str = key("cosine", "after the warm-up: cosine | linear | wsd | constant")
    warmup_steps: int = key(0, "steps of linear warm-up from 0")
    warmup_tokens: int | None = key(None, "tokens of linear warm-up, instead of warmup_steps")
    wsd_decay_fraction: float = key(0.1, "wsd: share of all steps, at the end, in which the rate falls linearly")
    b1: float = key(0.9, "decay of the first moment")
    b2: float = key(0.95, "decay of the second moment")
    eps: float = key(1e-8, "added to the root of the second moment")
    weight_decay: float = key(0.1, "decoupled weight decay, times the learning rate")
    balance_bias_rate: float = key(1e-3, "model.balance_bias: what a step adds to, or takes from, each expert's bias")
    decay_embeddings: bool = key(False, "token and position embeddings decay too")
    decay_norms_and_biases: bool = key(True, "norm scales and biases decay too")
    clip: float | None = key(1.0, "largest global norm of the gradient; null: no clipping")

    def __post_init__(self) -> None:
        check_choice("optimizer.schedule", self.schedule, SCHEDULES)
        check(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "must be positive")
        for name in ("final_ratio", "wsd_decay_fraction"):
            check(0 <= getattr(self, name) <= 1, f"optimizer.{name}", getattr(self, name), "must be in [0, 1]")
        for name in ("b1", "b2"):
            check(0 <= getattr(self, name) < 1, f"optimizer.{name}", getattr(self, name), "must be in [0, 1)")
        for name in ("warmup_steps", "weight_decay", "balance_bias_rate"):
            check(getattr(self, name) >= 0, f"optimizer.{name}", getattr(self, name), "must not be negative")
        tokens = self.warmup_tokens
        check(tokens is None or tokens >= 0, "optimizer.warmup_tokens", tokens, "must not be negative")
        check(self.eps > 0, "optimizer.eps", self.eps, "must be positive")
        check(self.clip is None or self.clip > 0, "optimizer.clip", self.clip, "must be positive, or null")
        one = self.warmup_tokens is None or self.warmup_steps == 0
        check(one, "optimizer.warmup_tokens", self.warmup_tokens, "cannot be set together with optimizer.warmup_steps")


@dataclasses.dataclass(frozen=True)
class MeshSection:
    """How many devices each mesh axis has; one of them may be -1: all that are left."""

    data: int = key(-1, "data parallel: every device holds all parameters")
    fsdp: int = key(1, "data parallel with parameters and optimizer state sharded")
    tensor: int = key(1, "tensor parallel: heads, feed-forward and vocabulary are split")
    expert: int = key(1, "data parallel with the experts split: every device holds a share of them")
    context: int = key(1, "sequence parallel: every sequence is split, attention sees all of it")
    replica: int = key(1, "data parallel across slices or nodes, between which the network is slow")
    rules: dict[str, tuple[str, ...]] = key(
        {}, "logical axis -> mesh axes, best first, such as {vocab: [tensor, fsdp]}"
    )

    def __post_init__(self) -> None:
        resolve_rules(self.rules)
        sizes = self.sizes
        for name, size in sizes.items():
            check(size == -1 or size >= 1, f"mesh.{name}", size, "must be at least 1, or -1 for all that are left")
        check(list(sizes.values()).count(-1) <= 1, "mesh", sizes, "only one -1")

    @property
    def sizes(self) -> dict[str, int]:
        """Mesh axis -> size."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}


@dataclasses.dataclass(frozen=True)
class CheckpointSection:
    """How often the state is saved."""

    every: int = key(1000, "steps between checkpoints; one is always saved at the end")
    keep: int = key(2, "how many of the newest are kept")
    allow_fallback: bool = key(False, "where the newest is damaged: true goes on from the one before it, false stops")

    def __post_init__(self) -> None:
        check_positive("checkpoint", self, ("every", "keep"))


@dataclasses.dataclass(frozen=True)
class EvalSection:
    """How often and how much is evaluated while training."""

    every: int = key(1000, "steps between evaluations; one is always made at the end")
    batches: int | None = key(None, "batches per validation set; null: all of it")
    batch_size: int | None = key(None, "sequences per batch; null: as a training microbatch")

    def __post_init__(self) -> None:
        check_positive("eval", self, ("every", "batches", "batch_size"))


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run, checked as a whole."""

    run: RunSection = dataclasses.field(default_factory=RunSection)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataSection = dataclasses.field(default_factory=DataSection)
    train: TrainSection = dataclasses.field(default_factory=TrainSection)
    optimizer: OptimizerSection = dataclasses.field(default_factory=OptimizerSection)
    mesh: MeshSection = dataclasses.field(default_factory=MeshSection)
    checkpoint: CheckpointSection = dataclasses.field(default_factory=CheckpointSection)
    eval: EvalSection = dataclasses.field(default_factory=EvalSection)
    distributed: DistributedSection = dataclasses.field(default_factory=DistributedSection)
    init_from: str | None = key(None, "directory of a run, or of one checkpoint, whose parameters to start from")

    def __post_init__(self) -> None:
        wide = self.model.param_dtype in ("float32", "float64")
        check(wide, "model.param_dtype", self.model.param_dtype, "training needs float32 or float64 parameters")
        limit = self.model.max_positions
        right = f"must be at most model.max_positions={limit}, the rows of the learned position table"
        check(limit is None or self.train.seq_len <= limit, "train.seq_len", self.train.seq_len, right)
        self._check_forms()

    def _check_forms(self) -> None:
        model, form = self.model, self.train.equivalent_form
        pad_to = self.train.equivalent_pad_to
        check(pad_to == 1 or form == "pre_crmsnorm", "train.equivalent_pad_to", pad_to, "only for pre_crmsnorm")
        obstacle = model.pre_layernorm_obstacle
        if form != "none":
            right = "only a Pre-LN model has this form (LayerNorm before every branch and the head, no other norm)"
            check(obstacle is None, "train.equivalent_form", form, f"{obstacle}; {right}")
            right = "dropout at the end of a branch undoes the zero mean; needs model.dropout=0"
            check(model.dropout == 0, "train.equivalent_form", form, f"model.dropout={model.dropout}: {right}")
        elif self.train.check_invariants and model.norm != "crmsnorm":
            right = "there are invariants of Pre-LN models and of model.norm=crmsnorm only"
            check(obstacle is None, "train.check_invariants", "true", f"{obstacle}; {right}")

    @property
    def microbatch_size(self) -> int:
        """Sequences per forward pass, over all devices."""
        return self.train.batch_size // self.train.grad_accumulation

    @property
    def tokens_per_step(self) -> int:
        """Target tokens of one optimizer step, over all devices."""
        return self.train.batch_size * self.train.seq_len
