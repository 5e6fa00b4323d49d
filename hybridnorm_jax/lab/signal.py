"""Signal and gradients of freshly initialized models, layer by layer, for many schemes, depths and initializers."""

import dataclasses
import itertools
import json
import os
import shlex
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np

from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.config.values import show
from hybridnorm_jax.config.yaml_files import take
from hybridnorm_jax.fields import check, check_choice, check_positive, key
from hybridnorm_jax.lab.claims import Claim, claims
from hybridnorm_jax.lab.compare import DEFAULT, refuse
from hybridnorm_jax.lab.signal_figures import write_figures
from hybridnorm_jax.lab.styles import figure
from hybridnorm_jax.model.config import INITIALIZERS, ModelConfig
from hybridnorm_jax.model.decoder import Decoder
from hybridnorm_jax.model.schemes import SCHEMES
from hybridnorm_jax.training.program import check_precision
from hybridnorm_jax.training.watch import measure_signal


@dataclasses.dataclass(frozen=True)
class SignalOptions:
    """What is measured."""

    schemes: tuple[str, ...] = key(
        ("pre", "post", "hybrid", "hybrid_star", "span", "peri", "deepnorm"), "norm placements; [all]: every one"
    )
    depths: tuple[int, ...] = key((8, 32, 96), "numbers of blocks")
    initializers: tuple[str, ...] = key(("normal", "megatron"), "auto: the one each scheme recommends")
    sequences: int = key(2, "of random tokens")
    seq_len: int = key(128, "tokens of each")
    out: str = key("runs/lab-signal", "directory of signal.json and the figures")

    def __post_init__(self):
        for name in ("schemes", "depths", "initializers"):
            values = getattr(self, name)
            check(bool(values), name, "[]", "at least one is needed")
            check(len(set(values)) == len(values), name, show(values), "one of them is named twice")
        for depth in self.depths:
            check(depth >= 1, "depths", depth, "must be at least 1")
        for initializer in self.initializers:
            check_choice("initializers", initializer, ("auto", *INITIALIZERS))
        check_positive("signal", self, ("sequences", "seq_len"))


@dataclasses.dataclass(frozen=True)
class Signal:
    """One model's measures.

    Attributes:
      scheme, depth, initializer: of the model.
      measures: name -> values by layer, see training.watch.measure_signal; NaN where there is none.
    """

    scheme: str
    depth: int
    initializer: str
    measures: dict[str, np.ndarray]


def run(words: Sequence[str]) -> list[Signal]:
    """Measure what `[FILE.yaml ...] [schemes=...] [depths=...] [initializers=...] [key=value ...]` asks for.

    Prints a table and what holds of the papers' claims; writes <out>/signal.json and a figure for each measure.

    Raises:
      ConfigError: one line, before anything is measured.
    """
    began = time.perf_counter()
    options, others = take(SignalOptions, words)
    instead = {"model.scheme": "schemes", "model.num_layers": "depths", "model.initializer": "initializers"}
    refuse(others, instead)
    config = parse(others, DEFAULT)
    if options.schemes == ("all",):
        options = dataclasses.replace(options, schemes=tuple(SCHEMES))
    for scheme in options.schemes:
        check_choice("schemes", scheme, SCHEMES)
    _check(options, config.model)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    batch = random_batch(config.model.vocab_size, options.sequences, options.seq_len, config.train.seed)
    found: list[Signal] = []
    print(header())
    # XLA compiles on one core: several models at once take a fraction of the time.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        work = [
            pool.submit(measure, config.model, scheme, depth, options.initializers, batch, config.train.seed)
            for scheme, depth in itertools.product(options.schemes, options.depths)
        ]
        for signal in itertools.chain.from_iterable(future.result() for future in work):
            found.append(signal)
            print(row(signal), flush=True)
    held = claims(found)
    print("\n" + "\n".join(str(claim) for claim in held))
    (out / "signal.json").write_text(json.dumps(_as_json(words, options, config, found, held), indent=1) + "\n")
    figures = write_figures(out, found)
    print(f"\n{out / 'signal.json'} and {len(figures)} figures, {time.perf_counter() - began:.0f} s")
    return found


def _check(options: SignalOptions, model: ModelConfig) -> None:
    """Raise ConfigError or UserError for what would fail after all is measured, or in the midst of it."""
    figure()  # whether matplotlib is there
    check_precision(model)
    limit = model.max_positions
    right = f"must be at most model.max_positions={limit}"
    check(limit is None or options.seq_len <= limit, "seq_len", options.seq_len, right)
    for scheme, depth, initializer in itertools.product(options.schemes, options.depths, options.initializers):
        dataclasses.replace(model, scheme=scheme, num_layers=depth, initializer=initializer)


def random_batch(vocab_size: int, sequences: int, seq_len: int, seed: int) -> dict[str, np.ndarray]:
    """Tokens and targets drawn uniformly and independently of each other."""
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(0, vocab_size, (2, sequences, seq_len), dtype=np.int32)
    return {"tokens": tokens, "targets": targets, "weights": np.ones(tokens.shape, np.float32)}


def measure(
    model: ModelConfig, scheme: str, depth: int, initializers: Sequence[str], batch: dict[str, np.ndarray], seed: int
) -> list[Signal]:
    """The measures of one scheme at one depth, for each initializer."""

    def config(initializer: str) -> ModelConfig:
        return dataclasses.replace(model, scheme=scheme, num_layers=depth, initializer=initializer)

    # Parameters of all initializers are measured by one compiled function.
    decoder = Decoder(config("auto"))
    step = _jit(lambda params, batch: measure_signal(decoder, params, batch)[0])
    signals = []
    for initializer in initializers:
        init = _jit(Decoder(config(initializer)).init)
        params = init(jax.random.key(seed), batch["tokens"][:1, :2])["params"]
        measures = {name: np.asarray(values) for name, values in step(params, batch).items()}
        signals.append(Signal(scheme, depth, initializer, measures))
    return signals


def _jit(function: Callable) -> Callable:
    """Compiled for a CPU with few optimizations: what runs once or twice takes longer to compile than to compute."""
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    if jaxlib.__version__.startswith("0.10."):  # later ones have no other way to compile fusions, and refuse the word
        quick["xla_cpu_use_fusion_emitters"] = False
    return jax.jit(function, compiler_options=quick if jax.default_backend() == "cpu" else None)


COLUMNS = (
    ("RMS 1", "stream_rms", 1),
    ("RMS L", "stream_rms", -1),
    ("similarity L", "token_similarity", -1),
    ("|dW| 1", "gradient/block", 0),
    ("|dW| L", "gradient/block", -1),
    ("|dx| 0", "stream_gradient", 0),
    ("|dx| L", "stream_gradient", -1),
    ("entropy 1", "attention_entropy", 0),
    ("entropy L", "attention_entropy", -1),
)


def header() -> str:
    """The table's first lines."""
    names = "".join(f"{name:>13}" for name, _, _ in COLUMNS)
    return (
        "RMS: of the stream after block 1 and L; |dW|: gradient norm of all weights of block 1 and L; |dx|: gradient\n"
        "norm of the stream after the embedding and after block L; entropy: of attention in block 1 and L, in nats.\n\n"
        f"{'scheme':20}{'L':>4} {'initializer':13}{names}{'logit max':>13}"
    )


def row(signal: Signal) -> str:
    """One model's line of the table."""
    cells = "".join(f"{signal.measures[name][at]:13.4g}" for _, name, at in COLUMNS)
    largest = signal.measures["largest_logit"].max()
    return f"{signal.scheme:20}{signal.depth:4} {signal.initializer:13}{cells}{largest:13.4g}"


def _as_json(words: Sequence[str], options: SignalOptions, config: Any, found: list[Signal], held: list[Claim]) -> dict:
    """Everything that was measured, with what it was measured on."""
    model = dataclasses.asdict(config.model)
    return {
        "command": shlex.join(["python", "-m", "hybridnorm_jax.lab", "signal", *words]),
        "options": dataclasses.asdict(options),
        "model": {name: model[name] for name in model if name not in ("scheme", "num_layers", "initializer")},
        "seed": config.train.seed,
        "versions": {"jax": jax.__version__},
        "claims": [dataclasses.asdict(claim) for claim in held],
        "models": [
            {
                "scheme": signal.scheme,
                "depth": signal.depth,
                "initializer": signal.initializer,
                **{name: _finite(values) for name, values in signal.measures.items()},
            }
            for signal in found
        ],
    }


def _finite(values: np.ndarray) -> Any:
    """As lists, null for what is not finite."""
    return jax.tree.map(lambda value: value if np.isfinite(value) else None, values.tolist())
