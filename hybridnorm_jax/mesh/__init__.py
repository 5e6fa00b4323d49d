"""Devices and processes: the mesh axes, which dimension of which array lies on which of them, and how the processes
of one run find each other, speak and end together.

What is computed on a mesh (attention over a split sequence, experts on several devices) is in kernels.
"""
