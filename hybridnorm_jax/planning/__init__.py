"""The real train step compiled ahead of time for devices nobody has to own: does it fit, and what does it cost.

`python -m hybridnorm_jax.planning --help`; docs/planning.md has the table of all configurations.
"""
