"""Which files a run reads: what the names and patterns of data.files stand for, what makes two files the same, and the
manifest in which a directory of tokenized text names its shards.

Where their bytes come from is in places; what they mean, as text or as tokens, in text and tokens.
"""
