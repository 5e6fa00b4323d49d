"""Training: state, optimizer and step; the loop and its hooks; checkpoints, metrics, and what a run survives.

step.py is one step as a pure function, program.py compiles it for a mesh, loop.py makes all steps of a run, and hooks/
is what happens besides them. resume.py says where a run begins, and run_directory.py what its directory holds. What a
step costs on devices that nobody has at hand is in planning; many runs and their comparison are in lab; scores are
computed by evaluation.
"""
