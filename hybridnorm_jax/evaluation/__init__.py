"""How well a model predicts text that is given: loss, perplexity and bits per byte of validation sets.

`perplexity` scores what it is handed: a function that sums losses, and windows of tokens. What lives elsewhere: that
function (training/program.py), the restoring of a run that is to be scored (commands/eval.py), and text that a model
writes itself (generation/).
"""
