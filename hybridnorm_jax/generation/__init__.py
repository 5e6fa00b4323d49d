"""Text that a model writes, token by token.

`generate` is what other code calls. `decoding` holds the two compiled functions behind it, which keep the keys and
values of what was read (model/cache.py), and `next_token` the rules by which a token is chosen. `streaming` makes text
of tokens as they come; `text_sample` the sample that training prints at its end. How well a model predicts given text
is evaluation/'s.
"""
