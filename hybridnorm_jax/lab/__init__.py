"""The lab: measures models at initialization, trains comparisons of placements, and reports what was found.

`hybridnorm lab` runs it. What a training run records of its layers is training/layer_measures.py's.
"""
