"""How well a circuit's scores find a known circuit: ROC and AUC of its edges and of its nodes.

The AUC is the share of pairs of a true edge and another one that are ranked right, ties counted
half; 1/2 is chance.  Edges are ranked by |score|, those that are kept before all others where the
method decided itself; nodes by the best of the edges out of them, and one is true if a true edge
leaves it (Conmy et al. 2023, arXiv 2304.14997, appendix E).

Shapes: things to rank n; readers R, writers W; `*S` positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from circuits.circuit import Circuit
from circuits.regrouped import regrouped

POINTS = 200  # of a ROC curve on disk, at most


def against_known(
    circuit: Circuit, known: Circuit, chance: Sequence[Bool[Tensor, "R W *S"]]
) -> dict[str, Any]:
    """Returns AUC, ROC, precision and recall of edges and of nodes against a known circuit.

    >>> from circuits import Graph
    >>> graph = Graph(n_layers=1, n_heads=1)
    >>> circuit = Circuit(graph, graph.exists, graph.exists.float())
    >>> true = graph.exists.clone()
    >>> true[:-1] = False  # only what the logits read
    >>> told = against_known(circuit, Circuit(graph, true, true.float()), [])
    >>> told["edges"]["auc"], told["edges"]["precision"], told["edges"]["recall"]
    (0.5, 0.375, 1.0)

    Args:
        known: its kept edges are the true ones.
        chance: random circuits of the circuit's size, for their precision and recall.

    Raises:
        ValueError: it is of another graph, or has no edge or all of them.
    """
    fitted = regrouped(known, circuit.graph)
    graph, rank = circuit.graph, edge_rank(circuit)
    if not 0 < len(fitted) < graph.n_edges:
        raise ValueError(
            f"the known circuit has {len(fitted)} of {graph.n_edges} edges; to tell true edges "
            "from others it must have some and lack some"
        )
    there = graph.exists
    edges = _ranked(rank[there], fitted.kept[there], circuit.kept[there])
    nodes = _ranked(_of_nodes(rank), _of_nodes(fitted.kept), _of_nodes(circuit.kept))
    edges |= _chance([mask[there] for mask in chance], fitted.kept[there])
    nodes |= _chance([_of_nodes(mask) for mask in chance], _of_nodes(fitted.kept))
    return {"edges_true": len(fitted), "edges": edges, "nodes": nodes}


def edge_rank(circuit: Circuit) -> Float[Tensor, "R W *S"]:
    """Returns what edges are ranked by: |score|, kept ones first where the method decided."""
    rank = circuit.scores.abs().double()
    decided = "method" in circuit.about and circuit.about.get("selection") is None
    return kept_first(rank, circuit.kept) if decided else rank


def kept_first(
    rank: Float[Tensor, "R W *S"], kept: Bool[Tensor, "R W *S"]
) -> Float[Tensor, "R W *S"]:
    """Returns the ranks with those of kept edges above all others."""
    return rank / rank.max().clamp(min=1e-30) + 2.0 * kept


def auc(rank: Float[Tensor, "n"], true: Bool[Tensor, "n"]) -> float:
    """Returns the share of (true, other) pairs ranked right; NaN without such pairs."""
    from sklearn.metrics import roc_auc_score

    if true.all() or not true.any():
        return float("nan")
    return float(roc_auc_score(true.numpy(), rank.numpy()))


def _of_nodes(edges: Tensor) -> Float[Tensor, "W"] | Bool[Tensor, "W"]:
    """Of each writer, the best of its edges."""
    return edges.reshape(*edges.shape[:2], -1).amax((0, 2))


def _ranked(
    rank: Float[Tensor, "n"], true: Bool[Tensor, "n"], kept: Bool[Tensor, "n"]
) -> dict[str, Any]:
    from sklearn.metrics import roc_curve

    area = auc(rank, true)
    if area != area:  # every node of the model is one of the known circuit
        return {"auc": None, "roc": [], **_overlap(kept, true)}
    false_rate, true_rate, _ = roc_curve(true.numpy(), rank.numpy())
    step = max(1, -(-len(false_rate) // POINTS))
    places = sorted({*range(0, len(false_rate), step), len(false_rate) - 1})
    points = [[float(false_rate[place]), float(true_rate[place])] for place in places]
    return {"auc": area, "roc": points, **_overlap(kept, true)}


def _overlap(kept: Bool[Tensor, "n"], true: Bool[Tensor, "n"]) -> dict[str, float | None]:
    both = int((kept & true).sum())
    return {
        "precision": both / int(kept.sum()) if kept.any() else None,
        "recall": both / int(true.sum()),
    }


def _chance(drawn: Sequence[Bool[Tensor, "n"]], true: Bool[Tensor, "n"]) -> dict[str, Any]:
    if not drawn:
        return {"precision_of_random_circuits": None, "recall_of_random_circuits": None}
    overlaps = [_overlap(kept, true) for kept in drawn]
    return {
        f"{name}_of_random_circuits": sum(one[name] or 0.0 for one in overlaps) / len(overlaps)
        for name in ("precision", "recall")
    }
