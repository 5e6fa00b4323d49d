"""The PyTorch code of our models, which an export copies beside the weights.

transformers loads it with trust_remote_code=True. Nothing in this package imports these files, and they import nothing
of it: a directory with a copy of the two needs torch and transformers alone. What their config.json says is read and
written by own_architecture.py, one folder up.
"""
