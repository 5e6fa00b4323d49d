"""Attention, experts and the loss of a token as functions on arrays, and the choice of what computes them.

attention_backends.py and expert_dispatch.py choose: plain XLA, cuDNN (gpu_cudnn.py), a Pallas kernel (tpu_*.py);
loss_kernels.py says whether the kernel of the loss can do what is asked. The modules beside them compute, whole on one
device or split over a mesh, and all choices for one task give the same numbers. Nothing here holds parameters: the Flax
modules that call these functions are in model. The mesh itself is in mesh.
"""
