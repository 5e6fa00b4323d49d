"""Optimizers and their learning-rate schedules.

The table of optimizers is config/optimizer_kinds.py. chain.py makes the optimizer of a run from its configuration, and
directions.py the direction that the table names. Optax has those of AdamW and Lion; adafactor.py and muon.py have those
of matrices, which matrices.py tells apart and whole_matrices.py exchanges over a mesh, and moments.py keeps moments in
bfloat16. decay.py says what decays, rates.py, schedules.py and widths.py how large the steps are, groups.py which
parameters a pattern names. What a step does with an optimizer is in training/step.py.
"""
