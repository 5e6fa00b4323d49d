"""Text that a model writes, token by token.

`sampling` draws tokens; `text_sample` makes the sample that training prints at its end. How well a model predicts given
text is evaluation/'s.
"""
