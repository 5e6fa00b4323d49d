"""The report of a comparison: from a directory of runs to report.html, report.md with figures/, report.csv and tables/.

`files` writes them. `sections` decides what the report says and in which order; `opening_sections` is how it begins,
`conclusions` what may be concluded, `comparison_sections` each further comparison. `tables`, `difference_tables`,
`sensitivity`, `costs`, `scaling` and `facts` make tables; `comparison_figures`, `loss_figures` and `layer_figures`
draw. `statistics` has the numbers of a comparison, `significance` the tests behind them, and `formats` writes them
as text. `blocks` are the parts of a report that `html_page` and `markdown_page` turn into text, and `table_files` into
CSV, JSON and LaTeX. Reading the runs is lab/runs.py's.
"""

from hybridnorm_jax.lab.report.files import write_report

__all__ = ["write_report"]
