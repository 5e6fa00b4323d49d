"""The papers' claims with verdicts; `hybridnorm lab claims` measures the cheap ones.

claims.yaml is the table: each claim, where it stands, the commands that test it, what was found and the verdict.
claim.py reads it. measures.py says how each cheap claim is measured; the measuring is in at_start (fresh models),
training (a few dozen steps), coupling (theorem 2), forms (lossless conversion) and speed. run.py measures and writes
claims.json. What counts as growing or flat is in lab/signal_claims.py, and docs/write_claims.py writes the table into
docs/results.md.
"""
