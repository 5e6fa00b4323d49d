"""Where bytes are: remote stores, the copies of their files on this machine's disk, and the directories of the cache.

Which files a run reads is in files; what is in one, in text and tokens.
"""
