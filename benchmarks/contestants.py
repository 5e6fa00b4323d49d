"""Our training step and PyTorch's, each in a process of its own, that compute in turns.

In one process their threads would get into each other's way, and only one of them could have the memory settings it is
used with. A process reads a number of steps from standard input and answers with the seconds that they took.

    python benchmarks/contestants.py ours quickstart     is what train_step.py --peer starts
"""

import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import jax
import numpy as np

from hybridnorm_jax.commands.huge_pages import TUNABLES, begin_again_with_huge_pages
from hybridnorm_jax.commands.main import exit_status
from hybridnorm_jax.commands.program_cache import keep_programs
from hybridnorm_jax.config.arguments import parse
from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.errors import UserError, first_line
from hybridnorm_jax.training.program import Program

# Between turns, so that threads that still wait for work in a loop have gone to sleep.
PAUSE = 0.3
# Seconds of steps before the first turn, and a quarter of it before every other, that do not count: the system clears
# memory that is used for the first time, and may have taken away what lay idle.
WARM_UP = 4.0


def random_batch(config: RunConfig) -> dict[str, np.ndarray]:
    """Tokens, targets and weights of one step."""
    train = config.train
    shape = (train.grad_accumulation, config.microbatch_size, train.seq_len + 1)
    stream = np.random.default_rng(0).integers(0, config.model.vocab_size, shape).astype(np.int32)
    tokens, targets = stream[..., :-1], stream[..., 1:]
    return {"tokens": tokens, "targets": targets, "weights": np.ones(tokens.shape, np.float32)}


# ---- In the contestant's process


class Contestant(Protocol):
    """What takes steps. `facts` says with which versions, threads and flags."""

    facts: dict[str, Any]

    def steps(self, count: int) -> None:
        """Take so many steps, and wait for the last one."""
        ...


class Ours:
    """Our step as `hybridnorm train` takes it: the metrics of a step are read while the next one is computed."""

    def __init__(self, config: RunConfig):
        keep_programs()
        self.program = Program(config)
        self.state = self.program.fresh_state()
        self.batch = random_batch(config)
        self.facts = {
            "jax": jax.__version__,
            "device": self.program.mesh.devices.flat[0].device_kind,
            "threads": len(os.sched_getaffinity(0)),
            TUNABLES: os.environ.get(TUNABLES, ""),
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
            "model.scan_unroll": config.model.scan_unroll,
        }

    def steps(self, count: int) -> None:
        """Take so many steps, and wait for the last one."""
        late = None
        for _ in range(count):
            self.state, metrics = self.program.train_step(self.state, self.batch)
            if late is not None:
                jax.device_get(late)
            late = metrics
        jax.block_until_ready((self.state, late))


class Peer:
    """Olmo2 of transformers: the same widths and depth, AdamW and clipping, eager PyTorch with fused attention.

    Raises:
      UserError: torch or transformers is not installed.
    """

    def __init__(self, config: RunConfig):
        try:
            import torch
            import transformers
        except ImportError as error:
            raise UserError(f"--peer needs torch and transformers: {error}") from error
        model, self.torch = config.model, torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        sizes = transformers.Olmo2Config(
            vocab_size=model.vocab_size,
            hidden_size=model.d_model,
            intermediate_size=model.mlp_dim,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            num_key_value_heads=model.num_kv_heads,
            max_position_embeddings=config.train.seq_len,
            tie_word_embeddings=model.tie_embeddings,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
            attn_implementation="sdpa",
        )
        self.model = transformers.Olmo2ForCausalLM(sizes).to(self.device).train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.optimizer.learning_rate,
            betas=(config.optimizer.b1, config.optimizer.b2),
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )
        self.computes_in_bfloat16 = model.dtype == "bfloat16"
        self.microbatches = [
            torch.tensor(part, dtype=torch.long).to(self.device) for part in random_batch(config)["tokens"]
        ]
        self.facts = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": self.device,
            "threads": torch.get_num_threads(),
            TUNABLES: os.environ.get(TUNABLES, ""),
        }

    def steps(self, count: int) -> None:
        """Take so many steps, and wait for the last one."""
        for _ in range(count):
            self._step()

    def _step(self) -> None:
        torch = self.torch
        for tokens in self.microbatches:
            with torch.autocast(self.device, torch.bfloat16, enabled=self.computes_in_bfloat16):
                loss = self.model(input_ids=tokens, labels=tokens).loss / len(self.microbatches)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        float(loss.detach())  # waits for the device


CONTESTANTS = {"ours": Ours, "peer": Peer}


def serve(name: str, settings: Sequence[str]) -> None:
    """Be a contestant: a line of JSON with its facts, then the seconds of as many steps as each line asks for."""
    contestant: Contestant = CONTESTANTS[name](parse(settings))
    _warm_up(contestant, WARM_UP)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    print(json.dumps(contestant.facts), file=answers, flush=True)
    for line in sys.stdin:
        _warm_up(contestant, WARM_UP / 4)
        begin = time.perf_counter()
        contestant.steps(int(line))
        print(time.perf_counter() - begin, file=answers, flush=True)


def _warm_up(contestant: Contestant, seconds: float) -> None:
    begin = time.perf_counter()
    while time.perf_counter() < begin + seconds:
        contestant.steps(1)


# ---- In the process that asks


class Process:
    """A contestant in a process of its own; a context manager, at whose end the process has ended."""

    def __init__(self, name: str, settings: Sequence[str], tunables: str):
        """Start it.

        Args:
          name: of CONTESTANTS.
          settings: arguments such as ("quickstart", "model.scheme=pre").
          tunables: GLIBC_TUNABLES, as its users have them; "": unset. Ours then sets what it needs by itself.
        """
        environment = {key: value for key, value in os.environ.items() if key != TUNABLES}
        if tunables:
            environment[TUNABLES] = tunables
        line = [sys.executable, str(Path(__file__)), name, *settings]
        self._process = subprocess.Popen(
            line, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.facts: dict[str, Any] = json.loads(self._answer())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def seconds(self, steps: int) -> float:
        """How long a step takes, the mean of so many after one that is not counted."""
        time.sleep(PAUSE)
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return float(self._answer()) / steps

    def _answer(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            said = self._process.communicate()[1].strip().splitlines() or ["no answer"]
            raise UserError(said[-1].removeprefix("error: "))
        return line


class Duel(NamedTuple):
    """Two fresh processes side by side: seconds a step of every turn, and what they say of themselves."""

    ours: list[float]
    peer: list[float]
    facts: dict[str, dict[str, Any]]

    @property
    def ratio(self) -> float:
        """Our tokens per second over theirs, by the medians."""
        return statistics.median(self.peer) / statistics.median(self.ours)


def duel(settings: Sequence[str], *, turns: int, seconds: float, peer_tunables: str) -> Duel:
    """Let both compute in turns of about so many seconds each."""
    with Process("ours", settings, "") as ours, Process("peer", settings, peer_tunables) as peer:
        sides = {"ours": ours, "peer": peer}
        steps = {name: max(2, round(seconds / side.seconds(2))) for name, side in sides.items()}
        times: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(turns):
            for name in sorted(sides, reverse=turn % 2 == 1):
                times[name].append(sides[name].seconds(steps[name]))
        return Duel(times["ours"], times["peer"], {name: side.facts for name, side in sides.items()})


def contest(settings: Sequence[str], *, duels: int, turns: int, seconds: float, peer_tunables: str) -> dict[str, Any]:
    """Several duels of one shape: medians over the duels, and every ratio."""
    tokens = parse(settings).tokens_per_step
    found = []
    for number in range(1, duels + 1):
        found.append(duel(settings, turns=turns, seconds=seconds, peer_tunables=peer_tunables))
        ours, peer = (tokens / statistics.median(times) for times in (found[-1].ours, found[-1].peer))
        said = f"{' '.join(settings)}, duel {number} of {duels}: {ours:,.0f} and {peer:,.0f} tokens/s"
        print(f"{said}, ours / peer {ours / peer:.2f}", file=sys.stderr, flush=True)
    rates = {name: [tokens / statistics.median(getattr(one, name)) for one in found] for name in ("ours", "peer")}
    ratios = [one.ratio for one in found]
    return {
        "setting": list(settings),
        "tokens per step": tokens,
        "ours, tokens per second": statistics.median(rates["ours"]),
        "ours, each duel": rates["ours"],
        "peer, tokens per second": statistics.median(rates["peer"]),
        "peer, each duel": rates["peer"],
        "ours / peer": statistics.median(ratios),
        "ours / peer, each duel": ratios,
        "facts": found[-1].facts,
        "processor": _processor(),
    }


def _processor() -> str:
    """The processor's name and how many cores of it there are, as lscpu says them."""
    try:
        text = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return first_line(error)
    rows = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}
    keys = ("Vendor ID", "Model name", "CPU family", "Model", "CPU(s)", "L3 cache")
    return ", ".join(f"{key} {rows[key]}" for key in keys if key in rows)


def report(results: Sequence[Mapping[str, Any]]) -> str:
    """The results for people."""
    lines = [f"{'':34}{'ours':>10}{'peer':>10}   ours / peer, tokens per second"]
    for result in results:
        ratios = result["ours / peer, each duel"]
        each = " ".join(f"{ratio:.2f}" for ratio in sorted(ratios))
        ours, peer = result["ours, tokens per second"], result["peer, tokens per second"]
        name = " ".join(result["setting"])
        lines.append(f"{name:34}{ours:>10,.0f}{peer:>10,.0f}   median {result['ours / peer']:.2f} of {each}")
    for name in CONTESTANTS:
        facts = results[-1]["facts"][name]
        lines.append(f"{name}: {', '.join(f'{key} {value}' for key, value in facts.items() if value != '')}")
    return "\n".join([*lines, results[-1]["processor"], f"numpy {importlib.metadata.version('numpy')}"])


if __name__ == "__main__":
    if sys.argv[1] == "ours":
        begin_again_with_huge_pages()
    sys.exit(exit_status(lambda: serve(sys.argv[1], sys.argv[2:])))
