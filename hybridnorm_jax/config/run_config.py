"""RunConfig: a whole pretraining run. YAML files and key=value overrides are merged onto it by yaml_files.py."""

import dataclasses

from hybridnorm_jax.config.data_section import DataSection
from hybridnorm_jax.config.limits import (
    LARGEST_SEED,
    LARGEST_WEIGHT,
    LONGEST_NAME,
    LONGEST_SEQUENCE,
    MOST_DEVICES,
    MOST_SEQUENCES,
    MOST_STEPS,
    MOST_TOKENS_PER_STEP,
)
from hybridnorm_jax.config.optimizer_kinds import OPTIMIZERS, averaging_settings
from hybridnorm_jax.config.optimizer_section import OptimizerSection
from hybridnorm_jax.config_fields import check, check_choice, check_fields, key
from hybridnorm_jax.errors import ConfigError
from hybridnorm_jax.kernels.backend_names import LOSS_KERNELS
from hybridnorm_jax.loggers.logger_kinds import LOGGERS
from hybridnorm_jax.mesh.cluster import DistributedSection
from hybridnorm_jax.mesh.sharding_rules import MESH_AXES, resolve_rules
from hybridnorm_jax.model.config import ModelConfig

EQUIVALENT_FORMS = ("none", "pre_rmsnorm", "pre_crmsnorm")


@dataclasses.dataclass(frozen=True)
class RunSection:
    """Where a run lives and what is loaded before it."""

    name: str = key(
        "auto", "the run's files go to run.dir/run.name; auto: named after the configurations and overrides that matter"
    )
    dir: str = key("runs", "directory of all runs; may be gs://")
    plugins: tuple[str, ...] = key((), "Python files or modules imported first, such as one that adds a scheme")
    loggers: tuple[str, ...] = key(
        ("tensorboard",),
        "where the numbers go besides metrics.jsonl: tensorboard | csv | wandb | mlflow, and those of plugins; the "
        "extras `wandb` and `mlflow` bring what these need",
    )
    project: str = key("hybridnorm_jax", "project in Weights & Biases, experiment in MLflow")
    group: str = key("", "group in Weights & Biases and MLflow; a comparison of the lab sets its name; empty: none")
    tags: tuple[str, ...] = key((), "tags in Weights & Biases and MLflow")
    mlflow_uri: str = key(
        "",
        "MLflow's server (http://HOST:PORT), database (sqlite:///FILE) or folder; empty: MLFLOW_TRACKING_URI, or "
        "run.dir/mlflow.db",
    )

    def __post_init__(self) -> None:
        check_fields("run", self)
        check(
            self.name not in ("", ".", "..") and "/" not in self.name and self.name.isprintable(),
            "run.name",
            self.name,
            "must be a plain directory name",
        )
        short = len(self.name.encode(errors="surrogatepass")) <= LONGEST_NAME
        check(short, "run.name", self.name, f"must be a directory name of at most {LONGEST_NAME} bytes")
        check(bool(self.dir), "run.dir", self.dir, "must not be empty")
        check(bool(self.project), "run.project", self.project, "must not be empty")
        for name in self.loggers:
            check_choice("run.loggers", name, LOGGERS)
            check(self.loggers.count(name) == 1, "run.loggers", self.loggers, f"names {name} twice")
        # It would be shown to everyone who sees the run.
        right = "must not hold a password; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        check("@" not in self.mlflow_uri.partition("://")[2].partition("/")[0], "run.mlflow_uri", "...", right)


@dataclasses.dataclass(frozen=True)
class TrainSection:
    """The length and shape of training."""

    steps: int = key(1000, "optimizer steps in all", at_least=1, at_most=MOST_STEPS)
    batch_size: int = key(
        64,
        "sequences per optimizer step, over all devices and accumulation",
        at_least=1,
        at_most=MOST_SEQUENCES,
    )
    seq_len: int = key(256, "tokens per sequence", at_least=1, at_most=LONGEST_SEQUENCE)
    grad_accumulation: int = key(1, "microbatches per optimizer step", at_least=1, at_most=MOST_SEQUENCES)
    max_device_sequences: int | None = key(
        None,
        "most sequences of a microbatch on one device: where there would be more, as on fewer devices than before, the "
        "step has more microbatches than grad_accumulation; null: no limit",
        at_least=1,
        at_most=MOST_SEQUENCES,
    )
    seed: int = key(0, "seed of parameters, data order and dropout", at_least=0, at_most=LARGEST_SEED)
    data_seed: int | None = key(None, "seed of the data order; null: train.seed", at_least=0, at_most=LARGEST_SEED)
    shuffle_rounds: int = key(
        16, "rounds of the cipher that permutes the rows of an epoch; even", at_least=4, at_most=128
    )
    equivalent_form: str = key(
        "none", f"cheaper form in which a Pre-LN model computes the same loss: {' | '.join(EQUIVALENT_FORMS)}"
    )
    equivalent_pad_to: int = key(
        1, "pre_crmsnorm: fill the stored stream up with zeros to a multiple of this", at_least=1, at_most=65_536
    )
    check_invariants: bool = key(False, "stop where the invariants of equivalent_form or crmsnorm fail; slower")
    loss_chunk: int | None = key(
        None,
        "positions per chunk of the loss, for large vocabularies; null: all at once",
        at_least=1,
        at_most=LONGEST_SEQUENCE,
    )
    loss_kernel: str = key(
        "xla",
        f"what computes the logits and the loss: {' | '.join(LOSS_KERNELS)}; pallas, for TPUs, keeps logits in a core",
    )
    z_loss: float = key(
        0.0, "weight of the squared log-partition, added to the training loss", at_least=0, at_most=LARGEST_WEIGHT
    )
    balance_loss: float = key(
        0.01, "weight of the experts' load-balancing loss, summed over layers", at_least=0, at_most=LARGEST_WEIGHT
    )
    router_z_loss: float = key(
        0.001, "weight of the routers' squared log-partition, summed over layers", at_least=0, at_most=LARGEST_WEIGHT
    )
    max_bad_steps: int = key(
        10,
        "the run stops after this many skipped steps in a row (NaN, infinity, spikes)",
        at_least=1,
        at_most=MOST_STEPS,
    )
    skip_spikes_sigma: float | None = key(
        None,
        "skip a step whose loss is this many standard deviations above the mean of the last losses; null: never",
        above=0,
        at_most=1_000_000,
    )
    spike_window: int = key(
        128, "number of last losses that skip_spikes_sigma compares with", at_least=2, at_most=100_000
    )
    stall_seconds: float | None = key(
        None,
        "seconds after which a wait (a step, a save) is reported, with the stacks of all threads; null: never",
        above=0,
        at_most=10_000_000,
    )
    stall_exit: bool = key(False, "end the process after such a report, with status 76")
    log_every: int = key(10, "steps between lines of metrics.jsonl", at_least=1, at_most=MOST_STEPS)
    watch_every: int | None = key(
        None,
        "steps between measurements of every layer (docs/lab.md); the first step is measured too; null: none",
        at_least=1,
        at_most=MOST_STEPS,
    )
    watch_sequences: int = key(
        1,
        "sequences of each device's share of a microbatch that watch_every measures",
        at_least=1,
        at_most=MOST_SEQUENCES,
    )
    profile: bool = key(False, "write a JAX profiler trace of steps 2 to 6 to <run>/profile")
    sample_tokens: int = key(0, "tokens of sample text generated at the end", at_least=0, at_most=1_000_000)
    sample_prompt: str | None = key(None, "text that the sample goes on from; null: a line of held-out text")

    def __post_init__(self) -> None:
        check_fields("train", self)
        check_choice("train.loss_kernel", self.loss_kernel, LOSS_KERNELS)
        check_choice("train.equivalent_form", self.equivalent_form, EQUIVALENT_FORMS)
        needs = not self.stall_exit or self.stall_seconds is not None
        check(needs, "train.stall_exit", True, "needs train.stall_seconds")
        check(self.shuffle_rounds % 2 == 0, "train.shuffle_rounds", self.shuffle_rounds, "must be even")
        divides = self.batch_size % self.grad_accumulation == 0
        right = f"must divide train.batch_size={self.batch_size}"
        check(divides, "train.grad_accumulation", self.grad_accumulation, right)
        if self.loss_chunk is not None:
            right = f"must divide train.seq_len={self.seq_len}"
            check(self.seq_len % self.loss_chunk == 0, "train.loss_chunk", self.loss_chunk, right)
        needs = self.sample_prompt is None or self.sample_tokens > 0
        check(needs, "train.sample_prompt", self.sample_prompt, "needs train.sample_tokens, how long the sample is")

    @property
    def order_seed(self) -> int:
        """The seed of the order of the data."""
        return self.seed if self.data_seed is None else self.data_seed


@dataclasses.dataclass(frozen=True)
class MeshSection:
    """How many devices each mesh axis has; one of them may be -1: all that are left."""

    data: int = key(-1, "data parallel: every device holds all parameters", at_least=-1, at_most=MOST_DEVICES)
    fsdp: int = key(1, "data parallel with parameters and optimizer state sharded", at_least=-1, at_most=MOST_DEVICES)
    tensor: int = key(
        1, "tensor parallel: heads, feed-forward and vocabulary are split", at_least=-1, at_most=MOST_DEVICES
    )
    expert: int = key(
        1, "data parallel with the experts split: every device holds a share of them", at_least=-1, at_most=MOST_DEVICES
    )
    context: int = key(
        1, "sequence parallel: every sequence is split, attention sees all of it", at_least=-1, at_most=MOST_DEVICES
    )
    replica: int = key(
        1, "data parallel across slices or nodes, between which the network is slow", at_least=-1, at_most=MOST_DEVICES
    )
    rules: dict[str, tuple[str, ...]] = key(
        {}, "logical axis -> mesh axes, best first, such as {vocab: [tensor, fsdp]}"
    )

    def __post_init__(self) -> None:
        check_fields("mesh", self)
        resolve_rules(self.rules)
        sizes = self.sizes
        for name, size in sizes.items():
            check(size != 0, f"mesh.{name}", size, "must be at least 1, or -1 for all that are left")
        rest = [f"mesh.{name}" for name, size in sizes.items() if size == -1]
        if len(rest) > 1:
            right = "only one of them can take all devices that are left; mesh.data does unless it is set: mesh.data=1"
            raise ConfigError(f"{' and '.join(rest)} are -1: {right}")

    @property
    def sizes(self) -> dict[str, int]:
        """Mesh axis -> size."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}


@dataclasses.dataclass(frozen=True)
class CheckpointSection:
    """How often the state is saved."""

    every: int = key(1000, "steps between checkpoints; one is always saved at the end", at_least=1, at_most=MOST_STEPS)
    keep: int = key(2, "how many of the newest are kept", at_least=1, at_most=100_000)
    allow_fallback: bool = key(False, "where the newest is damaged: true goes on from the one before it, false stops")
    local_dir: str | None = key(
        None, "directory on each host's own disk, where steps are saved besides, often; null: none (docs/clusters.md)"
    )
    local_every: int | None = key(
        None, "steps between checkpoints in checkpoint.local_dir", at_least=1, at_most=MOST_STEPS
    )

    def __post_init__(self) -> None:
        check_fields("checkpoint", self)
        needs = (self.local_dir is None) == (self.local_every is None)
        check(
            needs,
            "checkpoint.local_dir",
            self.local_dir,
            "goes with checkpoint.local_every; give both or neither",
        )
        local = self.local_dir is None or (bool(self.local_dir) and "://" not in self.local_dir)
        check(local, "checkpoint.local_dir", self.local_dir, "must be a directory on each host's own disk")


@dataclasses.dataclass(frozen=True)
class EvalSection:
    """How often and how much is evaluated while training."""

    every: int = key(1000, "steps between evaluations; one is always made at the end", at_least=1, at_most=MOST_STEPS)
    batches: int | None = key(None, "batches per validation set; null: all of it", at_least=1, at_most=MOST_STEPS)
    batch_size: int | None = key(
        None, "sequences per batch; null: as a training microbatch", at_least=1, at_most=MOST_SEQUENCES
    )
    stride: int | None = key(
        None,
        "positions by which the sequences of a validation set begin later than the one before; a token is still "
        "predicted once, from at least train.seq_len - eval.stride others; null: train.seq_len",
        at_least=1,
        at_most=LONGEST_SEQUENCE,
    )
    tasks: tuple[str, ...] = key(
        (), "tasks of the LM Evaluation Harness to score as well: names, hybridnorm, task files; needs the extra `eval`"
    )
    plain: bool = key(
        False, "also score the validation sets with the parameters that are not averaged, where others are"
    )
    task_limit: int | None = key(None, "documents of each task, its first; null: all", at_least=1, at_most=MOST_STEPS)

    def __post_init__(self) -> None:
        check_fields("eval", self)
        needs = self.task_limit is None or bool(self.tasks)
        check(needs, "eval.task_limit", self.task_limit, "needs eval.tasks")


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
    init_from: str | None = key(
        None, "whose parameters to start from: RUN, RUN@STEP, RUN/checkpoints/STEP or a Hugging Face directory"
    )
    init_optimizer: bool = key(
        False,
        "init_from: also take the optimizer state, step and position in the data, as a branch of that run",
    )
    init_plain: bool = key(
        False, "init_from: take the parameters of the last step where that run also has averaged ones"
    )

    def __post_init__(self) -> None:
        check_fields("", self)
        needs = not self.init_optimizer or self.init_from is not None
        check(needs, "init_optimizer", True, "needs init_from=RUN@STEP, the checkpoint to branch from")
        self._check_average()
        self._check_widths()
        for name, size in (("train.batch_size", self.train.batch_size), ("eval.batch_size", self.eval.batch_size or 1)):
            tokens = size * self.train.seq_len
            right = (
                f"{tokens:,} tokens with train.seq_len={self.train.seq_len}; must be at most {MOST_TOKENS_PER_STEP:,}"
            )
            check(tokens <= MOST_TOKENS_PER_STEP, name, size, right)
        warmup, most = self.optimizer.warmup_tokens, MOST_STEPS * self.tokens_per_step
        right = f"must be at most {most:,}, which are {MOST_STEPS:,} steps of {self.tokens_per_step:,} tokens"
        check(warmup is None or warmup <= most, "optimizer.warmup_tokens", warmup, right)
        separator, rows = self.data.separator_id, self.model.vocab_size
        right = f"must be below model.vocab_size={rows}"
        check(separator is None or separator < rows, "data.separator_id", separator, right)
        wide = self.model.param_dtype in ("float32", "float64")
        check(wide, "model.param_dtype", self.model.param_dtype, "training needs float32 or float64 parameters")
        limit = self.model.max_positions
        right = f"must be at most model.max_positions={limit}, the rows of the table of positions"
        check(limit is None or self.train.seq_len <= limit, "train.seq_len", self.train.seq_len, right)
        stride = self.eval.stride
        right = f"must be at most train.seq_len={self.train.seq_len}"
        check(stride is None or stride <= self.train.seq_len, "eval.stride", stride, right)
        self.data.mixture_stages(self.train.steps)  # checks them
        self._check_forms()
        own = self.optimizer.weight_decays
        right = f"model.scheme={self.model.scheme} keeps its matrices at unit length, and nothing decays"
        check(not own or not self.model.scheme_rule.sphere, "optimizer.weight_decays", own, right)

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
            check(obstacle is None, "train.check_invariants", True, f"{obstacle}; {right}")

    def _check_average(self) -> None:
        decay = self.optimizer.ema_decay
        needs = not self.init_plain or (self.init_from is not None and not self.init_optimizer)
        right = "needs init_from without init_optimizer: a branch takes all that the run has"
        check(needs, "init_plain", True, right)
        right = f"needs {averaging_settings()}"
        check(not self.eval.plain or self.optimizer.averages, "eval.plain", True, right)
        right = f"model.scheme={self.model.scheme} keeps its matrices at unit length, and averages of them have another"
        check(decay is None or not self.model.scheme_rule.sphere, "optimizer.ema_decay", decay, right)
        name, averages = self.optimizer.name, self.optimizer.kind.averages_steps
        check(not averages or not self.model.scheme_rule.sphere, "optimizer.name", name, right)
        right = "model.balance_bias=true moves biases beside the optimizer, whose average would not know of it"
        check(not averages or not self.model.balance_bias, "optimizer.name", name, right)

    def _check_widths(self) -> None:
        known = " and ".join(name for name, kind in OPTIMIZERS.items() if kind.follows_width)
        right = f"not with optimizer.name={self.optimizer.name}: the rules for the width are those of {known}"
        has_rules = self.model.base_width is None or self.optimizer.kind.follows_width
        check(has_rules, "model.base_width", self.model.base_width, right)

    def at_step(self, step: int) -> "RunConfig":
        """This configuration with its model as it is after so many steps; see ModelConfig.at_step."""
        model = self.model.at_step(step)
        return self if model is self.model else dataclasses.replace(self, model=model)

    @property
    def microbatch_size(self) -> int:
        """Sequences per forward pass, over all devices, where train.max_device_sequences does not lower it."""
        return self.train.batch_size // self.train.grad_accumulation

    @property
    def tokens_per_step(self) -> int:
        """Positions of one optimizer step, over all devices; those that hold padding count too."""
        return self.train.batch_size * self.train.seq_len
