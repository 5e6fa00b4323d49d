"""What the cheaper norms save: python benchmarks/equivalence.py [--shapes small medium vit] [--modes forward train].

Times eight forms of one model, in turns (Pre-RMSNorm and Pre-CRMSNorm: 2305.14858). Ratios are to the first:

    pre_ln               Pre-LN: LayerNorm with scale and bias
    pre_ln_one_pass      the same parameters, the variance as mean(x^2) - mean(x)^2, which flax.linen.LayerNorm takes
    pre_ln_plain         Pre-LN without scale and bias, from scratch
    pre_rmsnorm          pre_ln converted, the same function
    pre_crmsnorm         pre_ln converted, the same function, d - 1 channels stored
    pre_crmsnorm_padded  that, filled up with zeros to a multiple of --pad-to channels
    crmsnorm             CRMSNorm without scale and bias, from scratch: stores d channels of a zero-mean d + 1
    no_norm              no norm anywhere: a bound on what there is to save

forward is one sequence with the logits of all positions. train is forward, backward and AdamW; the three converted
forms train Pre-LN's parameters and compute with their conversion, which is part of the step. It takes as long for few
tokens as for many, and is also timed alone, with the pull-back of the gradient.

small, medium: GPT-3's, as our Decoder, its head untied (conversion unties a tied one). vit: ViT-B, as in vit.py here.
A CPU gets fewer layers; the vocabulary is then cut in proportion, and blocks and head keep their shares of the work.

A turn is one call, or several where a call is short. In each round every form has one turn, and in eight rounds each
form follows each other form once. The ratio is the median over rounds of (form / pre_ln), beside its quartiles.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
from norm_forms import FORMS, SHAPES, Contest, agreement

PAPER = {
    "ViT A100 amp": {"pre_rmsnorm": 0.970, "pre_crmsnorm": 0.978},
    "ViT A100 fp32": {"pre_rmsnorm": 0.985, "pre_crmsnorm": 0.995},
    "ViT CPU, 16 threads": {"pre_rmsnorm": 0.901, "pre_crmsnorm": 0.886},
    "ViT JAX": {"pre_rmsnorm": 0.987, "pre_crmsnorm": 1.0005},
    "GPT-3 Small": {"pre_rmsnorm": 0.90, "pre_crmsnorm": 0.89},
    "GPT-3 Medium": {"pre_rmsnorm": 0.97, "pre_crmsnorm": 0.96},
}
TURN, MOST_CALLS = 0.02, 20  # a turn takes this many seconds or calls
PUBLIC = ["small", "medium", "vit"]


def turn_orders(names: list[str], rounds: int) -> list[list[str]]:
    """An order for each round. For an even number of names, each follows each other once in that many rounds.

    The first order steps 0, 1, -1, 2, -2, ...; the others are it shifted (a Williams square).
    """
    n = len(names)
    zigzag = [(number + 1) // 2 * (1 if number % 2 else -1) for number in range(n)]
    return [[names[(place + shift) % n] for place in zigzag] for shift in range(rounds)]


def measure(steps: dict[str, Callable], rounds: int) -> dict[str, np.ndarray]:
    """Seconds per call of each step in each round.

    Raises:
      RuntimeError: a result is not finite.
    """

    def turn(name, calls):
        begin = time.perf_counter()
        for _ in range(calls):
            result = steps[name]()
        jax.block_until_ready(result)
        return (time.perf_counter() - begin) / calls

    for name, step in steps.items():  # compiles, and is the first half of the warm-up
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(step())):
            raise RuntimeError(f"{name}: its result is not finite")
    calls = min(MOST_CALLS, max(1, math.ceil(TURN / min(turn(name, 1) for name in steps))))
    times = {name: [] for name in steps}
    for order in turn_orders(list(steps), rounds):
        for name in order:
            times[name].append(turn(name, calls))
    return {name: np.array(values) for name, values in times.items()}


def contest_result(contest: Contest, rounds: int) -> dict:
    """The measured times and ratios of one shape and mode."""
    parameters, times = contest.parameters(), measure(contest.steps(), rounds)
    forms = {}
    for name, values in times.items():
        lower, ratio, upper = np.percentile(values / times["pre_ln"], [25, 50, 75]).tolist()
        forms[name] = {
            "seconds": float(np.median(values)),
            "ratio": ratio,
            "quartiles": [lower, upper],
            "parameters": parameters[name],
        }
    if contest.mode == "train":
        for name, values in measure(contest.conversions(), rounds).items():
            forms[name]["conversion_seconds"] = float(np.median(values))
    return {
        "layers": contest.layers,
        "full_layers": contest.shape.num_layers,
        "outputs": contest.outputs,
        "batch": contest.batch,
        "seq": contest.seq,
        "forms": forms,
    }


def run(options: argparse.Namespace) -> dict:
    """Everything that the command line asks for."""
    agreements, contests = {}, {}
    for name in options.shapes:
        for mode in options.modes:
            contest = Contest(SHAPES[name], mode, options)
            if name not in agreements:
                agreements[name] = agreement(contest)
            contests[f"{name} {mode}"] = contest_result(contest, options.rounds)
            del contest  # its parameters, before the next one's
    return {
        "device": jax.devices()[0].device_kind,
        "threads": len(os.sched_getaffinity(0)),
        "dtype": options.dtype,
        "jax": jax.__version__,
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "rounds": options.rounds,
        "paper": PAPER,
        "agreement": agreements,
        "contests": contests,
    }


def report(result: dict) -> str:
    """The result for people."""
    contests = result["contests"]
    lines = [
        f"{result['device']}, {result['threads']} threads, {result['dtype']}, JAX {result['jax']}, "
        f"GLIBC_TUNABLES={result['glibc_tunables'] or 'unset'}, {result['rounds']} rounds"
    ]
    for title, found in contests.items():
        cut = "" if found["layers"] == found["full_layers"] else f" (the model has {found['full_layers']})"
        sizes = f"{found['outputs']} outputs, {found['batch']} x {found['seq']} tokens"
        base = found["forms"]["pre_ln"]["seconds"] * 1e3
        lines.append(f"  {title:<16}  Pre-LN {base:,.1f} ms: {found['layers']} layers{cut}, {sizes}")

    def ratio(form):
        lower, upper = form["quartiles"]
        return f"{form['ratio']:.3f} ({lower:.3f}-{upper:.3f})"

    def conversion(form, base):
        seconds = form.get("conversion_seconds")
        return "" if seconds is None else f"{seconds / base['seconds']:.3f}"

    def column(found, cell):
        return [cell(found[name]) if name in found else "" for name in FORMS]

    forms = {title: found["forms"] for title, found in contests.items()}
    parts = {
        "time / Pre-LN, median (quartiles)": {title: column(found, ratio) for title, found in forms.items()},
        "conversion and pull-back alone / Pre-LN's step": {
            title: column(found, lambda form, base=found["pre_ln"]: conversion(form, base))
            for title, found in forms.items()
            if title.endswith("train")
        },
        "the paper's ratios (inference, GPT-3 at batch 1; its ViT trained 1 to 2.5 % faster)": {
            title: column(found, "{:g}".format) for title, found in result["paper"].items()
        },
        "parameters of the model that computes, millions": {
            title: column(found, lambda form: f"{form['parameters'] / 1e6:,.3f}") for title, found in forms.items()
        },
        "largest difference of logits from what they must equal, over the largest logit, float32": {
            title: column(found, "{:.1e}".format) for title, found in result["agreement"].items()
        },
    }
    for title, columns in parts.items():
        if columns:
            lines += ["", title, *table(columns)]
    return "\n".join([*lines, "", verdict(contests)])


def table(columns: dict[str, list[str]]) -> list[str]:
    """Lines with one row per form, those without any value left out."""
    widths = {title: max(map(len, (title, *cells))) for title, cells in columns.items()}
    rows = [row for row in zip(FORMS.values(), *columns.values(), strict=True) if any(row[1:])]
    return [
        f"  {first:<26}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths.values(), strict=True))
        for first, *cells in [("", *columns), *rows]
    ]


def verdict(contests: dict) -> str:
    """One line: where Pre-RMSNorm costs more than 1.02 of Pre-LN, and where a CRMSNorm costs more than 1."""

    def above(bound, names):
        for title, found in contests.items():
            for name in names:
                form = found["forms"].get(name)
                if form and form["ratio"] > bound:
                    unsure = "" if form["quartiles"][0] > bound else f", quartiles on both sides of {bound}"
                    yield f"{FORMS[name]} {title} {form['ratio']:.3f}{unsure}"

    slow = "; ".join(above(1.02, ["pre_rmsnorm"])) or "nowhere"
    loses = "; ".join(above(1, ["pre_crmsnorm", "pre_crmsnorm_padded", "crmsnorm"])) or "nowhere"
    return f"Pre-RMSNorm / Pre-LN above 1.02: {slow}. CRMSNorm slower than Pre-LN: {loses}."


def main(words: list[str]) -> None:
    """Measure what the command line asks for and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument(
        "--shapes", choices=SHAPES, default=PUBLIC, help=", ".join(PUBLIC) + " (default all)", **several
    )
    parser.add_argument("--forms", choices=FORMS, default=FORMS, help="beside pre_ln (default all)", **several)
    modes = ["forward", "train"]
    parser.add_argument("--modes", choices=modes, default=modes, help="forward, train (default both)", **several)
    parser.add_argument("--rounds", type=positive, default=8, help="turns of each form (default 8)")
    parser.add_argument("--seq", type=positive, default=512, help="tokens of small and medium (default 512)")
    parser.add_argument("--layers", type=positive, help="in every shape and mode (default: all; fewer on a CPU)")
    parser.add_argument("--batch", type=positive, help="sequences of a training step (16, vit 32; GPU 32, 128)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="default float32")
    parser.add_argument("--pad-to", type=positive, default=128, help="of pre_crmsnorm_padded (default 128)")
    parser.add_argument("--unroll", type=positive, help="blocks per iteration of the scan (default: all; 1 on a CPU)")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    options = parser.parse_args(words)
    result = run(options)
    print(json.dumps(result) if options.json else report(result))


def positive(word: str) -> int:
    """argparse's type of a number from 1 on."""
    value = int(word)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


if __name__ == "__main__":
    main(sys.argv[1:])
