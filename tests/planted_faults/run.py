"""Plants faults one after the other and says which test notices each:

python -m tests.planted_faults.run [NAME ...]

It ends with status 1 where a fault passes all of its tests.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from planted_faults.faults import FAULTS
from planted_faults.planting import first_failure, plant


def main(arguments: list[str] | None = None) -> int:
    """Run the faults that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a fault in faults.py; all of them by default")
    names = parser.parse_args(arguments).names
    known = {fault.name for fault in FAULTS}
    if unknown := set(names) - known:
        parser.error(f"{', '.join(sorted(unknown))}: no fault of this name in faults.py")
    missed = 0
    for fault in FAULTS:
        if names and fault.name not in names:
            continue
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as directory:
            plant(fault, Path(directory))
            failure = first_failure(fault, Path(directory))
        missed += failure is None
        seconds = time.perf_counter() - began
        print(f"{fault.name}: {failure or 'NOT NOTICED'} ({seconds:.0f} s)", flush=True)
    print(f"{missed} not noticed")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
