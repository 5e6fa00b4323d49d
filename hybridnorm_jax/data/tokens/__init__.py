"""Token ids: tokenizers, the program that turns documents into files of ids, the cache of these, files of ids that
others have written, and one stream over all of them.

How a document is read out of a file is in text; how a stream is cut into what a step trains on, in rows.
"""
