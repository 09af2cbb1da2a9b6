"""The command line, on a tiny made-up one: instant help, presets, paths, errors, sweeps."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mad.commands import config, main, overrides
from mad.commands.help import preset_names

ROOT = Path(__file__).resolve().parents[3]


def preset(schema: str, node: str, *settings: str) -> str:
    lines = [f"# tinylib.algorithms.{schema}", f"defaults: [_{node}, _self_]", *settings]
    return "\n".join(lines) + "\n"


FILES = {
    "tinylib/__init__.py": "",
    "tinylib/algorithms.py": '''
        """Algorithms, small enough to be told apart from their results."""
        from dataclasses import dataclass, field

        @dataclass(frozen=True)
        class Sweep:
            """Removes edges one by one."""
            name: str = "sweep"
            # an edge is removed when it costs less,
            # in units of the metric
            tau: float = 0.1
            # how often
            rounds: int | None = None
            extra: dict[str, float] = field(default_factory=dict)  # more numbers

            def __post_init__(self):
                if self.tau < 0:
                    raise ValueError(f"tau={self.tau}, but it must not be negative;\\n raise it")

        @dataclass
        class Gradient:
            """Reads all edges off one gradient."""
            steps: int = 5  # points on the path

        @dataclass
        class Load:
            path: str = "???"  # where it is
            dtype: str = "float32"

        @dataclass
        class Recall:
            length: int = 7

        @dataclass
        class Entry:
            schema: type

        METHODS = {"sweep": Entry(Sweep), "gradient": Entry(Gradient)}
        TASKS = {"recall": Entry(Recall), "file": Entry(Load)}
    ''',
    "tinylib/probe.py": '''
        """Probe a model and write what was found.

            madcap probe model=tiny out=found
        """
        import json
        from dataclasses import asdict, dataclass, field
        from typing import Any

        @dataclass
        class Shared:
            seed: int = 0  # of every random draw

        @dataclass
        class Probe(Shared):
            model: Any = "???"  # what is probed
            method: Any = "???"
            task: Any = None
            out: str = "???"  # the file to write
            fail: str = ""  # how to fail
            overrides: list[str] = field(default_factory=list)

        def run(config: Probe) -> int | None:
            errors = {
                "value": ValueError("top_n=9,\\n lower it"),
                "file": FileNotFoundError(2, "No such file", "a b"),
                "bug": RuntimeError("a defect"),
                "stop": KeyboardInterrupt(),
            }
            if config.fail in errors:
                raise errors[config.fail]
            with open(config.out, "w") as file:
                json.dump(asdict(config), file)
            return 3 if config.fail == "code" else None
    ''',
    "tinyconfigs/__init__.py": "",
    "tinyconfigs/probe.yaml": """
        # tinylib.probe.Probe
        defaults:
          - _probe
          - model: null
          - task: null
          - method: sweep
          - _self_
          - mode: null
    """,
    "tinyconfigs/model/tiny.yaml": preset("Load - the smallest", "model", "path: tiny.pt"),
    "tinyconfigs/model/small.yaml": preset("Load", "model", "path: small.pt"),
    "tinyconfigs/model/path.yaml": preset("Load", "model"),
    "tinyconfigs/task/recall.yaml": preset("Recall", "recall"),
    "tinyconfigs/task/file.yaml": preset("Load", "file"),
    "tinyconfigs/method/sweep.yaml": preset("Sweep", "sweep", "rounds: 2"),
    "tinyconfigs/method/gradient.yaml": preset("Gradient", "gradient"),
    "tinyconfigs/method/broken.yaml": preset("Gradient", "gradient", "step: 1"),
    "tinyconfigs/mode/quick.yaml": (
        "# @package _global_\n# tiny runs\n"
        "defaults: [{override /method: gradient}]\nmethod: {steps: 1}\nseed: 5\n"
    ),
    "tinyconfigs/mode/half.yaml": "# @package _global_\nmodel: {dtype: bfloat16}\n",
    "tinyconfigs/mode/cluster.yaml": (
        "# @package _global_\nhydra: {mode: MULTIRUN, sweep: {dir: jobs}}\n"
    ),
}


@pytest.fixture(scope="session")
def tiny_packages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(dedent(text).lstrip(), encoding="utf-8")
    return folder


@pytest.fixture
def probe(tiny_packages, tmp_path, monkeypatch, capsys):
    """Runs `madcap probe ...` in an empty folder; its exit code, what it wrote, stdout, stderr."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    Plugins.instance()  # its own schemas are stored once in a process: before the copy, not after
    monkeypatch.syspath_prepend(str(tiny_packages))
    monkeypatch.setattr(config, "CONFIGS", "tinyconfigs")
    monkeypatch.setattr(
        config,
        "SCHEMAS",
        {
            "model": "tinylib.algorithms:Load",
            "task": "tinylib.algorithms:TASKS",
            "method": "tinylib.algorithms:METHODS",
        },
    )
    monkeypatch.setattr(main, "PACKAGE", "tinylib")
    monkeypatch.setattr(main, "COMMANDS", {"probe": "probe a model"})
    monkeypatch.setattr(ConfigStore.instance(), "repo", copy.deepcopy(ConfigStore.instance().repo))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = main.main(["probe", *arguments])
        captured = capsys.readouterr()
        found = json.loads(Path("found").read_text()) if Path("found").is_file() else None
        return code, found, captured.out, captured.err

    return run


# --------------------------------------------------------------------------------------------------
# what is composed


def test_presets_fill_in_their_dataclass(probe):
    code, found, _, _ = probe("model=tiny", "out=found", "method.tau=0.5", "seed=2")
    assert code == 0
    assert found == {
        "seed": 2,
        "model": {"path": "tiny.pt", "dtype": "float32"},
        "method": {"name": "sweep", "tau": 0.5, "rounds": 2, "extra": {}},
        "task": None,
        "out": "found",
        "fail": "",
        "overrides": ["model=tiny", "out=found", "method.tau=0.5", "seed=2"],
    }
    assert [path.name for path in Path.cwd().iterdir()] == [
        "found"
    ]  # Hydra leaves no folders behind


def test_a_group_changes_the_dataclass(probe):
    assert probe("model=tiny", "out=found", "method=gradient")[1]["method"] == {"steps": 5}


def test_dict_fields_take_new_keys(probe):
    assert probe("model=tiny", "out=found", "+method.extra.a=1.5")[1]["method"]["extra"] == {
        "a": 1.5
    }


def test_modes_stack(probe):
    _, found, _, _ = probe("model=tiny", "out=found", "mode=[quick,half]")
    assert (found["seed"], found["method"], found["model"]["dtype"]) == (
        5,
        {"steps": 1},
        "bfloat16",
    )


def test_the_command_line_wins_over_modes(probe):
    assert probe("model=tiny", "out=found", "mode=quick", "method.steps=4")[1]["method"] == {
        "steps": 4
    }


@pytest.mark.parametrize(
    "path", ["EleutherAI/pythia-70m", "a b,c=d", "it's", 'say "x"', "back\\", "{[(:1", "1e3", "~x"]
)
def test_what_is_no_preset_is_a_path(probe, path):
    assert probe(f"model={path}", "out=found")[1]["model"] == {"path": path, "dtype": "float32"}


@pytest.mark.parametrize("name", ["prompts, v=2.jsonl", "it's [new].jsonl"])
def test_a_task_may_be_a_file(probe, name):
    Path(name).touch()
    assert probe("model=tiny", "out=found", f"task={name}")[1]["task"]["path"] == name


def test_home_is_expanded(probe, monkeypatch):
    monkeypatch.setenv("HOME", "/the home")
    assert probe("model=~/m", "out=found")[1]["model"]["path"] == "/the home/m"


def test_out_may_hold_anything_and_interpolate(probe):
    assert probe("model=tiny", "out=a, b=${method.tau}'s")[0] == 0
    assert Path("a, b=0.1's").is_file()


def test_quoted_by_the_user_is_not_quoted_again(probe):
    assert probe("model='tiny'", "out='found'")[1]["model"]["path"] == "tiny.pt"


@given(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])).filter(
        lambda text: "${" not in text
    )
)
def test_quote_is_undone_by_hydra(value):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    quoted = overrides.quote(value)
    read = OverridesParser.create().parse_override(f"out={quoted}").value()
    assert read == (value if quoted != value else value[1:-1]) or quoted == value


def test_cfg_prints_and_does_not_run(probe):
    code, found, out, _ = probe("model=tiny", "out=found", "--cfg")
    assert (code, found) == (0, None)
    assert "  tau: 0.1\n" in out and "path: tiny.pt" in out


# --------------------------------------------------------------------------------------------------
# sweeps


def test_a_sweep_runs_every_combination(probe):
    code, _, _, err = probe(
        "-m", "model=tiny,small", "method=sweep,gradient", "out=o-${model.path}-${seed}", "seed=1,2"
    )
    assert (code, err) == (0, "")
    found = [json.loads(path.read_text()) for path in sorted(Path.cwd().glob("o-*"))]
    assert [(f["model"]["path"], f["seed"]) for f in found] == [
        ("small.pt", 1),
        ("small.pt", 2),
        ("tiny.pt", 1),
        ("tiny.pt", 2),
    ]
    assert "seed=1" in found[0]["overrides"]


def test_paths_can_be_swept_over(probe):
    assert probe("-m", "model=a b.pt,c=d.pt", "out=o-${model.path}")[0] == 0
    assert sorted(path.name for path in Path.cwd().glob("o-*")) == ["o-a b.pt", "o-c=d.pt"]


def test_a_mode_can_ask_for_jobs(probe):
    assert probe("mode=cluster", "model=tiny", "out=found")[1]["model"]["path"] == "tiny.pt"
    assert Path("jobs/multirun.yaml").is_file()


def test_presets_and_paths_do_not_mix_in_a_sweep(probe):
    assert probe("-m", "model=tiny,x/y", "out=found")[0] == 2


def test_a_failing_job_fails_the_sweep(probe):
    code, _, _, err = probe("-m", "model=tiny", "out=found", "fail=value,code")
    assert code == 1
    assert "fail=value" in err.splitlines()[0]  # Hydra says which job it was
    assert err.endswith("madcap probe: error: top_n=9, lower it\n")


# --------------------------------------------------------------------------------------------------
# errors

GIVEN = ["model=tiny", "out=found"]


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (
            ["method.tua=1"],
            2,
            ["unknown key 'method.tua'", "did you mean 'method.tau'", "method.rounds"],
        ),
        (["tau=1"], 2, ["unknown key 'tau'", "did you mean 'method.tau'"]),
        (
            ["metod=gradient"],
            2,
            ["unknown key 'metod'", "did you mean 'method'", "keys: seed, model, method"],
        ),
        (["+new=1"], 2, ["unknown key 'new'", "keys: seed"]),
        (["+method.new=1"], 2, ["unknown key 'method.new'", "method.rounds"]),
        (
            ["method=gradent"],
            2,
            ["unknown method preset 'gradent'", "'gradient'", "presets: broken, gradient, sweep"],
        ),
        (["mode=[quick,hal]"], 2, ["unknown mode preset 'hal'", "'half'", "cluster, half, quick"]),
        (["method=broken"], 2, ["in method/broken.yaml", "'method.step'", "'method.steps'"]),
        (["task=recal"], 2, ["task=recal", "neither a preset nor a file", "'recall'"]),
        (["method.tau=abc"], 2, ["method.tau", "'abc'", "Float"]),
        (["method.tau=[1"], 2, ["method.tau=[1", "quote"]),
        (["method=sweep,gradient"], 2, ["method=sweep,gradient", "add -m"]),
        (["fail=${nothing}"], 2, ["fail", "nothing"]),
        (["~method.tau"], 2, ["method.tau", "deletion"]),
        (["seed"], 2, ["'seed' is not of the form key=value"]),
        (["=3"], 2, ["'=3' is not of the form key=value"]),
        (["--fast"], 2, ["unknown option '--fast'"]),
        (["out=???"], 2, ["required and not given: out=..."]),
        (
            ["method=???"],
            2,
            ["required and not given: method=...", "presets: broken, gradient, sweep"],
        ),
        (["model=path"], 2, ["required and not given: model.path=..."]),
        (["method.tau=-1"], 1, ["tau=-1.0, but it must not be negative; raise it"]),
        (["fail=value"], 1, ["top_n=9, lower it"]),
        (["fail=file"], 1, ["No such file: a b"]),
        (["fail=stop"], 130, ["interrupted"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else str(value),
)
def test_errors_are_one_line_that_names_the_cause(probe, arguments, code, parts):
    got, found, out, err = probe(*GIVEN, *arguments)
    assert (got, found, out) == (code, None, "")
    assert err.startswith("madcap probe: error: ") and err.count("\n") == 1
    assert [part for part in parts if part not in err] == [], err


def test_all_that_is_missing_is_told_at_once(probe):
    assert probe()[3] == "madcap probe: error: required and not given: model=..., out=...\n"


def test_a_defect_keeps_its_traceback(probe):
    with pytest.raises(RuntimeError, match="a defect"):
        probe(*GIVEN, "fail=bug")


def test_tracebacks_can_be_asked_for(probe, monkeypatch):
    monkeypatch.setenv("MADCAP_TRACEBACK", "1")
    with pytest.raises(ValueError, match="top_n=9"):
        probe(*GIVEN, "fail=value")


def test_the_exit_code_is_the_commands(probe):
    assert probe(*GIVEN, "fail=code")[0] == 3


def test_an_unknown_command_is_told_the_nearest(capsys):
    assert main.main(["extrct"]) == 2
    assert "did you mean 'extract'" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# help


def test_help_is_read_from_the_source(probe, file_regression):
    code, _, out, err = probe("--help", "method=sweep")
    assert (code, err) == (0, "")
    file_regression.check(out)


def imported_by(*arguments):
    """Modules that `madcap ARGUMENTS` imports, and what it prints."""
    code = (
        "import sys; from mad.commands.main import main; "
        f"main({list(arguments)}); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    text, _, modules = done.stdout.strip().rpartition("\n")
    return set(modules.split()), text


HEAVY = {
    "torch",
    "transformers",
    "transformer_lens",
    "hydra",
    "omegaconf",
    "numpy",
    "rich",
    "matplotlib",
    "pyvene",
}


def test_help_imports_nothing_slow():
    modules, text = imported_by("--help")
    assert modules & (HEAVY | {"yaml"}) == set()
    assert [name for name in main.COMMANDS if name not in text] == []


def test_version_is_the_distributions():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert imported_by("--version")[1] == f"madcap {project['version']}"


# --------------------------------------------------------------------------------------------------
# the commands and presets that we ship


def shipped_presets():
    return [
        (command, group, name)
        for command in main.COMMANDS
        for group in config.groups(command)
        for name in preset_names(group)
    ]


@pytest.mark.parametrize("command", ["truth", "evaluate", "extract"])
def test_an_ablation_is_chosen_by_name_whether_it_is_a_group_or_not(command):
    required = {"truth": [], "evaluate": ["circuit=x"]}
    required["extract"] = ["model=x", "task=recall", "out=x"]
    composed = []
    schema = getattr(importlib.import_module(f"mad.commands.{command}"), command.title())
    typed = ["ablation=mean", *required[command]]
    config.run_command(command, schema, composed.append, typed)
    assert composed[0].ablation.name == "mean"


@pytest.mark.parametrize("command", main.COMMANDS)
def test_every_command_has_help(command):
    modules, text = imported_by(command, "--help")
    assert modules & HEAVY == set()
    assert f"usage: madcap {command}" in text and "  #" not in text


@pytest.mark.parametrize(("command", "group", "name"), shipped_presets())
def test_every_preset_composes(command, group, name):
    from mad.commands.help import class_name, preset_class

    schema = getattr(importlib.import_module(f"mad.commands.{command}"), class_name(command))
    composed = []
    try:
        config.run_command(command, schema, composed.append, [f"{group}={name}"])
    except overrides.UsageError as error:  # what only the user can give may be missing
        assert str(error).startswith("required and not given"), error
    else:
        assert isinstance(composed[0], schema)
    if path := preset_class(group, name):
        module, _, attribute = path.rpartition(".")
        assert find_spec(module) is not None and hasattr(importlib.import_module(module), attribute)
