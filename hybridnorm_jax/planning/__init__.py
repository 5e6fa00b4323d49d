"""Planning: the real train step, compiled ahead of time for devices that nobody has to own.

`hybridnorm plan` prints whether it fits and what it costs. `topologies` knows the devices, `compilation` makes a Plan,
`collectives` reads from the compiled text what is sent, and `plan_report` writes a Plan as text, JSON or a row of
docs/planning.md. What lives elsewhere: the memory of a step on the devices at hand (training/dry_run.py), and the
counts of FLOPs and bytes that both use (training/throughput.py, training/memory.py).
"""
