"""Text that a model writes, token by token.

`generate` goes on from tokens: `next_token` chooses each, and `decoding` holds the two compiled functions, whose cache
of keys and values is model/cache.py's. `text` goes on from text, which `streaming` gives out piece by piece.
`text_sample` makes the sample that training prints at its end. How well a model predicts given text is evaluation/'s.
"""
