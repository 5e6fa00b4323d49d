"""The lab measures what a norm placement does to signal, gradients and loss. `hybridnorm lab` runs it.

`signal` measures models at initialization. `compare` trains one run for each combination of placement, learning rate
and seed; `jobs` writes one cluster job for each of these runs. `runs` reads them back, and `report/` makes tables and
figures of them. What lives elsewhere: the training step (training/), and the measurement of a layer while a model
computes (training/layer_measures.py).
"""
