"""Several runs side by side, where their figures mean the same.

Faithfulness depends on model, graph, prompts, metric and ablation: runs that differ in one of them
are refused, with the command that measures them alike.  Figures are those of `evaluation.json`
where every run has one that was measured like the others, else those of `metrics.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from circuits.circuit import Circuit
from circuits.files import own_file, read_json
from circuits.plot.curve import FaithfulnessCurve, RandomBand, draw_faithfulness_curve
from mad.folder import EVALUATION

METRICS_FILE = "metrics.json"


@dataclass(frozen=True)
class Conditions:
    """What figures depend on beside the circuit."""

    model: str  # hash of its weights
    edges_total: int
    prompts: str  # hash
    metric: str
    ablation: str


@dataclass(frozen=True)
class Compared:
    """A run's figures, and what they depend on."""

    name: str
    method: str
    conditions: Conditions
    n_prompts: int
    edges: int
    faithfulness: Mapping[str, float]  # by metric
    accuracy: float | None
    kl: float
    cpr: float | None
    cmd: float | None
    seconds: float | None  # of discovery
    curve: Sequence[tuple[int, float]]  # edges and faithfulness
    random_curve: Sequence[tuple[int, float, float]]  # edges, lowest and highest


def compared(folders: Sequence[Path]) -> list[Compared]:
    """Returns the figures of runs that were measured alike.

    Raises:
        FileNotFoundError: a folder holds no run.
        ValueError: fewer than two runs, a file that cannot be read, or runs that were measured
            on different models, prompts, metrics or ablations.
    """
    if len(folders) < 2:
        raise ValueError(f"{len(folders)} run to compare; give at least 2 run folders")
    names = _names(folders)
    if all((folder / EVALUATION).is_file() for folder in folders):
        runs = [_read(folder, name, _evaluated) for folder, name in zip(folders, names)]
        if len({run.conditions for run in runs}) == 1:
            return runs
    runs = [_read(folder, name, _extracted) for folder, name in zip(folders, names)]
    _refuse_unlike(folders, runs)
    return runs


def _names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, or all of it where two end alike."""
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def _refuse_unlike(folders: Sequence[Path], runs: Sequence[Compared]) -> None:
    first = runs[0]
    for folder, run in zip(folders, runs):
        ours, theirs = asdict(first.conditions), asdict(run.conditions)
        for field in ours:
            if ours[field] != theirs[field]:
                raise ValueError(
                    f"{folders[0]} and {folder} were measured on different things ({field} "
                    f"{_short(ours[field])} and {_short(theirs[field])}), so that their figures "
                    f"cannot be compared; {_remedy(field, first, folder)}"
                )


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) > 20 else text


def _remedy(field: str, first: Compared, folder: Path) -> str:
    if field in ("model", "edges_total"):
        return "compare runs of one model, with positions told apart in all or in none"
    told = f"metric={first.conditions.metric} ablation={first.conditions.ablation}"
    return (
        f"measure all alike first, as in `madcap evaluate circuit={folder} trusted=FILE {told} "
        "overwrite=true`"
    )


Reader = Callable[[Path, Circuit], "tuple[Mapping[str, Any], str, float | None]"]


def _evaluated(folder: Path, circuit: Circuit) -> tuple[Mapping[str, Any], str, float | None]:
    """The figures of an evaluation, the hash of its prompts, and the seconds of discovery."""
    told = read_json(own_file(folder, EVALUATION))
    if told["circuit"] != circuit.hash():
        raise ValueError("it was measured of another circuit; evaluate again: overwrite=true")
    metrics = own_file(folder, METRICS_FILE)
    seconds = float(read_json(metrics)["seconds"]) if metrics.is_file() else None
    return told, str(told["prompts"]["hash"]), seconds


def _extracted(folder: Path, circuit: Circuit) -> tuple[Mapping[str, Any], str, float | None]:
    told = read_json(own_file(folder, METRICS_FILE))
    return told, str(circuit.about["splits"]["evaluation"]["hash"]), float(told["seconds"])


def _read(folder: Path, name: str, reader: Reader) -> Compared:
    """The figures of a run; ValueError where they cannot be read."""
    circuit = Circuit.load(folder)
    file = folder / (EVALUATION if reader is _evaluated else METRICS_FILE)
    if not file.is_file():
        raise FileNotFoundError(f"no {file}: `madcap extract ... out={folder}` writes one")
    try:
        told, prompts, seconds = reader(folder, circuit)
        return _figures(told, circuit, name, prompts, seconds)
    except KeyError as error:
        raise ValueError(f"{file} lacks {error}; extract again") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read ({error}); extract again") from error


def _figures(
    told: Mapping[str, Any], circuit: Circuit, name: str, prompts: str, seconds: float | None
) -> Compared:
    detail, areas = told["faithfulness_detail"], told.get("areas")
    by_metric = told["by_metric"]
    accuracy = by_metric.get("accuracy")
    return Compared(
        name=name,
        method=circuit.says("method"),
        conditions=Conditions(
            model=str(circuit.about["model"]["weight_hash"]),
            edges_total=int(told["edges_total"]),
            prompts=prompts,
            metric=str(detail["metric"]),
            ablation=str(detail["ablation"]),
        ),
        n_prompts=int(detail["n_prompts"]),
        edges=int(told["edges_kept"]),
        faithfulness={metric: float(one["value"]) for metric, one in by_metric.items()},
        accuracy=None if accuracy is None else float(accuracy["circuit"]),
        kl=float(told["kl"]),
        cpr=None if areas is None else float(areas["cpr"]["value"]),
        cmd=None if areas is None else float(areas["cmd"]["value"]),
        seconds=seconds,
        curve=[(int(p["edges"]), float(p["faithfulness"])) for p in told["curve"]],
        random_curve=[
            (int(p["edges"]), float(p["low"]), float(p["high"])) for p in told["random_curve"]
        ],
    )


Table = tuple[tuple[str, ...], list[tuple[str, ...]]]  # headers and rows


def table(runs: Sequence[Compared]) -> Table:
    """Returns the headers and rows of what tells runs apart."""
    chosen = runs[0].conditions.metric
    headers = ("run", "method", "edges", chosen, "CPR", "CMD", "right", "KL", "s")
    rows = [
        (
            run.name,
            run.method,
            str(run.edges),
            *map(_number, (run.faithfulness.get(chosen), run.cpr, run.cmd, run.accuracy)),
            f"{run.kl:.4g}",
            "-" if run.seconds is None else f"{run.seconds:.1f}",
        )
        for run in runs
    ]
    return headers, rows


def table_by_metric(runs: Sequence[Compared]) -> Table:
    """Returns the headers and rows of faithfulness by each metric that any run has."""
    metrics = dict.fromkeys(name for run in runs for name in run.faithfulness)
    rows = [(run.name, *(_number(run.faithfulness.get(name)) for name in metrics)) for run in runs]
    return ("run", *metrics), rows


def caption(runs: Sequence[Compared]) -> str:
    """Returns what all figures depend on."""
    one = runs[0].conditions
    return (
        f"faithfulness by {one.metric}, {one.ablation} ablation, {runs[0].n_prompts} prompts, "
        f"{one.edges_total} edges"
    )


def draw_comparison(runs: Sequence[Compared], path: Path) -> Path:
    """Draws faithfulness against edges of all runs, their circuits ringed, over random ones."""
    curves, one = [], runs[0].conditions
    for run in runs:
        edges, values = zip(*run.curve, strict=True)
        own = (run.edges, run.faithfulness[one.metric]) if one.metric in run.faithfulness else None
        curves.append(FaithfulnessCurve(run.name, edges, values, chosen=own))
    drawn = [point for run in runs for point in run.random_curve]
    band = None
    if drawn:
        sizes = sorted({edges for edges, *_ in drawn})
        low = [min(point[1] for point in drawn if point[0] == size) for size in sizes]
        high = [max(point[2] for point in drawn if point[0] == size) for size in sizes]
        band = RandomBand(sizes, low, high, "random circuits, lowest to highest")
    return draw_faithfulness_curve(
        curves,
        path,
        random_band=band,
        edges_total=one.edges_total,
        title="Faithfulness by number of edges",
        caption=f"{one.metric}, {one.ablation} ablation, {runs[0].n_prompts} prompts; rings: the "
        "circuits",
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
