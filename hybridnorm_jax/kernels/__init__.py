"""Attention and experts as functions on arrays, and the choice of what computes them.

attention.py and experts.py choose: plain XLA, cuDNN, a Pallas kernel for TPUs. The modules beside them compute, whole
on one device or split over a mesh, and all choices for one task give the same numbers. Nothing here holds parameters:
the Flax modules that call these functions are in model. The mesh itself is in mesh.
"""
