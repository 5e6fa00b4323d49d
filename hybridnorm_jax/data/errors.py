"""The one error of this package."""

from hybridnorm_jax.config import UserError


class DataError(UserError):
    """Data that cannot be used; the message is one line that names the file or key and what would be right."""
