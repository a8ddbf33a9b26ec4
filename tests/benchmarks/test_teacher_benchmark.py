"""The benchmark of the ways to soft labels runs, and says what it measured."""

import re

import pytest
from test_step import run


@pytest.mark.slow
def test_every_way_has_a_row_and_the_first_is_the_measure() -> None:
    text = run("teacher.py", "--case", "96x64:1", "--rounds", "1", "--steps", "1")
    table = text[text.index("times in seconds") :].splitlines()[2:]
    rows = {line.split()[0]: line.split()[1:] for line in table}
    assert list(rows) == ["none", "ready", "in_process", "pool", "pool_given", "stored"]
    assert all(len(row) == 5 and float(row[0]) > 0 for row in rows.values())
    assert rows["none"][1] == rows["none"][3] == "1.000" and float(rows["none"][4]) < 0.01
    assert re.search(r"96x64, batch 1; times in seconds", text)
