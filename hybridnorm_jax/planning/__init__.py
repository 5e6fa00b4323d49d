"""The real train step, compiled ahead of time for devices that nobody has to own: does it fit, and what does it cost.

`hybridnorm plan` prints it. What memory a step needs on the devices at hand is training/dry_run.py's.
"""
