"""Signal and gradients of freshly initialized models, layer by layer, for many schemes, depths and initializers."""

import dataclasses
import itertools
import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jaxlib
import numpy as np

from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.config.yaml_files import take
from hybridnorm_jax.config_fields import check, check_choice, check_fields, key
from hybridnorm_jax.lab.compare_options import DEFAULT, refuse
from hybridnorm_jax.lab.figure_styles import figure
from hybridnorm_jax.lab.signal_claims import claims
from hybridnorm_jax.lab.signal_figures import write_figures
from hybridnorm_jax.model.config import INITIALIZERS, ModelConfig
from hybridnorm_jax.model.decoder import Decoder
from hybridnorm_jax.model.schemes import SCHEMES
from hybridnorm_jax.training.layer_measures import measure_signal
from hybridnorm_jax.training.program import check_precision
from hybridnorm_jax.training.state import init_params
from hybridnorm_jax.whole_files import expanded

# Key of a run that is set here -> what sets it.
SET_HERE = {
    "model.scheme": "schemes=[...]",
    "model.num_layers": "depths=[...]",
    "model.initializer": "initializers=[...]",
}


@dataclasses.dataclass(frozen=True)
class SignalOptions:
    """What is measured."""

    schemes: tuple[str, ...] = key(
        ("pre", "post", "hybrid", "hybrid_star", "span", "peri", "deepnorm"), "norm placements; [all]: every one"
    )
    depths: tuple[int, ...] = key((8, 32, 96), "numbers of blocks", at_least=1, at_most=10_000)
    initializers: tuple[str, ...] = key(("normal", "megatron"), "auto: the one each scheme recommends")
    sequences: int = key(2, "how many sequences of random tokens", at_least=1, at_most=65_536)
    seq_len: int = key(128, "tokens of each sequence", at_least=1, at_most=1_048_576)
    out: str = key("runs/lab-signal", "directory for signal.json and the figures")

    def __post_init__(self) -> None:
        check_fields("", self)
        check(bool(self.out), "out", self.out, "must name a directory")
        for name in ("schemes", "depths", "initializers"):
            values = getattr(self, name)
            check(bool(values), name, "[]", "at least one is needed")
            check(len(set(values)) == len(values), name, values, "one of them is named twice")
        for initializer in self.initializers:
            check_choice("initializers", initializer, ("auto", *INITIALIZERS))


@dataclasses.dataclass(frozen=True)
class Signal:
    """What was measured of one model.

    Attributes:
      scheme, depth, initializer: of the model.
      measures: name -> values by layer, see training.layer_measures.measure_signal; NaN where there is none.
    """

    scheme: str
    depth: int
    initializer: str
    measures: dict[str, np.ndarray]


def run(arguments: Sequence[str]) -> list[Signal]:
    """Measure what `[CONFIG ...] [schemes=...] [depths=...] [initializers=...] [key=value ...]` asks for.

    Prints a table and whether the papers' claims hold. Writes <out>/signal.json and a figure for each measure.

    Raises:
      ConfigError: one line, before anything is measured.
    """
    began = time.perf_counter()
    options, config = _read(arguments)
    out = Path(expanded(options.out))
    out.mkdir(parents=True, exist_ok=True)
    print(header())
    signals = []
    for signal in _measure_all(options, config):
        signals.append(signal)
        print(row(signal), flush=True)
    checked = claims(signals)
    print("\n" + "\n".join(str(claim) for claim in checked))
    found = {
        "command": shlex.join(["hybridnorm", "lab", "signal", *arguments]),
        **_described(options, config),
        "claims": [dataclasses.asdict(claim) for claim in checked],
        "models": [_as_json(signal) for signal in signals],
    }
    (out / "signal.json").write_text(json.dumps(found, indent=1) + "\n")
    figures = write_figures(out, signals)
    print(f"\n{out / 'signal.json'} and {len(figures)} figures, {time.perf_counter() - began:.0f} s")
    return signals


def _read(arguments: Sequence[str]) -> tuple[SignalOptions, RunConfig]:
    """The options, and the configuration of the models.

    Raises:
      ConfigError, UserError: also for what would fail only after everything is measured.
    """
    options, others = take(SignalOptions, arguments)
    refuse(others, SET_HERE)
    config = parse(others, DEFAULT)  # imports plugins, which may bring schemes
    if options.schemes == ("all",):
        options = dataclasses.replace(options, schemes=tuple(SCHEMES))
    for scheme in options.schemes:
        check_choice("schemes", scheme, SCHEMES)
    figure()  # whether matplotlib is installed
    check_precision(config.model)
    limit = config.model.max_positions
    right = f"must be at most model.max_positions={limit}"
    check(limit is None or options.seq_len <= limit, "seq_len", options.seq_len, right)
    for scheme, depth, initializer in itertools.product(options.schemes, options.depths, options.initializers):
        _model(config.model, scheme, depth, initializer)
    return options, config


def _model(base: ModelConfig, scheme: str, depth: int, initializer: str) -> ModelConfig:
    return base.with_scheme(scheme, num_layers=depth, initializer=initializer)


def _measure_all(options: SignalOptions, config: RunConfig) -> Iterator[Signal]:
    """The models by scheme, then depth, then initializer."""
    batch = random_batch(config.model.vocab_size, options.sequences, options.seq_len, config.train.seed)
    # XLA compiles one program on one core: several at once take a fraction of the time.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [
            pool.submit(measure, config.model, scheme, depth, options.initializers, batch, config.train.seed)
            for scheme, depth in itertools.product(options.schemes, options.depths)
        ]
        for future in futures:
            yield from future.result()


def random_batch(vocab_size: int, sequences: int, seq_len: int, seed: int) -> dict[str, np.ndarray]:
    """Tokens and targets drawn uniformly and independently of each other."""
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(0, vocab_size, (2, sequences, seq_len), dtype=np.int32)
    return {"tokens": tokens, "targets": targets, "weights": np.ones(tokens.shape, np.float32)}


def measure(
    model: ModelConfig, scheme: str, depth: int, initializers: Sequence[str], batch: dict[str, np.ndarray], seed: int
) -> list[Signal]:
    """Measure one scheme at one depth, with each initializer.

    Args:
      model: everything else of the models.
      batch: see random_batch.
      seed: of the parameters.
    """
    # The same compiled function measures the parameters of all initializers.
    decoder = Decoder(_model(model, scheme, depth, "auto"))
    first = jax.numpy.int32(0)
    step = _jit(lambda params, batch: measure_signal(decoder, params, batch, step=first)[0])
    signals = []
    for initializer in initializers:
        init = _jit(partial(init_params, _model(model, scheme, depth, initializer)))
        params = init(jax.random.key(seed))
        measures = {name: np.asarray(values) for name, values in step(params, batch).items()}
        signals.append(Signal(scheme=scheme, depth=depth, initializer=initializer, measures=measures))
    return signals


def _jit(function: Callable) -> Callable:
    """The function, compiled with few optimizations on a CPU.

    It runs once or twice, which takes less time than to compile it.
    """
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    # Later versions have no other way to compile fusions, and refuse the option.
    if jaxlib.__version__.startswith("0.10."):
        quick["xla_cpu_use_fusion_emitters"] = False
    return jax.jit(function, compiler_options=quick if jax.default_backend() == "cpu" else None)


class Column(NamedTuple):
    """A column of the table: the value of a measure at one index."""

    title: str
    measure: str
    index: int


COLUMNS = (
    Column("RMS 1", "stream_rms", index=1),
    Column("RMS L", "stream_rms", index=-1),
    Column("similarity L", "token_similarity", index=-1),
    Column("|dW| 1", "gradient/block", index=0),
    Column("|dW| L", "gradient/block", index=-1),
    Column("|dx| 0", "stream_gradient", index=0),
    Column("|dx| L", "stream_gradient", index=-1),
    Column("entropy 1", "attention_entropy", index=0),
    Column("entropy L", "attention_entropy", index=-1),
)


def header() -> str:
    """The table's first lines."""
    titles = "".join(f"{column.title:>13}" for column in COLUMNS)
    return (
        "RMS: of the stream after block 1 and L; |dW|: gradient norm of all weights of block 1 and L; |dx|: gradient\n"
        "norm of the stream after the embedding and after block L; entropy: of attention in block 1 and L, in nats.\n\n"
        f"{'scheme':20}{'L':>4} {'initializer':13}{titles}{'logit max':>13}"
    )


def row(signal: Signal) -> str:
    """One model's line of the table."""
    cells = "".join(f"{signal.measures[column.measure][column.index]:13.4g}" for column in COLUMNS)
    largest = signal.measures["largest_logit"].max()
    return f"{signal.scheme:20}{signal.depth:4} {signal.initializer:13}{cells}{largest:13.4g}"


def _described(options: SignalOptions, config: RunConfig) -> dict[str, Any]:
    """What signal.json says of all models together."""
    model = dataclasses.asdict(config.model)
    for varied in ("scheme", "num_layers", "initializer"):
        del model[varied]
    return {
        "options": dataclasses.asdict(options),
        "model": model,
        "seed": config.train.seed,
        "versions": {"jax": jax.__version__},
    }


def _as_json(signal: Signal) -> dict[str, Any]:
    """What signal.json says of one model."""
    described = {"scheme": signal.scheme, "depth": signal.depth, "initializer": signal.initializer}
    return described | {name: _finite(values) for name, values in signal.measures.items()}


def _finite(values: np.ndarray) -> Any:
    """The values as lists, with null for what is not finite."""
    return jax.tree.map(lambda value: value if np.isfinite(value) else None, values.tolist())
