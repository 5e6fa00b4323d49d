"""What happens in a run besides its steps: one hook a file, and built_in.py, the list of them.

hook.py says when a hook is called. A new one is a file here and a line in built_in.py, or an object that is given to
training.loop.train. What a hook calls (writers, checkpoints, measures) lives in training.
"""
