"""Each table as CSV, JSON and LaTeX."""

import csv
import io
import json

from parsed_pages import Parsed
from planted_runs import Planted, plant

from hybridnorm_jax.lab.report import write_report
from hybridnorm_jax.lab.report.blocks import Cell, Column, Table
from hybridnorm_jax.lab.report.table_files import to_csv, to_json, to_latex

TABLE = Table(
    "a-name",
    "50 % of a_b",
    [Column("label"), Column("loss", holds_numbers=True), Column("range", holds_numbers=True)],
    [
        ["x_1 & {y}", Cell("\N{MINUS SIGN}0.12", value=-0.123456789012345), Cell("1 to 2", value=(1.5, 2.25))],
        ["\\~^|", Cell("\N{EM DASH}"), Cell("\N{EM DASH}")],
        ["words", Cell("diverged", failed=True), "\N{EM DASH}"],
    ],
)


def test_csv_has_unrounded_numbers_and_two_columns_for_an_interval():
    rows = list(csv.reader(io.StringIO(to_csv(TABLE))))
    assert rows == [
        ["label", "loss", "range, low", "range, high"],
        ["x_1 & {y}", "-0.123456789012345", "1.5", "2.25"],
        ["\\~^|", "", "", ""],
        ["words", "diverged", "", ""],
    ]


def test_json_has_values_and_nulls():
    content = json.loads(to_json(TABLE))
    assert (content["name"], content["caption"]) == ("a-name", "50 % of a_b")
    first, second, third = content["rows"]
    assert first == {"label": "x_1 & {y}", "loss": -0.123456789012345, "range": [1.5, 2.25]}
    assert second == {"label": "\\~^|", "loss": None, "range": None}
    assert third["loss"] == "diverged"


def test_latex_is_escaped_and_aligned():
    lines = to_latex(TABLE).splitlines()
    assert r"\caption{50 \% of a\_b}" in lines
    assert r"\begin{tabular}{lrr}" in lines
    assert r"x\_1 \& \{y\} & $-$0.12 & 1 to 2 \\" in lines
    assert r"\textbackslash{}\textasciitilde{}\textasciicircum{}\textbar{} & --- & --- \\" in lines
    assert [line for line in lines if line.endswith("rule")] == [r"\toprule", r"\midrule", r"\bottomrule"]


def test_every_table_of_the_page_has_its_three_files(tmp_path):
    for seed in range(2):
        plant(tmp_path, Planted("pre", seed=seed, loss=3.5, result={"flops_per_step": 10}))
        plant(tmp_path, Planted("post", seed=seed, loss=3.0 + seed / 8, result={"flops_per_step": 12}))
    plant(tmp_path, Planted("pre", rate=2e-3, loss=3.6))
    page = Parsed(write_report(tmp_path).read_text(encoding="utf-8"))
    files = {file.name for file in (tmp_path / "tables").iterdir()}
    names = {file.removesuffix(".json") for file in files if file.endswith(".json")}
    assert len(names) == len(page.tables)
    assert files == {f"{name}.{ending}" for name in names for ending in ("csv", "json", "tex")}
    content = json.loads((tmp_path / "tables" / "differences-at-best-rates.json").read_text(encoding="utf-8"))
    assert content["rows"][0]["difference"] == -0.4375
    assert content["rows"][0]["95 % interval"][0] < -0.4375
