"""Where data files are: names and patterns, remote stores, and the copies of remote files on this machine's disk.

What is in a file is read elsewhere in data.
"""
