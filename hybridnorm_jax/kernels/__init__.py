"""Who computes attention and the experts, and where: plain XLA, cuDNN, the splash kernel for TPUs, grouped products.

All are functions on arrays without parameters, and all choices for one task give the same numbers. attention.py and
experts.py choose; the modules beside them compute. The Flax modules that call them are in model.
"""
