"""The README's commands and code run as written."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import pytest

from circuits.tasks.recall import Recall, generate
from mad.commands.main import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def lines(start: str) -> list[str]:
    found = [
        line.partition("#")[0].strip() for block in blocks("sh") for line in block.splitlines()
    ]
    return [line for line in found if line.startswith(start)]


def test_the_makes_are_there():
    makefile = (ROOT / "Makefile").read_text()
    assert lines("make ") == ["make demo", "make test"]
    for line in lines("make "):
        assert re.search(rf"^{line.removeprefix('make ')}:", makefile, re.MULTILINE)


def test_the_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    new = [{"clean": record["clean"]} for record in generate(Recall(), 20, seed=99)]
    Path("new.jsonl").write_text("".join(json.dumps(record) + "\n" for record in new))
    commands = lines("madcap ")
    assert len(commands) == 3
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().err
    assert len(Path("scored.jsonl").read_text().splitlines()) == 20
    assert {"circuit.json", "circuit.svg", "circuit.png", "circuit.pdf", "curve.png"} <= {
        path.name for path in Path("runs/recall").iterdir()
    }


def test_the_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert Path("circuit.svg").stat().st_size > 1000
    assert str(names["found"].metrics["faithfulness"]) in capsys.readouterr().out
    assert len(names["detector"].p_values(names["parts"]["new"])) == 50
    _, from_model_and_prompts = code.split("\n\n", 1)[1].split("\n\n")
    assert len(ast.parse(from_model_and_prompts).body) <= 6


@pytest.mark.parametrize("link", re.findall(r'src="([^"]+)"', README))
def test_the_pictures_are_there(link):
    assert (ROOT / link).is_file()


def test_the_demo_runs(tmp_path):
    assert (
        main(
            [
                "demo",
                f"out={tmp_path / 'demo'}",
                "mode=smoke",
                "inputs=20",
                "controls=1",
                "alpha=0.1",
            ]
        )
        == 0
    )
    rows = json.loads((tmp_path / "demo" / "demo.json").read_text())["rows"]
    assert [row["detector"] for row in rows[:3]] == ["fast", "strict", "deviation"] and len(
        rows
    ) == 6


@pytest.mark.slow
def test_the_table_is_that_of_a_run(tmp_path):
    assert main(["demo", f"out={tmp_path / 'demo'}"]) == 0
    rows = json.loads((tmp_path / "demo" / "demo.json").read_text())["rows"]
    table = [line for line in README.splitlines() if line.startswith("| ")]
    for row, start in zip(
        rows, ("fast", "strict", "deviation", "max-prob", "Mahalanobis", "random"), strict=True
    ):
        written = next(line for line in table if line.startswith(f"| {start}"))
        cells = [float(cell.strip(" %")) for cell in written.split("|")[2:7]]
        ours = [row["auroc"]["normal_iid"], row["auroc"]["normal_shift"]]
        ours += [100 * row["flagged"][group] for group in ("normal_iid", "normal_shift", "anomaly")]
        for column, (value, cell) in enumerate(zip(ours, cells, strict=True)):
            assert value == pytest.approx(
                cell, abs=0.02 if column < 2 else 2.0
            )  # machines round differently
