"""The model as data and as functions: placements and the table of schemes, norms, attention, feed-forward, experts,
one block (block.py has the formula), the decoder, the loss, the initializers, and ModelConfig.

Which device computes what is in mesh and kernels; what training adds to the model is in training.
"""
