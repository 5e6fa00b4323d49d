"""Text that a model writes, token by token.

`generate` is what other code calls. `decoding` holds the two compiled functions behind it, which keep the keys and
values of what was read (model/cache.py). `sampling` names the rules by which a token is chosen, `next_token` applies
them. `streaming` makes text of tokens as they come, and `text_sample` the sample that training prints at its end. How
well a model predicts given text is evaluation/'s.
"""
