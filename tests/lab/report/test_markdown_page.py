"""The report as Markdown."""

from hybridnorm_jax.lab.report.blocks import Command, Listing
from hybridnorm_jax.lab.report.markdown_page import to_markdown


def test_code_in_markdown_survives_backticks():
    block = Listing([Command("a|b", "echo `x` ``y``")])
    assert to_markdown("t", [block]) == "# t\n\n- a\\|b: ``` echo `x` ``y`` ```\n"
