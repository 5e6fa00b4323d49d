"""Planning: the real train step, compiled ahead of time for devices that nobody has to own, and counted.

`hybridnorm plan` prints whether it fits and what it costs. `topologies` (with `gpu_devices`) knows the devices, and
`compilation` makes a Plan. What is counted is read from the compiled text: `hlo_text` parses it, `executions` says how
often everything runs, `model_parts` to which part of the model it belongs; `matrix_products` (with `kernel_products`),
`memory_traffic` and `collectives` (with `device_groups`) count, `counts` puts them together, and `roofline` says what a
step takes at least. `plan_report` writes a Plan as text and JSON, `plan_table` as a row of docs/planning.md. Many
settings are planned by `stored_plans`, put side by side by `compare`, and gone through by `search`. What lives
elsewhere: the memory of a step on the devices at hand (training/dry_run.py), and the counts of FLOPs and bytes that
both use (training/throughput.py, training/memory.py).
"""
