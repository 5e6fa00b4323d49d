"""Documents out of files: text files, records of all formats, packed files, which part of a record is learned, chat
templates, and the reader that holds out documents or drops them.

Nothing here knows a token: what becomes of a document is in tokens. Which files there are is in files.
"""
