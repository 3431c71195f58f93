"""The benchmarks' tables."""

import json
from pathlib import Path

import pytest

from bench.table import TABLES, Line, duration, filled_in, read, size, tables


def test_lines_of_other_programs_are_passed_over() -> None:
    line = {"bench": "rounds", "clients": 8}
    assert read(["a log's line", "{", "3", json.dumps({"bench": "unknown"}), json.dumps(line)]) == [line]


def test_a_table_has_the_columns_that_any_of_its_lines_fills() -> None:
    lines: list[Line] = [
        {"bench": "rounds", "clients": 8, "model_bytes": 40_000, "round_seconds": 0.0041},
        {"bench": "strategies", "strategy": "FedAvgM", "parameters": {"momentum": "0.9"}, "accuracies": [0.8, 0.7912]},
        {"bench": "rounds", "clients": 4, "model_bytes": 400_000_000, "times_bare_grpc": 1.25},
    ]
    assert tables(lines).splitlines() == [
        "### Whole no-op rounds",
        "",
        "| clients | model | Isthmus | times bare gRPC |",
        "| --- | --- | --- | --- |",
        "| 8 | 40 kB | 4.1 ms |  |",
        "| 4 | 400 MB |  | 1.25 |",
        "",
        "### Strategies",
        "",
        "| strategy | parameters | each seed |",
        "| --- | --- | --- |",
        "| FedAvgM | momentum 0.9 | 80.00 79.12 |",
    ]


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (40_000, "40 kB"), (1.2345e9, "1.23 GB")])
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.000251, "0.251 ms"), (0.9999, "1 s"), (33.12, "33.1 s")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_tables_go_to_their_places_in_a_document_and_others_stay() -> None:
    text = "a\n<!-- table: rounds -->\nold\n<!-- end -->\n<!-- table: wire -->\nkept\n<!-- end -->\n"
    line: Line = {"bench": "rounds", "clients": 8}
    expected = text.replace("old\n", "\n| clients |\n| --- |\n| 8 |\n\n")
    assert filled_in(text, [line]) == expected
    assert filled_in(expected, [line]) == expected
    assert filled_in(text, [{"bench": "memory", "clients": 4}]) == text


def test_the_documentation_has_a_place_for_every_table() -> None:
    docs = Path(__file__).parents[3] / "docs"
    names = ("design/benchmarks.md", "training/privacy.md", "training/quantisation.md")
    pages = [(docs / name).read_text(encoding="utf-8") for name in names]
    elsewhere = {"codecs", "codec_accuracy"}  # training/compression.md, without the comments
    assert {name for name in TABLES if not any(f"<!-- table: {name} -->" in page for page in pages)} == elsewhere
