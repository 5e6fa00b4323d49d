"""Where the numbers of a run go besides metrics.jsonl: one logger a file, and logger_kinds.py, the table of them.

logger.py says what a logger is. Each of them only knows its own format or service. That a logger which fails or hangs
stops no run, and that none of them gets a value twice, is the work of training/metrics_writer.py, which calls them.
"""
