"""Tables off a terminal: no number is cut, whatever the width of its row."""

from __future__ import annotations

from mad.benchmark.tables import terminal_table
from mad.commands.console import output


def printed(capsys) -> str:
    headers = [f"column {number}" for number in range(20)]
    output().print(terminal_table("wide", headers, [["12345.678"] * 20], left=()))
    return capsys.readouterr().out


def test_a_wide_table_is_whole_in_a_pipe(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert printed(capsys).count("12345.678") == 20


def test_a_width_that_is_asked_for_is_kept_to(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, printed(capsys).splitlines())) <= 80
