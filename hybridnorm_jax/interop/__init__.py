"""Other people's checkpoints, in and out.

Hugging Face directories, read and written: what a config.json means as a ModelConfig, which tensor holds which
parameters, and the safetensors files themselves. The HybridNorm authors' OLMo checkpoints and those of other papers'
authors (authors/), read. Our own checkpoints and run directories are in training; converting a model to a cheaper form
of itself is in equivalence.
"""
