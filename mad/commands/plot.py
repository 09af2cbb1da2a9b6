"""Draw a circuit and its faithfulness curve.

    madcap plot circuit=runs/pronoun
    madcap plot circuit=runs/pronoun formats=[svg] out=figures

Writes circuit.svg, circuit.png and circuit.pdf (rows are layers, inputs at the bottom; blue edges
support the behaviour, red ones work against it; width and opacity show |score|), and curve.png and
curve.svg: faithfulness against the number of edges kept, with random circuits of the same size.
Where edges are told apart by position, also positions.svg, .png and .pdf: what each node reads
where in the text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from circuits.circuit import Circuit


@dataclass
class Plot:
    """What is drawn, and where to."""

    circuit: str = "???"  # a run folder, or a circuit.json
    out: str | None = None  # folder for the pictures; null: the run folder
    formats: list[str] = field(default_factory=lambda: ["svg", "png", "pdf"])  # svg, png, pdf
    maximum_edges: int = 800  # more than this is refused: no picture of it can be read


def run(config: Plot) -> None:
    """Draws the pictures and names them."""
    for path in draw(Path(config.circuit), config.out, config.formats, config.maximum_edges):
        print(path)


def draw(source: Path, out: str | None, formats: list[str], maximum_edges: int) -> list[Path]:
    """The pictures of a run folder."""
    from circuits.plot import (
        FaithfulnessCurve,
        RandomBand,
        draw_circuit,
        draw_faithfulness_curve,
        draw_positions,
    )

    circuit = Circuit.load(source)
    source = source if source.is_dir() else source.parent
    folder = Path(out) if out else source
    folder.mkdir(parents=True, exist_ok=True)
    metrics = source / "metrics.json"
    figures = json.loads(metrics.read_text()) if metrics.is_file() else None
    edges = circuit.edges_over_positions
    caption = f"{len(circuit)} of {circuit.graph.n_edges} edges"
    if circuit.graph.n_positions is not None:
        caption += f" ({circuit.graph.n_positions} positions, drawn as {len(edges)} edges with summed scores)"
    if figures:
        detail = figures["faithfulness_detail"]
        caption += f", faithfulness {detail['value']:.2f} ({detail['metric']}, {detail['ablation']} ablation)"
    title = _title(circuit)
    paths = draw_circuit(
        edges,
        folder,
        formats=tuple(formats),
        title=title,
        caption=caption,
        maximum_edges=maximum_edges,
        kv_group=circuit.graph.kv_group,
    )
    if circuit.graph.n_positions is not None:
        for form in formats:
            paths.append(
                draw_positions(circuit, folder / f"positions.{form}", title=title, caption=caption)
            )
    if figures and len(points := [point for point in figures["curve"] if point["edges"]]) > 1:
        curve = FaithfulnessCurve(
            circuit.about["method"]["name"],
            [p["edges"] for p in points],
            [p["faithfulness"] for p in points],
        )
        chance, band = figures["random_curve"], None
        if chance:
            low, high = [point["low"] for point in chance], [point["high"] for point in chance]
            band = RandomBand(
                [point["edges"] for point in chance],
                low,
                high,
                "random circuits, lowest to highest",
            )
        caption = f"{detail['metric']}, {detail['ablation']} ablation, {detail['n_prompts']} held-out prompts"
        for form in ("png", "svg"):
            paths.append(
                draw_faithfulness_curve(
                    [curve],
                    folder / f"curve.{form}",
                    random_band=band,
                    edges_total=circuit.graph.n_edges,
                    title=title,
                    caption=caption,
                )
            )
    return paths


def _title(circuit: Circuit) -> str:
    about = circuit.about
    model = Path(about.get("model", {}).get("path", "")).name
    parts = [about.get("task", {}).get("name", "circuit"), about.get("method", {}).get("name", "")]
    return ", ".join(part for part in (*parts, model) if part)
