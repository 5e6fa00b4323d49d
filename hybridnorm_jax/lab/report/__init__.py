"""The report of a comparison: from a directory of runs to report.html, report.md with figures/, and report.csv.

`files` writes them. `sections` decides what the report says and in which order, `tables` and `facts` make its tables,
`loss_figures` and `layer_figures` draw, `statistics` computes the numbers and `formats` writes them as text; `blocks`
are the parts of a report that `html_page` and `markdown_page` turn into text. Reading the runs is lab/runs.py's.
"""

from hybridnorm_jax.lab.report.files import write_report

__all__ = ["write_report"]
