"""Checkpoints on the disks of the hosts themselves: saved often, and put together again from all hosts that are left.

Every process writes its own blocks (local_parts.py) and waits for nobody. What a start finds on all hosts together is
agreed on then: a step counts if every array is covered by blocks that some process has. A process that needs a block
it does not have gets it from one that does, over the network. So a host that lost its disk, or a process that now runs
on another host, costs nothing as long as another host has the same block: with parameters that are replicated over
hosts (mesh.data, mesh.replica). The mesh may be another one than before.

Orbax's own managers for this (orbax.checkpoint.experimental.emergency, 0.12.8) want the mesh and the order of the
processes to be as they were, or a service beside the run, and are no part of the interface (v1) that checkpoints.py
uses.
"""

import contextlib
import json
import math
import re
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from hybridnorm_jax.config.run_config import RunConfig
from hybridnorm_jax.errors import UserError, first_line
from hybridnorm_jax.mesh.messages import all_texts, bytes_of, text_of
from hybridnorm_jax.mesh.processes import say
from hybridnorm_jax.training.local_parts import PARTIAL, Block, Part, read_part, write_part
from hybridnorm_jax.whole_files import write_whole

KEY = "checkpoint.local_dir"
# Where the directory of a run, which all processes see, says which local checkpoints are its own.
IDENTITY = "local_checkpoints"
# How many steps of this start are kept: one that is complete on all hosts, and one that may not be yet.
KEPT = 2
FOLDER = re.compile(r"(\d{6,18})-([0-9a-f]{16})")
# Of what is looked for on the other hosts, newest first.
MOST_STEPS = 8


class Found(NamedTuple):
    """A step that was put together.

    Attributes:
      state: as the abstract state that was asked for.
      facts: what `save` was told besides.
    """

    step: int
    state: Any
    facts: dict[str, Any]


def open_local(
    config: RunConfig, directory: epath.Path, abstract_state: Any, *, after: int
) -> tuple["LocalCheckpoints | None", Found | None]:
    """The local checkpoints of the run in this directory, and the newest step above `after` in them.

    Neither without checkpoint.local_dir. All processes call it.

    Raises:
      UserError: the directory cannot be written to.
    """
    local_dir = config.checkpoint.local_dir
    if local_dir is None:
        return None, None
    file = directory / IDENTITY
    identity = file.read_text().strip() if jax.process_index() == 0 and file.exists() else secrets.token_hex(8)
    local = LocalCheckpoints(local_dir, run=f"{config.run.name}-{text_of(0, identity)}")
    return local, local.newest(abstract_state, after=after)


class LocalCheckpoints:
    """The local checkpoints of a run; a context manager that waits for the running save at its end.

    With several processes all of them call `newest`; `save` and `close` are each process's own.

    Args:
      directory: checkpoint.local_dir, on a disk of this host.
      run: NAME-IDENTITY, the same in every process. The identity keeps a run of the same name, which began anew, from
        going on with the steps of another.

    Raises:
      UserError: the directory cannot be written to.
    """

    def __init__(self, directory: str, *, run: str):
        self._folder = Path(directory).expanduser().absolute() / run
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / f"{secrets.token_hex(4)}{PARTIAL}").touch()
        except OSError as error:
            line = f"{KEY}={directory}: cannot be written to: {error.strerror or error}"
            raise UserError(line) from error
        self._delete_partial()
        # Parts of two starts are never put together: what they computed may differ in the last bits.
        self._attempt = all_texts(secrets.token_hex(8))[0]
        self._written: list[Path] = []
        self._running: Future | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="local checkpoint")

    def begin(self, directory: epath.Path) -> None:
        """Write the identity of the run into its directory, where nothing refuses the run any more."""
        file = directory / IDENTITY
        if jax.process_index() == 0 and not file.exists():
            write_whole(file, self._folder.name.rpartition("-")[2])

    def __enter__(self) -> "LocalCheckpoints":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.wait()
        self._thread.shutdown()

    def save(self, step: int, state: Any, facts: dict[str, Any]) -> None:
        """Copy this process's blocks now, and write them in the background; what goes wrong then is printed."""
        self.wait()
        leaves = _named(state)
        blocks = {block: array for name, leaf in leaves.items() for block, array in _blocks_here(name, leaf)}
        shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
        part = f"{jax.process_index()}-of-{jax.process_count()}"
        folder = self._folder / f"{step:06d}-{self._attempt}" / part
        self._running = self._thread.submit(self._write, folder, blocks, shapes, facts)

    def wait(self) -> None:
        """Until no save is running."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def newest(self, abstract_state: Any, *, after: int) -> Found | None:
        """The newest step above `after` that is complete on all hosts together, put together; None: there is none.

        Args:
          abstract_state: as Checkpoints.restore takes it.
        """
        leaves = _named(abstract_state)
        for step, attempt in self._starts(after):
            part = self._read(step, attempt)
            blocks = _Blocks(part, leaves)
            if blocks.obstacle is None:
                facts = json.loads(text_of(blocks.first, json.dumps(None if part is None else part.facts)))
                arrays = [blocks.array(name, leaf) for name, leaf in leaves.items()]
                return Found(step, jax.tree.unflatten(jax.tree.structure(abstract_state), arrays), facts)
            say(f"note: step {step} of {KEY} is passed over: {blocks.obstacle}", file=sys.stderr)
        return None

    def _starts(self, after: int) -> list[tuple[int, str]]:
        """(step, attempt) of every step above `after` that any process sees, newest first; the same in each."""
        matches = [FOLDER.fullmatch(path.name) for path in self._folder.iterdir()]
        seen = sorted({(int(match[1]), match[2]) for match in matches if match is not None}, reverse=True)[:MOST_STEPS]
        everywhere = {tuple(start) for text in all_texts(json.dumps(seen)) for start in json.loads(text)}
        return sorted((start for start in everywhere if start[0] > after), reverse=True)

    def _read(self, step: int, attempt: str) -> Part | None:
        """All parts of a step on this host, as one; None: there are none."""
        found: Part | None = None
        for folder in sorted((self._folder / f"{step:06d}-{attempt}").glob("*-of-*")):
            if PARTIAL in folder.name:
                continue
            try:
                part = read_part(folder)
            except (OSError, ValueError, KeyError, TypeError) as error:
                print(f"{folder}: cannot be read ({first_line(error)}); not used", file=sys.stderr, flush=True)
                continue
            for line in part.damaged:
                print(f"{line}; not used", file=sys.stderr, flush=True)
            found = part if found is None else found._replace(blocks=found.blocks | part.blocks)
        return found

    def _write(self, folder: Path, blocks: Mapping[Block, np.ndarray], shapes: Mapping[str, Any], facts: Any) -> None:
        """In the background: write a part, then delete what is too old."""
        try:
            write_part(folder, blocks, shapes, facts)
        except OSError as error:  # the run is worth more than this
            reason = error.strerror or first_line(error)
            print(f"note: {folder}: was not written: {reason}; the run goes on", file=sys.stderr, flush=True)
            return
        self._written.append(folder)
        for old in self._written[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
            _remove_empty(old.parent)
        if len(self._written) > KEPT:  # by now the oldest of these was complete on all hosts
            for path in self._folder.iterdir():
                match = FOLDER.fullmatch(path.name)
                if match is not None and match[2] != self._attempt:
                    shutil.rmtree(path, ignore_errors=True)
        del self._written[: -KEPT - 1]

    def _delete_partial(self) -> None:
        """What killed saves have left. Another process of this host has not begun to save yet."""
        for path in [*self._folder.glob(f"*{PARTIAL}*"), *self._folder.glob(f"*/*{PARTIAL}*")]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


class _Blocks:
    """The blocks of one step on all hosts, and how a process gets those that it needs. All processes make one.

    Args:
      part: what is on this host; None: nothing.
      leaves: name -> the array that is wanted, with its sharding.

    Attributes:
      obstacle: why the arrays cannot be put together, the same in every process; None: they can.
      first: the first process that has anything.
    """

    def __init__(self, part: Part | None, leaves: Mapping[str, Any]):
        self._here = {} if part is None else part.blocks
        summaries = [json.loads(text) for text in all_texts(_summary(part))]
        having = [process for process, summary in enumerate(summaries) if summary is not None]
        self.first = min(having, default=0)
        self._holders: dict[str, dict[Block, list[int]]] = {name: {} for name in leaves}
        self.obstacle = self._read_summaries(summaries, leaves) if having else "no process can read it"
        for name, leaf in leaves.items():
            if self.obstacle is None:
                self.obstacle = self._missing(name, leaf)

    def array(self, name: str, leaf: Any) -> jax.Array:
        """One array, from the blocks of this host and of others. All processes call it for the same array."""
        dtype = np.dtype(leaf.dtype)
        blocks = {block: self._here[block] for block in self._holders[name] if block in self._here}
        for block, holders in self._to_send(name, leaf):
            size = math.prod(block.shape) * dtype.itemsize
            own = blocks.get(block)
            data = bytes_of(holders[0], None if own is None else own.reshape(-1).view(np.uint8), size)
            if own is None:
                blocks[block] = data.view(dtype).reshape(block.shape)

        def put_together(index: tuple[slice, ...]) -> np.ndarray:
            target = _block(name, leaf.shape, index)
            values = np.empty(target.shape, dtype)
            for block, array in blocks.items():
                if (common := target.overlap(block)) is not None:
                    values[common.within(target)] = array[common.within(block)]
            return values

        return jax.make_array_from_callback(leaf.shape, leaf.sharding, put_together)

    def _read_summaries(self, summaries: list[Any], leaves: Mapping[str, Any]) -> str | None:
        """Fill in the holders; returns why the arrays are not those that are wanted, or None."""
        wanted = {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in leaves.items()}
        for process, summary in enumerate(summaries):
            if summary is None:
                continue
            if summary["leaves"] != wanted:
                return "its arrays are not those of this model and optimizer"
            for leaf, start, stop in summary["blocks"]:
                self._holders[leaf].setdefault(Block(leaf, tuple(start), tuple(stop)), []).append(process)
        return None

    def _lacking(self, name: str, leaf: Any) -> set[Block]:
        """The blocks of an array that some process needs and does not have as they are."""
        holders = self._holders[name]
        needs = _needs(name, leaf).items()
        return {block for process, wanted in needs for block in wanted if process not in holders.get(block, ())}

    def _to_send(self, name: str, leaf: Any) -> list[tuple[Block, list[int]]]:
        """The blocks, and who has each, that some process needs from another, in one order."""
        holders, lacking = self._holders[name], self._lacking(name, leaf)
        others = [need for need in lacking if need not in holders]  # of another mesh: in parts of several blocks
        sent = {block for block in holders if block in lacking or any(block.overlap(need) for need in others)}
        return [(block, holders[block]) for block in sorted(sent)]

    def _missing(self, name: str, leaf: Any) -> str | None:
        """What no process has of an array, or None. The blocks of a step do not overlap: they had one sharding."""
        blocks = self._holders[name]
        for need in self._lacking(name, leaf) - blocks.keys():
            overlaps = [common for block in blocks if (common := need.overlap(block)) is not None]
            if sum(math.prod(common.shape) for common in overlaps) != math.prod(need.shape):
                return f"no host has all of {name}"
        return None


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths, in its order."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _block(name: str, shape: tuple[int, ...], index: tuple[slice, ...]) -> Block:
    """A block as JAX says where it lies."""
    ranges = [part.indices(size) for part, size in zip(index, shape, strict=True)]
    return Block(name, tuple(first for first, _, _ in ranges), tuple(last for _, last, _ in ranges))


def _blocks_here(name: str, leaf: jax.Array) -> Iterator[tuple[Block, np.ndarray]]:
    """The blocks of an array on this process's devices, each once, copied to the host."""
    seen = set()
    for shard in leaf.addressable_shards:
        block = _block(name, leaf.shape, shard.index)
        if block not in seen:
            seen.add(block)
            # A copy: on a CPU the array would be the device's own memory, which the next step takes.
            yield block, np.array(shard.data)


def _needs(name: str, leaf: Any) -> dict[int, set[Block]]:
    """Process -> the blocks of an array that its devices are to hold."""
    needs: dict[int, set[Block]] = {}
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
        needs.setdefault(device.process_index, set()).add(_block(name, leaf.shape, index))
    return needs


def _summary(part: Part | None) -> str:
    """What others need to know of a part."""
    if part is None:
        return "null"
    leaves = {name: [list(shape), dtype] for name, (shape, dtype) in part.leaves.items()}
    return json.dumps({"leaves": leaves, "blocks": [list(block) for block in part.blocks]})


def _remove_empty(folder: Path) -> None:
    """Delete a directory if nothing is in it; another process of this host may have a part there."""
    with contextlib.suppress(OSError):
        folder.rmdir()
