"""Arrays by name that come from somebody else's code: each is checked as it is read, and none is left over."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybridnorm_jax.config_fields import present, shortened
from hybridnorm_jax.errors import UserError, first_line


class NamedArrays:
    """Their arrays by name; remembers what was read, so that nothing is left over unnoticed.

    An array is read when it is asked for. In a compressed file a few bytes can stand for any amount of zeros: there its
    shape is compared before.

    Attributes:
      source: where the arrays are, for messages.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        *,
        names_of: Callable[[Sequence[str]], Sequence[str]],
        source: str = "the checkpoint",
    ):
        """Args:
        arrays: by stored name; also an open .npz file, or torch's tensors on a CPU.
        names_of: gives the names of arrays from their stored names.
        """
        _check_arrays(arrays)
        self.source = source
        self._arrays = arrays
        self._stored_names: dict[str, str] = {}
        for name, stored in zip(names_of(list(arrays)), arrays, strict=True):
            if name in self._stored_names:
                raise UserError(f"{shortened(name)}: twice in {source}")
            self._stored_names[name] = stored
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._stored_names

    def take(self, name: str, *shape: int) -> np.ndarray:
        """The array, which must have this shape."""
        if name not in self._stored_names:
            raise UserError(f"{name}: not in {self.source}, but the configuration asks for it{self._longer(name)}")
        stored = self._stored_names[name]
        try:
            if isinstance(self._arrays, np.lib.npyio.NpzFile):
                self._check(name, _header_of(self._arrays, stored), shape)
            array = np.asarray(self._arrays[stored])
        except UserError:
            raise
        except Exception as error:  # a damaged archive, a pickle, a header that is none: each library has its own
            raise UserError(f"{name}: cannot be read from {self.source}: {first_line(error)}") from error
        self._check(name, array, shape)
        self._read.add(name)
        return array

    def _longer(self, name: str) -> str:
        """What to say where the array is there behind a prefix."""
        stored = next((stored for stored in self._stored_names if stored.endswith(f".{name}")), None)
        return f"; {shortened(stored)} is there, with a prefix that is not known here" if stored else ""

    def _check(self, name: str, array: np.ndarray | jax.ShapeDtypeStruct, shape: tuple[int, ...]) -> None:
        """Raise UserError unless the array has this shape and holds floats."""
        if array.shape != shape:
            raise UserError(f"{name}: shape {array.shape} in {self.source}, {shape} by the configuration")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise UserError(f"{name}: dtype {array.dtype} in {self.source}, but parameters are floats")

    def check_all_read(self, *, except_for: Callable[[str], bool] = lambda name: False) -> None:
        """Raise for the first array that no part of the model took.

        Args:
          except_for: says of which names nothing is asked.
        """
        for name in self._stored_names:
            if name not in self._read and not except_for(name):
                right = f"in {self.source}, but a model of this configuration has no place for it"
                raise UserError(f"{shortened(name)}: {right}")


def _check_arrays(arrays: Any) -> None:
    """Raise UserError for what does not map names to arrays."""
    if not isinstance(arrays, Mapping):
        raise UserError(f"arrays: must map names to arrays, not {type(arrays).__name__}")
    for name in arrays:
        if not isinstance(name, str):
            raise UserError(f"arrays: must map names to arrays, but {name!r:.80} is no text")
        if isinstance(arrays, dict) and isinstance(arrays[name], Mapping):  # others read an array when asked for it
            right = "pass the mapping that holds the parameters, such as arrays['model']"
            raise UserError(f"{shortened(name)}: a mapping, not an array; {right}")


def _header_of(arrays: "np.lib.npyio.NpzFile", name: str) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array of an .npz file, whose content is not read."""
    archive = present(arrays.zip)
    with archive.open(name if name in archive.namelist() else f"{name}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    return jax.ShapeDtypeStruct(shape, dtype)
