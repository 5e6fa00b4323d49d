"""Malformed inputs end in one line that names the key or the file, soon, and leave nothing in the run directory."""

import itertools
from collections import Counter

import pytest

from tests.malformed.case import judge
from tests.malformed.run import cases
from tests.malformed.runner import Runner

# A refusal costs some hundredths of a second.
A_FEW, MANY = 330, 3000


def _broken(seed: int, count: int) -> list[str]:
    """Each case that does not end as it must, with what its command said."""
    broken = []
    with Runner() as runner:
        for case, outcome in runner.run(itertools.islice(cases(seed), count)):
            fault = judge(case, outcome)
            if fault is not None:
                broken.append(f"{fault}: {case}\n    {outcome.error[-500:]}")
    return broken


@pytest.mark.long
def test_a_malformed_input_is_refused_in_one_line():
    assert _broken(seed=0, count=A_FEW) == []


@pytest.mark.slow
def test_thousands_of_malformed_inputs_are_refused_in_one_line():
    assert _broken(seed=1, count=MANY) == []


def test_the_few_cases_are_of_every_kind():
    kinds = Counter(case.kind.partition(":")[0].split(" ")[0] for case in itertools.islice(cases(seed=0), A_FEW))
    assert {"key=value", "key", "section", "YAML", "argument", "call", "option", "data", "tokenizer", "plugin"} <= set(
        kinds
    )
    assert {"config.json", "checkpoint", "safetensors"} <= set(kinds)
