"""Optimizers and their learning-rate schedules.

table.py makes the optimizer of a run from its configuration; decay.py says what decays, rates.py and schedules.py how
large the steps are, groups.py which parameters a pattern names. What a step does with an optimizer is in
training/step.py.
"""
