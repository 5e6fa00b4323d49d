"""Rows of inputs and targets out of a stream of tokens: windows, packed documents, fill in the middle, and which row of
which source a run reads when, and how many tokens that was.

The stream is in tokens. What makes batches of the rows is pipeline.py, one folder up.
"""
