"""What a run has saved: which steps are complete and undamaged, and what they hold. checkpoints.py saves them.

step_directories.py says how a step lies in its directory. These three files alone know Orbax, whose names still move.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from hybridnorm_jax.errors import first_line
from hybridnorm_jax.mesh.processes import say
from hybridnorm_jax.training import manifest
from hybridnorm_jax.training.leaf_kinds import first_difference
from hybridnorm_jax.training.orbax_log import quiet_orbax
from hybridnorm_jax.training.step_directories import (
    METADATA,
    CheckpointError,
    absolute,
    check_place,
    complete_step,
    is_leftover,
    named_step,
)

STATE = "state"
# The part of a state that holds averaged parameters (parameter_average.Average), where the run averages them.
AVERAGE = "average"


class _Saved(NamedTuple):
    """A step that was saved: shapes and dtypes of its leaves as a tree, and what `save` was told besides."""

    step: int
    leaves: Any
    custom: dict[str, Any]


class Glance(NamedTuple):
    """What a step says of its run.

    Attributes:
      step: its number.
      config_yaml: the configuration.
      plugins, files: its plugins, and the files that it trained on; None: it does not say.
    """

    step: int
    config_yaml: str
    plugins: list[dict[str, Any]] | None
    files: list[dict[str, Any]] | None


class SavedSteps:
    """The steps in one directory, local or gs://, which reading never changes.

    With several processes, all of them call every method in the same order.
    """

    def __init__(self, directory: epath.PathLike):
        self.directory = absolute(directory)
        check_place(self.directory)
        self._verified: set[int] = set()  # by this object, or written by a version without manifests
        self._damaged: set[int] = set()  # passed over by `usable`

    def wait(self) -> None:
        """Until no save of this object is running: it makes none."""

    def steps(self) -> list[int]:
        """The complete steps, ascending, without those that `usable` passed over."""
        found = self.directory.iterdir() if self.directory.exists() else ()
        steps = {step for path in found if (step := complete_step(path)) is not None}
        return sorted(steps - self._damaged)

    def latest(self) -> int | None:
        """The newest complete step, None if there is none."""
        return max(self.steps(), default=None)

    def usable(self, *, allow_fallback: bool = False) -> int | None:
        """The newest step, its files compared with its manifest; None if there is no step.

        Args:
          allow_fallback: go on to the step before where one is damaged, and print a line for each that is passed over.
            The next `save` renames these to such as 000500.damaged, which nothing deletes or reads.

        Raises:
          CheckpointError: the newest is damaged; with allow_fallback, all are.
        """
        self.wait()
        for line in self._unused():
            say(line, file=sys.stderr)
        return self._newest_undamaged(allow_fallback)

    def needed(self, *, allow_fallback: bool = False) -> int:
        """As `usable`, for a reader who has nothing to do without a step.

        Raises:
          CheckpointError: there is none, or as `usable`.
        """
        self.wait()
        step, unused = self._newest_undamaged(allow_fallback), self._unused()
        if step is None:
            raise CheckpointError("; ".join([f"{self.directory}: no complete checkpoint in it", *unused]))
        for line in unused:
            say(line, file=sys.stderr)
        return step

    def _unused(self) -> list[str]:
        """A line for each save that is running or was killed."""
        rest = [path for path in self._incomplete().values() if not manifest.has_lost_parts(path)]
        return [f"{path}: a save that is running, or was killed; not used" for path in self._leftovers() + rest]

    def _newest_undamaged(self, allow_fallback: bool) -> int | None:
        lost = [step for step, path in self._incomplete().items() if manifest.has_lost_parts(path)]
        steps = sorted([*self.steps(), *lost])
        for step in reversed(steps):
            damage = self._find_damage(step)
            if damage is None:
                return step
            if not allow_fallback:
                remedy = "checkpoint.allow_fallback=true uses the one before it"
                raise CheckpointError(f"{damage}; {remedy if step != steps[0] else 'there is none before it'}")
            self._damaged.add(step)
            say(f"{damage}; passed over, and kept as {step:06d}.damaged from the next save on", file=sys.stderr)
        if steps:
            right = "start a new run under another run.name, or from another checkpoint with init_from"
            raise CheckpointError(f"{self.directory}: all of its checkpoints are damaged ({steps}); {right}")
        return None

    def newest_good(self, *, before: int) -> int | None:
        """The newest step below `before` whose files are as its manifest says, or None; damaged ones are passed over.

        With several processes all of them call it.
        """
        return next((step for step in reversed(self.steps()) if step < before and not self._find_damage(step)), None)

    def restore(self, abstract_state: Any, step: int | None = None, *, without: str | None = None) -> tuple[Any, dict]:
        """(state, data_state) of `step`, bit for bit; None: of the newest. Verified first, once by one object.

        Args:
          abstract_state: the state's pytree with a jax.ShapeDtypeStruct, sharding included, for every array. The
            shardings are those of the current mesh, whatever the checkpoint was saved from.
          without: the part of the saved state that is left out, and which abstract_state does not have.

        Raises:
          CheckpointError: no such checkpoint, one of another model, or a damaged one.
        """
        saved = self._saved(step)
        if list(saved.leaves) == ["params"]:
            right = "start a new run from it: init_from=THIS_RUN run.name=ANOTHER, without init_optimizer"
            raise CheckpointError(f"{self._path(saved.step)}: holds parameters alone, no optimizer state; {right}")
        leaves = {name: part for name, part in saved.leaves.items() if name != without}
        self._check_same_leaves(saved.step, leaves, abstract_state)
        return self._load(saved.step, abstract_state), saved.custom["data_state"]

    def fields(self, step: int) -> set[str]:
        """The names of the parts of the state that was saved as `step`. Verified first, as `restore` does."""
        return set(self._saved(step).leaves)

    def has_average(self, step: int) -> bool:
        """Whether averaged parameters were saved with `step` (optimizer.ema_decay). Verified first."""
        return AVERAGE in self.fields(step)

    def restore_params(self, abstract_params: Any, step: int | None = None, *, plain: bool = False) -> Any:
        """The parameters alone, as `restore`: the averaged ones, where the step has them. Nothing else is loaded.

        Every file is verified nevertheless: parameters and optimizer state share Orbax's data files.

        Args:
          plain: those of the last training step in any case.
        """
        saved = self._saved(step)
        averaged = AVERAGE in saved.leaves and not plain
        of_state = saved.leaves[AVERAGE] if averaged else saved.leaves
        self._check_same_leaves(saved.step, {"params": of_state["params"]}, {"params": abstract_params})
        if averaged:
            return self._load(saved.step, {AVERAGE: {"params": abstract_params}})[AVERAGE]["params"]
        return self._load(saved.step, {"params": abstract_params})["params"]

    def read_config(self, step: int | None = None) -> str:
        """The configuration that was saved with `step`, as YAML; None: with the newest. Verified as `restore` does."""
        return self._saved(step).custom["config_yaml"]

    def read_data_state(self, step: int) -> dict:
        """What was saved of the data with `step`; empty where parameters alone were saved. Verified first."""
        return self._saved(step).custom["data_state"]

    def read_plugins(self, step: int | None = None) -> list[dict[str, Any]] | None:
        """The plugins that were saved with `step`, as `save` was given them; None: by a version that kept none."""
        return self._saved(step).custom.get("plugins")

    def glance(self) -> Glance | None:
        """What the newest step says of its run, without reading its arrays; None where no step does.

        Its metadata alone are compared with the manifest; a step whose metadata are damaged is passed over.
        """
        for step in reversed(self.steps()):
            line = manifest.find_damage_of(self._path(step), METADATA)
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
                custom = json.loads((self._path(step) / METADATA).read_bytes())["custom_metadata"]
                if line is None:
                    files = custom["data_state"].get("files")
                    return Glance(step, custom["config_yaml"], custom.get("plugins"), files)
        return None

    def _path(self, step: int) -> epath.Path:
        return self.directory / f"{step:06d}"

    def _incomplete(self) -> dict[int, epath.Path]:
        """What has the name of a step, is no complete one, and is no leftover of a save: step -> path."""
        return {
            int(path.name): path
            for path in self._of_steps()
            if path.name.isdecimal() and complete_step(path) is None and not is_leftover(path)
        }

    def _leftovers(self) -> list[epath.Path]:
        return [path for path in self._of_steps() if complete_step(path) is None and is_leftover(path)]

    def _of_steps(self) -> list[epath.Path]:
        """Everything that has the name of a step, or of a save of one, in order."""
        found = self.directory.iterdir() if self.directory.exists() else ()
        return sorted(path for path in found if named_step(path) is not None)

    def _saved(self, step: int | None) -> _Saved:
        """What Orbax knows of a step (None: of the newest)."""
        self.wait()
        complete = self.steps()
        if not complete:
            raise CheckpointError(f"{self.directory}: no complete checkpoint in it")
        step = complete[-1] if step is None else step
        if step not in complete:
            raise CheckpointError(f"{self.directory}: no complete checkpoint of step {step}; there are {complete}")
        if damage := self._find_damage(step):
            raise CheckpointError(
                f"{damage}; with checkpoint.allow_fallback=true the run gives its newest undamaged one"
            )
        with self._reading(step):
            metadata = ocp.metadata(self._path(step), STATE)
            # Orbax logs unreadable metadata and goes on without it.
            if metadata.metadata is None or not metadata.custom_metadata:
                raise ValueError("its metadata or its index is unreadable")
        return _Saved(step, metadata.metadata, metadata.custom_metadata)

    def _find_damage(self, step: int) -> str | None:
        """The first file that is not as the manifest says, in one line and the same in every process; None: all are.

        A step of a version without manifests is warned of instead, and a step is looked at once.
        """
        path = self._path(step)
        if step in self._verified:
            return None
        if manifest.is_complete(path) or manifest.has_lost_parts(path):
            line = manifest.find_damage(path, index=jax.process_index(), count=jax.process_count())
        else:
            line = manifest.leading_out(path)
            say(
                f"{path}: saved by a version that wrote no digests; used without knowing whether it is damaged",
                file=sys.stderr,
            )
        if line := manifest.agree(line):
            return f"{path}/{line}"
        self._verified.add(step)
        return None

    def _load(self, step: int, abstract: Any) -> Any:
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with self._reading(step), context:
            return ocp.load(self._path(step), abstract, checkpointable_name=STATE)

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Turn what goes wrong while `step` is read into one line."""
        try:
            with quiet_orbax():
                yield
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # by kind of damage: KeyError, JSONDecodeError, ValueError, a bare Exception, ...
            remedy = "if it is damaged, move this directory away to use the checkpoint before it"
            raise CheckpointError(
                f"{self._path(step)}: cannot be read ({innermost_reason(error)}); {remedy}"
            ) from error

    def _check_same_leaves(self, step: int, saved: Any, expected: Any) -> None:
        """Raise CheckpointError for the first leaf, by path, that is not in both trees with one shape and dtype."""
        difference = first_difference(saved, expected)
        if difference is not None:
            path, has, wanted = difference
            message = f"a checkpoint of another model: {path} is {has} there, but this model has {wanted}"
            raise CheckpointError(f"{self._path(step)}: {message}")


def innermost_reason(error: BaseException) -> str:
    """The start of what the innermost error says, without TensorStore's specification of the whole store."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error).partition(" [tensorstore_spec")[0][:300]
