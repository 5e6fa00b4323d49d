"""Thousands of malformed inputs, and a table of how the commands end on them.

    python -m tests.malformed.run --count 3000 --seed 0

prints each case that is broken as it is found, then the table: cases, kept, broken, by kind.
"""

import argparse
import collections
import itertools
import random
import re
import sys
from collections.abc import Iterator

from tests.malformed.argument_cases import argument_cases
from tests.malformed.case import Case, judge
from tests.malformed.checkpoint_cases import checkpoint_cases, huggingface_cases
from tests.malformed.data_cases import data_cases, tokenizer_cases
from tests.malformed.key_cases import key_cases, random_key_cases, section_cases
from tests.malformed.plugin_cases import plugin_cases
from tests.malformed.runner import Runner
from tests.malformed.yaml_cases import random_yaml_cases, yaml_cases

GENERATORS = {
    "keys": key_cases,
    "random_keys": random_key_cases,
    "sections": section_cases,
    "yaml": yaml_cases,
    "random_yaml": random_yaml_cases,
    "arguments": argument_cases,
    "data": data_cases,
    "tokenizers": tokenizer_cases,
    "plugins": plugin_cases,
    "huggingface": huggingface_cases,
    "checkpoints": checkpoint_cases,
}


def cases(seed: int, only: list[str] | None = None) -> Iterator[Case]:
    """Cases of all generators in turn, without end."""
    streams = [_shuffled(GENERATORS[name], random.Random(f"{seed} {name}")) for name in only or GENERATORS]
    for several in itertools.zip_longest(*streams):
        yield from (case for case in several if case is not None)


def _shuffled(generator, rng: random.Random) -> Iterator[Case]:
    some = list(itertools.islice(generator(rng), 5000))
    rng.shuffle(some)
    return iter(some)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=GENERATORS)
    options = parser.parse_args()
    kept, broken = collections.Counter(), collections.Counter()
    with Runner() as runner:
        for case, outcome in runner.run(itertools.islice(cases(options.seed, options.only), options.count)):
            fault = judge(case, outcome)
            kind = case.kind.partition(":")[0]
            kept[kind] += fault is None
            if fault is not None:
                broken[kind, fault] += 1
                last = (outcome.error.strip().splitlines() or [""])[-1][:300]
                print(f"{fault}: {case}\n    {outcome.seconds:.1f} s, status {outcome.status}: {last}", flush=True)
    print(f"\n{'kind':32}{'cases':>8}{'kept':>8}{'broken':>8}")
    for kind in sorted(set(kept) | {kind for kind, _ in broken}):
        faults = {fault: count for (of, fault), count in broken.items() if of == kind}
        total = sum(faults.values())
        listed = ", ".join(f"{count} {fault}" for fault, count in faults.items())
        print(f"{re.sub(chr(10), ' ', kind):32}{kept[kind] + total:>8}{kept[kind]:>8}{total:>8}  {listed}")
    total = sum(broken.values())
    print(f"{'all':32}{sum(kept.values()) + total:>8}{sum(kept.values()):>8}{total:>8}")
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main())
