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
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from command_line import aligned, machine, machine_line, make_parser, positive, print_result, run_main
from norm_contest import Contest, ContestOptions, agreement
from norm_forms import FORMS, SHAPES

from hybridnorm_jax.lab.turns import measure, quartiles

PAPER = {
    "ViT A100 amp": {"pre_rmsnorm": 0.970, "pre_crmsnorm": 0.978},
    "ViT A100 fp32": {"pre_rmsnorm": 0.985, "pre_crmsnorm": 0.995},
    "ViT CPU, 16 threads": {"pre_rmsnorm": 0.901, "pre_crmsnorm": 0.886},
    "ViT JAX": {"pre_rmsnorm": 0.987, "pre_crmsnorm": 1.0005},
    "GPT-3 Small": {"pre_rmsnorm": 0.90, "pre_crmsnorm": 0.89},
    "GPT-3 Medium": {"pre_rmsnorm": 0.97, "pre_crmsnorm": 0.96},
}
PUBLIC_SHAPES = ("small", "medium", "vit")
MODES = ("forward", "train")


# ---- Measuring


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything that the command line asks for."""
    of_contests = ContestOptions(
        forms=tuple(options.forms),
        seq=options.seq,
        layers=options.layers,
        batch=options.batch,
        dtype=options.dtype,
        pad_to=options.pad_to,
        unroll=options.unroll,
    )
    agreements: dict[str, Any] = {}
    contests: dict[str, Any] = {}
    for name in options.shapes:
        for mode in options.modes:
            contest = Contest(SHAPES[name], mode, of_contests)
            if name not in agreements:
                agreements[name] = agreement(contest)
            contests[f"{name} {mode}"] = contest_result(contest, options.rounds)
            del contest  # frees its parameters before the next one draws its own
    return machine() | {
        "dtype": options.dtype,
        "rounds": options.rounds,
        "paper": PAPER,
        "agreement": agreements,
        "contests": contests,
    }


def contest_result(contest: Contest, rounds: int) -> dict[str, Any]:
    """The measured times and ratios of one shape and mode."""
    parameters = contest.parameters()
    times = measure(contest.steps(), rounds)
    forms: dict[str, dict[str, Any]] = {}
    for name, seconds in times.items():
        ratio = quartiles(seconds / times["pre_ln"])
        forms[name] = {
            "seconds": float(np.median(seconds)),
            "ratio": ratio.median,
            "quartiles": [ratio.lower, ratio.upper],
            "parameters": parameters[name],
        }
    if contest.mode == "train":
        for name, seconds in measure(contest.conversions(), rounds).items():
            forms[name]["conversion_seconds"] = float(np.median(seconds))
    return {
        "layers": contest.layers,
        "full_layers": contest.shape.num_layers,
        "outputs": contest.outputs,
        "batch": contest.batch,
        "seq": contest.seq,
        "forms": forms,
    }


# ---- Reporting


def report(result: Mapping[str, Any]) -> str:
    """The result for people."""
    contests = result["contests"]
    forms = {title: found["forms"] for title, found in contests.items()}
    in_training = {title: of_contest for title, of_contest in forms.items() if title.endswith("train")}
    conversions = {title: _conversion_shares(of_contest) for title, of_contest in in_training.items()}
    tables = {
        "time / Pre-LN, median (quartiles)": _columns(forms, _ratio_text),
        "conversion and pull-back alone / Pre-LN's step": _columns(conversions, "{:.3f}".format),
        "the paper's ratios (inference, GPT-3 at batch 1; its ViT trained 1 to 2.5 % faster)": _columns(
            result["paper"], "{:g}".format
        ),
        "parameters of the model that computes, millions": _columns(forms, _parameters_text),
        "largest difference of logits from what they must equal, over the largest logit, float32": _columns(
            result["agreement"], "{:.1e}".format
        ),
    }
    lines = [f"{machine_line(result)}, {result['dtype']}, {result['rounds']} rounds"]
    lines += [_contest_line(title, found) for title, found in contests.items()]
    for title, columns in tables.items():
        if columns:
            lines += ["", title, *table(columns)]
    return "\n".join([*lines, "", verdict(contests)])


def _contest_line(title: str, found: Mapping[str, Any]) -> str:
    layers = f"{found['layers']} layers"
    if found["layers"] != found["full_layers"]:
        layers += f" (the model has {found['full_layers']})"
    milliseconds = found["forms"]["pre_ln"]["seconds"] * 1e3
    sizes = f"{found['outputs']} outputs, {found['batch']} x {found['seq']} tokens"
    return f"  {title:<16}  Pre-LN {milliseconds:,.1f} ms: {layers}, {sizes}"


def _conversion_shares(forms: Mapping[str, Any]) -> dict[str, float]:
    """Form -> the time of its conversion over that of Pre-LN's step."""
    step = forms["pre_ln"]["seconds"]
    return {name: form["conversion_seconds"] / step for name, form in forms.items() if "conversion_seconds" in form}


def _ratio_text(form: Mapping[str, Any]) -> str:
    lower, upper = form["quartiles"]
    return f"{form['ratio']:.3f} ({lower:.3f}-{upper:.3f})"


def _parameters_text(form: Mapping[str, Any]) -> str:
    return f"{form['parameters'] / 1e6:,.3f}"


def _columns(values: Mapping[str, Mapping[str, Any]], text: Callable[[Any], str]) -> dict[str, list[str]]:
    """Title -> a cell for each of FORMS, empty where the form has no value."""
    return {
        title: [text(of_title[name]) if name in of_title else "" for name in FORMS]
        for title, of_title in values.items()
    }


def table(columns: Mapping[str, Sequence[str]]) -> list[str]:
    """Lines with one row per form; rows without any value are left out."""
    rows = [["", *columns]]
    for index, name in enumerate(FORMS.values()):
        cells = [column[index] for column in columns.values()]
        if any(cells):
            rows.append([f"{name:<26}", *cells])
    return aligned(rows)


def verdict(contests: Mapping[str, Any]) -> str:
    """One line: where Pre-RMSNorm costs more than 1.02 of Pre-LN, and where a CRMSNorm costs more than 1."""
    slow = "; ".join(_above(1.02, ["pre_rmsnorm"], contests)) or "nowhere"
    loses = "; ".join(_above(1, ["pre_crmsnorm", "pre_crmsnorm_padded", "crmsnorm"], contests)) or "nowhere"
    return f"Pre-RMSNorm / Pre-LN above 1.02: {slow}. CRMSNorm slower than Pre-LN: {loses}."


def _above(bound: float, names: Sequence[str], contests: Mapping[str, Any]) -> Iterator[str]:
    """The forms of these names whose ratio is above the bound."""
    for title, found in contests.items():
        for name in names:
            form = found["forms"].get(name)
            if form is not None and form["ratio"] > bound:
                lower, _ = form["quartiles"]
                unsure = "" if lower > bound else f", quartiles on both sides of {bound}"
                yield f"{FORMS[name]} {title} {form['ratio']:.3f}{unsure}"


def main(arguments: Sequence[str]) -> None:
    """Measure what the command line asks for and print it."""
    parser = make_parser(__doc__)
    add_list = functools.partial(parser.add_argument, nargs="+", metavar="NAME")
    add_list("--shapes", choices=SHAPES, default=PUBLIC_SHAPES, help=f"{', '.join(PUBLIC_SHAPES)} (default all)")
    add_list("--forms", choices=FORMS, default=FORMS, help="beside pre_ln (default all)")
    add_list("--modes", choices=MODES, default=MODES, help="forward, train (default both)")
    parser.add_argument("--rounds", type=positive, default=8, help="turns of each form (default 8)")
    parser.add_argument("--seq", type=positive, default=512, help="tokens of small and medium (default 512)")
    parser.add_argument("--layers", type=positive, help="in every shape and mode (default: all; fewer on a CPU)")
    parser.add_argument("--batch", type=positive, help="sequences of a training step (16, vit 32; GPU 32, 128)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="default float32")
    parser.add_argument("--pad-to", type=positive, default=128, help="of pre_crmsnorm_padded (default 128)")
    parser.add_argument("--unroll", type=positive, help="blocks per iteration of the scan (default: all; 1 on a CPU)")
    options = parser.parse_args(arguments)
    print_result(run(options), report, as_json=options.json)


if __name__ == "__main__":
    run_main(main)
