"""Draw a circuit and its faithfulness curve, or what a scored file shows.

    madcap plot circuit=runs/pronoun
    madcap plot circuit=runs/pronoun formats=[svg] out=figures
    madcap plot circuit=runs/large edges=300
    madcap plot scored=scored.jsonl alpha=0.05

Writes circuit.svg, circuit.png and circuit.pdf (rows are layers, inputs at the bottom; blue edges
support the behaviour, red ones work against it; width and opacity show |score|), and curve.png and
curve.svg: faithfulness against the number of edges kept, with random circuits of the same size.
Where edges are told apart by position, also positions.svg, .png and .pdf: what each node reads
where in the text. Of a learned mask also training.png and training.svg: loss, faithfulness and
expected edges by step.

A picture of more than maximum_edges cannot be read and is refused; edges=N draws the strongest
connected part of the circuit that has at most N edges, and says so below it.

A circuit of units (nodes, neurons, features) is drawn without edges: the kept units of each layer,
strongest first, at most per_row of them.

scored=FILE draws what `madcap score` wrote: FILE.scores, the scores with those flagged at alpha in
red and, where inputs had a "label", FILE.roc; it prints the shares flagged, and AUROC.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuits.circuit import Circuit
from circuits.files import own_file, read_json
from circuits.foreign import EAP_IG

if TYPE_CHECKING:
    from circuits.parts.circuit import UnitCircuit

TRAINING = ("loss", "faithfulness", "edges")  # of each step, where a mask was learned
READABLE = 300  # edges in a picture that can still be followed by eye
DETAIL = ("metric", "ablation", "n_prompts")  # what the figures were measured with


@dataclass
class Plot:
    """What is drawn, and where to."""

    circuit: str | None = None  # a run folder, or a circuit.json
    scored: str | None = None  # a file that `madcap score` wrote, instead of a circuit
    alpha: float = 0.01  # inputs of a scored file with p_value <= alpha are flagged
    out: str | None = None  # folder for the pictures; null: the run folder, or that of the file
    formats: list[str] = field(default_factory=lambda: ["svg", "png", "pdf"])  # svg, png, pdf
    edges: int | None = None  # draw the strongest connected part of at most so many; null: all
    maximum_edges: int = 800  # more than this is refused: no picture of it can be read
    per_row: int = 12  # of a circuit of units: how many boxes a row has, the strongest


def run(config: Plot) -> None:
    """Draws the pictures and names them."""
    if (config.circuit is None) == (config.scored is None):
        raise ValueError("give circuit=FOLDER or scored=FILE, one of the two: what is to be drawn")
    if config.scored is not None:
        paths = _draw_scored(Path(config.scored), config)
    else:
        assert config.circuit is not None
        paths = draw(Path(config.circuit), config)
    for path in paths:
        print(path)


def _draw_scored(scored: Path, config: Plot) -> list[Path]:
    from mad.scored import draw_scored, read_scored

    shown = read_scored(scored, config.alpha)
    print(shown.summary())
    return draw_scored(shown, Path(config.out) if config.out else scored.parent, config.formats)


def draw(source: Path, config: Plot) -> list[Path]:
    """The pictures of a run folder."""
    from circuits.parts.circuit import UnitCircuit, load_circuit

    circuit = load_circuit(source)
    _check_size(circuit, source, config)
    source = source if source.is_dir() else source.parent
    folder = Path(config.out) if config.out else source
    folder.mkdir(parents=True, exist_ok=True)
    figures = None
    if circuit.about.get("read_from") != EAP_IG:
        figures = _figures(source, circuit.space.noun)
    title, caption = _title(circuit), _caption(circuit, figures)
    if isinstance(circuit, UnitCircuit):
        from circuits.plot.units import draw_units

        units, per_row = circuit.over_positions.units, config.per_row
        texts = {"title": title, "caption": caption}
        paths = draw_units(units, folder, formats=config.formats, per_row=per_row, **texts)
    else:
        paths = _draw_edges(circuit, folder, config, title, caption)
    if figures:
        paths += _draw_curve(circuit, figures, folder, title)
        paths += _draw_training(circuit, figures, folder, title)
    return paths


def _strongest(circuit: Circuit, config: Plot) -> Circuit:
    """What is drawn of a circuit, without positions."""
    whole = circuit.over_positions
    return whole if config.edges is None else whole.strongest(config.edges)


def _check_size(circuit: Circuit | UnitCircuit, source: Path, config: Plot) -> None:
    """Refuses a picture that cannot be read, and says what draws one that can."""
    if not isinstance(circuit, Circuit):
        if config.edges is not None:
            raise ValueError(
                f"edges={config.edges}, but the circuit of {source} is of units; per_row=N draws "
                "the strongest N of each row"
            )
    elif (edges := len(_strongest(circuit, config))) > config.maximum_edges:
        readable = min(READABLE, config.maximum_edges)
        raise ValueError(
            f"{source} has {edges} edges, but a picture holds at most "
            f"maximum_edges={config.maximum_edges}; draw its strongest part: "
            f"madcap plot circuit={source} edges={readable}"
        )


def _draw_edges(
    circuit: Circuit, folder: Path, config: Plot, title: str, caption: str
) -> list[Path]:
    """The pictures of a circuit of edges."""
    from circuits.plot.circuit import draw_circuit
    from circuits.plot.positions import draw_positions

    drawn, whole = _strongest(circuit, config), circuit.over_positions
    part = f"the strongest {len(drawn)} of {len(whole)} edges drawn; circuit: "
    paths = draw_circuit(
        drawn.edges,
        folder,
        formats=tuple(config.formats),
        title=title,
        caption=(part if len(drawn) < len(whole) else "") + caption,
        maximum_edges=config.maximum_edges,
        kv_group=circuit.graph.kv_group,
    )
    if circuit.graph.n_positions is not None:
        files = [folder / f"positions.{form}" for form in config.formats]
        paths += [draw_positions(circuit, file, title=title, caption=caption) for file in files]
    return paths


def _figures(folder: Path, noun: str = "edges") -> dict[str, Any] | None:
    """What is drawn of `metrics.json`, with sizes in edges or units; None where there is none.

    Raises:
        ValueError: it cannot be read, or something is missing.
    """
    path = own_file(folder, "metrics.json")
    if not path.is_file():
        return None
    try:
        data = read_json(path)
        detail = data["faithfulness_detail"]
        kinds = {noun: int, "faithfulness": float, "low": float, "high": float}
        columns = {"curve": (noun, "faithfulness"), "random_curve": (noun, "low", "high")}
        curves = {
            name: [{key: kinds[key](point[key]) for key in keys} for point in data[name]]
            for name, keys in columns.items()
        }
        detail = {**{key: detail[key] for key in DETAIL}, "value": float(detail["value"])}
        training = [
            {"step": int(point["step"])} | {key: float(point[key]) for key in TRAINING}
            for point in (data.get("method") or {}).get("training", [])
        ]
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}; extract again, or delete it") from error
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} cannot be read ({error}); extract again, or delete it") from error
    return {**curves, "faithfulness_detail": detail, "training": training}


def _draw_curve(
    circuit: Circuit | UnitCircuit, figures: Mapping[str, Any], folder: Path, title: str
) -> list[Path]:
    """Faithfulness by size, where more than one size was measured."""
    from circuits.plot.curve import FaithfulnessCurve, RandomBand, draw_faithfulness_curve

    noun = circuit.space.noun
    points = [point for point in figures["curve"] if point[noun]]
    if len(points) < 2:
        return []
    name = circuit.says("method") or "circuit"
    edges, faithfulness = _columns(points, noun, "faithfulness")
    curve = FaithfulnessCurve(name, edges, faithfulness)
    band = None
    if chance := figures["random_curve"]:
        edges, low, high = _columns(chance, noun, "low", "high")
        band = RandomBand(edges, low, high, "random circuits, lowest to highest")
    detail = figures["faithfulness_detail"]
    measured = f"{detail['metric']}, {detail['ablation']} ablation"
    return [
        draw_faithfulness_curve(
            [curve],
            folder / f"curve.{form}",
            random_band=band,
            edges_total=circuit.space.n_parts,
            noun=noun,
            title=title,
            caption=f"{measured}, {detail['n_prompts']} held-out prompts",
        )
        for form in ("png", "svg")
    ]


def _draw_training(
    circuit: Circuit | UnitCircuit, figures: Mapping[str, Any], folder: Path, title: str
) -> list[Path]:
    """The course of a learned mask's training."""
    from circuits.plot.training import TrainingPoint, draw_training

    points = [TrainingPoint(**point) for point in figures["training"]]
    if len(points) < 2:
        return []
    return [
        draw_training(
            points,
            folder / f"training.{form}",
            edges_kept=len(circuit),
            noun=circuit.space.noun,
            title=f"{title}: training",
            caption="of batches, under masks that were drawn; dotted: "
            f"the {circuit.space.noun} kept",
        )
        for form in ("png", "svg")
    ]


def _columns(points: list[dict[str, Any]], *names: str) -> list[list[Any]]:
    return [[point[name] for point in points] for name in names]


def _caption(circuit: Circuit | UnitCircuit, figures: Mapping[str, Any] | None) -> str:
    space = circuit.space
    caption = f"{len(circuit)} of {space.n_parts} {space.noun}"
    if space.n_positions is not None:
        of_edges = isinstance(circuit, Circuit)
        left = len(circuit.edges_over_positions if of_edges else circuit.over_positions.units)
        drawn = f"drawn as {left} {space.noun} with summed scores"
        caption += f" ({space.n_positions} positions, {drawn})"
    if figures:
        detail = figures["faithfulness_detail"]
        measured = f"{detail['metric']}, {detail['ablation']} ablation"
        caption += f", faithfulness {detail['value']:.2f} ({measured})"
    return caption


def _title(circuit: Circuit | UnitCircuit) -> str:
    model = circuit.about.get("model")
    path = model.get("path") if isinstance(model, Mapping) else None
    origin = circuit.about.get("read_from")
    parts = [circuit.says("task") or (origin if isinstance(origin, str) else "circuit")]
    parts += [circuit.says("method"), Path(path).name if isinstance(path, str) else ""]
    return ", ".join(part for part in parts if part)
