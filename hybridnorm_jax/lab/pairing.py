"""What runs of one seed have in common, recorded by each and compared: the numbers they start from, and their data."""

import hashlib
import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from jaxtyping import Array

from hybridnorm_jax.errors import UserError
from hybridnorm_jax.lab.run_files import read_object
from hybridnorm_jax.model.config import ModelConfig
from hybridnorm_jax.training.hooks.hook import Hook
from hybridnorm_jax.training.run import Run
from hybridnorm_jax.training.step import Batch
from hybridnorm_jax.whole_files import write_whole

FILE = "pairing.json"
# How many numbers of each matrix are recorded, each divided by the one before them.
RECORDED = 3
# The initializer that changes directions: it divides each vector of a matrix by its own length.
_UNIT_VECTORS = "ngpt"


class PairingRecord(Hook):
    """Writes pairing.json into the run directory: samples of the initial matrices, and what the batches hold.

    Of the batches it holds digests of the first and the last one, of the sequences that this process reads.
    """

    def before_update(self, run: Run, batch: Batch) -> None:
        """Record what the first step and the last one begin with."""
        step = run.step + 1
        if step == 1:
            samples = parameter_samples(run.config.model, run.state.params)
            _write(run.directory, {"parameters": samples, "batches": {"1": digest(batch)}})
        elif step == run.steps and (found := read_record(run.directory)) is not None:
            batches = {**found["batches"], str(step): digest(batch)}
            _write(run.directory, {**found, "batches": batches})


def digest(batch: Batch) -> str:
    """Of the tokens of a batch."""
    return hashlib.sha256(np.ascontiguousarray(batch["tokens"], np.int64).tobytes()).hexdigest()[:16]


def parameter_samples(model: ModelConfig, params: Any) -> dict[str, list[float]]:
    """Matrix -> the quotients x_1 / x_0, x_2 / x_0, x_3 / x_0 of its first four numbers, which no factor changes.

    The name of a matrix has the number of its layer, counted from 0, and its shape, such as
    "3/attention/query/kernel (96, 4, 24)". Matrices of nGPT's initializer are left out, because it divides each vector
    by its own length.
    """
    if model.initializer_name == _UNIT_VECTORS:
        return {}
    corners = _corners(model, params)
    if jax.process_count() > 1:
        corners = multihost_utils.process_allgather(corners, tiled=True)
    samples = {}
    for name, corner in sorted(jax.device_get(corners).items()):
        first, *others = np.asarray(corner, np.float64)
        if first != 0:
            samples[name] = [float(other / first) for other in others]
    return samples


@partial(jax.jit, static_argnums=0)
def _corners(model: ModelConfig, params: Any) -> dict[str, Array]:
    """The first numbers of the matrices outside of the layers, and of those in the first and last layer of each run."""
    corners = {}
    for path, leaf in flatten_dict(params).items():
        if path[-1] not in ("kernel", "embedding"):
            continue
        if not path[0].startswith("run_"):
            corners[_name(path, leaf)] = leaf.reshape(-1)[: RECORDED + 1]
            continue
        start = model.runs[int(path[0].removeprefix("run_"))].start
        for index in {0, leaf.shape[0] - 1}:
            corners[_name((str(start + index), *path[1:]), leaf[index])] = leaf[index].reshape(-1)[: RECORDED + 1]
    return corners


def _name(path: tuple[str, ...], leaf: Array) -> str:
    return f"{'/'.join(path)} {leaf.shape}"


def read_record(directory: epath.Path | Path) -> dict[str, Any] | None:
    """What pairing.json of a run says; None: it has none.

    Raises:
      UserError: the file is damaged.
    """
    file = directory / FILE
    if not file.exists():
        return None
    record = read_object(file)
    mend = "remove the run, and train it again"
    if not all(isinstance(record.get(key), dict) for key in ("parameters", "batches")):
        raise UserError(f"{file}: must hold the maps parameters and batches; {mend}")
    if not all(_are_samples(numbers) for numbers in record["parameters"].values()):
        raise UserError(f"{file}: parameters must map each matrix to at most {RECORDED} numbers; {mend}")
    return record


def _are_samples(numbers: Any) -> bool:
    is_list = isinstance(numbers, list) and len(numbers) <= RECORDED
    return is_list and all(type(number) in (int, float) for number in numbers)


def obstacle(one: dict[str, Any], other: dict[str, Any], *, precision: float) -> str | None:
    """Why two runs of one seed are no pair; None: they are one, as far as both recorded.

    Args:
      precision: eps of the parameters' dtype, the coarser of the two. A recorded number is the quotient of two, each
        of which was rounded twice: as it was drawn, and multiplied by the initializer's factor.
    """
    for step in one["batches"].keys() & other["batches"].keys():
        if one["batches"][step] != other["batches"][step]:
            return f"they read other data in step {step}"
    ours, theirs = one["parameters"], other["parameters"]
    for name in sorted(ours.keys() & theirs.keys()):
        alike = len(ours[name]) == len(theirs[name])
        if not alike or not np.allclose(ours[name], theirs[name], rtol=4 * precision, atol=0):
            return f"they begin with other numbers in {name}"
    return None


def check_paired(directories: Iterable[epath.Path | Path], *, precision: float) -> None:
    """Check runs of one seed.

    Raises:
      UserError: names the first two that are no pair, and why.
    """
    records = [(directory, record) for directory in directories if (record := read_record(directory)) is not None]
    for directory, record in records[1:]:
        first, of_first = records[0]
        reason = obstacle(of_first, record, precision=precision)
        if reason is not None:
            raise UserError(f"{first} and {directory} have the same seed, but {reason}: they cannot be compared")


def _write(directory: epath.Path, record: dict[str, Any]) -> None:
    if jax.process_index() == 0:
        write_whole(directory / FILE, json.dumps(record) + "\n")
