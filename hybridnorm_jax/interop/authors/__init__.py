"""Checkpoints of the projects of papers' authors: a file for each project, with the table of its tensors.

projects.py lists them, reading.py reads them. The HybridNorm authors' checkpoints are in interop/olmo_checkpoints.py,
because no table says where their norms belong.
"""
