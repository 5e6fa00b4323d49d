"""The PyTorch code of our models, which an export copies beside the weights.

transformers loads it with trust_remote_code=True. Nothing in this package imports these files, and they import nothing
of it: a directory with copies needs torch and transformers alone. modeling_hybridnorm.py is that of decoders alone, and
encoder_*.py those of encoders; all others serve both. What their config.json says is read and written by
own_architecture.py and own_encoder.py, one folder up.
"""
