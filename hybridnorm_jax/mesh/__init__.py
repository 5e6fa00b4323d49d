"""Devices and processes.

The device mesh and its axes; which dimension of which parameter or batch lies on which axis (sharding_rules.py says by
what rules, parameter_axes.py names the dimensions); and how the processes of one run find each other, compare their
arguments and end together. split_axes.py and each_device.py are for what computes by hand on a mesh. What does
(attention over a split sequence, experts on several devices) is in kernels.
"""
