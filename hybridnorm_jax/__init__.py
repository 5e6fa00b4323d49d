"""hybridnorm_jax: where a transformer normalizes, as data. See README.md.

The public names are those of __init__.pyi beside this file; each is imported when it is first used.
"""

import lazy_loader

_public_name, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib import metadata

        try:
            return metadata.version("hybridnorm-jax")
        except metadata.PackageNotFoundError as error:
            raise AttributeError("__version__: hybridnorm-jax is imported from a folder and not installed") from error
    return _public_name(name)
