"""hybridnorm_jax: where a transformer normalizes, as data. See README.md.

The public names are those of __init__.pyi beside this file; each is imported when it is first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
