"""From a model and trusted prompts to a circuit with its figures: discover, select, evaluate.

Discovery sees one set of prompts and evaluation another.  Every figure names its metric, ablation
and prompts, because faithfulness means nothing without them.

Shapes: writers W, readers R; `*E` the axes of a mask, of edges or units.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from jaxtyping import Bool
from torch import Tensor
from tqdm.auto import tqdm

from circuits.ablation import Ablation, AblationConfig, fit_ablation
from circuits.circuit import Circuit
from circuits.discovery import METHODS, Found, decides
from circuits.discovery.masks.settings import MaskTraining
from circuits.engine import Engine
from circuits.evaluation.agreement import agreement, check_sample
from circuits.evaluation.areas import rankings_of
from circuits.evaluation.figures import figures
from circuits.evaluation.verdicts import refuse_worse_than_none, target_of, warnings
from circuits.faithfulness import FaithfulnessScale, faithfulness_scale
from circuits.files import restored
from circuits.metrics import Metric, metric_named
from circuits.objective import Objective, prepare
from circuits.parts.circuit import UnitCircuit
from circuits.parts.division import UnitsConfig
from circuits.parts.over import discovered, over, selection_of
from circuits.prompts.prompts import Prompts
from circuits.selection import Ranking, Selection, above, random_circuits, ranking, sizes
from circuits.space import Space
from circuits.timing import seconds

log = logging.getLogger(__name__)

# Their runs take about half a forward pass each, together less than the evaluation that follows.
EXACT_SAMPLE = 100
RANDOM = "random"  # in place of a method's name, for circuits that were drawn


@dataclass(frozen=True)
class Extraction:
    """A circuit, its figures for `metrics.json`, and the fitted ablation."""

    circuit: Circuit | UnitCircuit
    metrics: dict[str, Any]
    ablation: Ablation
    used: Mapping[str, Prompts]  # on what it was found and measured, which may not calibrate it


def extract(
    engine: Engine,
    discovery: Prompts,
    evaluation: Prompts,
    method: Any,
    *,
    metric: str = "kl",
    ablation: AblationConfig | str = "counterfactual",
    selection: Selection | None = None,
    units: UnitsConfig | None = None,
    memory: str = "2GB",
    random_draws: int = 20,
    exact_sample: int = EXACT_SAMPLE,
    accept_worse: bool = False,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
    keep: Callable[[Circuit | UnitCircuit], object] | None = None,
) -> Extraction:
    """Finds the circuit of a behaviour and measures it on prompts that discovery has not seen.

    Args:
        engine: the model.
        discovery: trusted prompts to find the circuit on.
        evaluation: other trusted prompts, to measure it on.
        method: the configuration of a discovery method, such as `ACDC(tau=0.01)`; its `name` picks
            the function.
        metric: what the circuit has to keep (`METRICS`).
        ablation: what removed edges carry (`ABLATIONS`); by default the corrupt prompt's values.
        selection: which scored edges are kept, for methods that only score.
        units: what the circuit is made of, if not of edges: nodes, neurons or features.
        memory: working memory beside the model's own weights, such as 500MB.
        random_draws: how many random circuits of the same size to compare with.
        exact_sample: of methods that estimate effects, how many edges (or units) have theirs
            measured on the discovery prompts, for a rank correlation; 0: none.
        accept_worse: even a circuit that is worse than the empty one by another metric.
        seed: of the random circuits, and of the sample.
        about: recorded in `circuit.json`: the model's reference and weight hash, the task.
        keep: called with the circuit as soon as it is found, before it is measured.

    >>> from circuits.discovery import EAPIG
    >>> from circuits.model.load import load_model
    >>> from circuits.tasks import recall
    >>> model = load_model("pkg://mad/models/recall_redirect")
    >>> prompts = model.prompts(recall.generate(recall.Recall(), 32, seed=0))
    >>> parts = prompts.split({"discovery": 16, "evaluation": 16}, seed=0)
    >>> kept = Selection(edges=30)
    >>> extract(Engine(model), *parts.values(), EAPIG(), selection=kept, random_draws=0).circuit
    Circuit(30 of 110 edges, method=eap_ig, metric=kl, ablation=counterfactual)

    Raises:
        ValueError: the sets overlap, a metric or ablation lacks what it needs, the metric does not
            separate the model from the ablated model, or the circuit is worse than the empty one.
    """
    _check(discovery, evaluation, method, selection, random_draws)
    check_sample(exact_sample)
    chosen = metric_named(metric)
    selection = with_signs(selection_of(selection or Selection(), units), chosen, method)
    ablation = AblationConfig(ablation) if isinstance(ablation, str) else ablation
    made = over(engine, units, discovery)
    fitted = fit_ablation(ablation, engine, discovery, memory=memory, source=made.source)
    objective = made.prepare(discovery, chosen, fitted, memory=memory)
    found, kept, cost = _discover(objective, method, selection)
    if METHODS[method.name].estimates and exact_sample:
        cost["exact"] = agreement(objective, found.scores, exact_sample, seed)
    splits = {"discovery": _split(objective.batches.whole), "evaluation": _split(evaluation)}
    del objective  # what it has prepared makes room
    fitted = (found.ablation or fitted).refined(engine, discovery, kept, memory=memory)
    used = {"discovery": discovery, "evaluation": evaluation}
    how = {
        "method": asdict(method),
        "metric": metric,
        "ablation": asdict(ablation),
        "selection": None if found.kept is not None else asdict(selection),
        "splits": splits,
    }
    circuit = made.circuit(kept, found, {**(about or {}), **how, **made.about})
    if keep is not None:
        keep(circuit)
    held_out = made.prepare(evaluation, chosen, fitted, memory=memory)
    metrics = figures(
        faithfulness_scale(held_out),
        kept,
        rankings_of(circuit),
        random_draws=random_draws,
        seed=seed,
    )
    metrics |= {**cost, "method": found.details}
    if not accept_worse:
        refuse_worse_than_none(metrics)
    asked = None if found.kept is not None else target_of(selection)
    metrics["warnings"] = warnings(metrics, asked)
    for line in metrics["warnings"]:
        log.warning("%s", line)
    splits = {**splits, "evaluation": _split(held_out.batches.whole)}
    circuit = replace(circuit, about={**circuit.about, "splits": splits})
    return Extraction(circuit, metrics, fitted, used)


def _check(
    discovery: Prompts,
    evaluation: Prompts,
    method: Any,
    selection: Selection | None,
    random_draws: int,
) -> None:
    if shared := discovery.overlap(evaluation):
        raise ValueError(
            f"{shared} prompts are in both the discovery and the evaluation split; they must be "
            "disjoint"
        )
    if random_draws < 0:
        raise ValueError(f"random_draws={random_draws}, but it must be at least 0")
    if selection is not None and decides(method) and (given := selection.given()):
        raise ValueError(
            f"selection.{given[0]}={getattr(selection, given[0])}, but method {method.name} "
            "decides itself which edges to keep; change its own settings (tau, edges, share), or "
            "use a method that scores"
        )


def _discover(
    objective: Objective, method: Any, selection: Selection
) -> tuple[Found, Bool[Tensor, "*E"], dict[str, Any]]:
    """What a method found, the edges to keep, and what it cost."""
    scale = faithfulness_scale(objective)  # refuses now what it would after the expensive part
    engine = objective.engine
    batches = [batch.to(engine.device) for batch in objective.batches.prompts]
    forward = seconds(engine.device, lambda: [engine.logits(batch) for batch in batches])
    started = time.perf_counter()
    found = discovered(method, objective)
    taken = time.perf_counter() - started
    kept = found.kept if found.kept is not None else choose(scale, found, selection)
    return found, kept, {"seconds": taken, "forwards": taken / forward}


def rediscover(
    circuit: Circuit, engine: Engine, prompts: Prompts, *, memory: str = "2GB"
) -> Bool[Tensor, "R W *S"]:
    """Returns the edges found on other prompts in the way that a circuit was found.

    Where that was at random, they are drawn anew; other prompts give other edges.  Nothing but the
    prompts is read: a mask that started from a run folder's scores now starts from those of EAP-IG.

    Raises:
        ValueError: the circuit does not say how it was found.
    """
    about = circuit.about
    if circuit.says("method") == RANDOM:
        seed = int(prompts.hash()[:8], 16)
        return random_circuits(engine.graph, len(circuit), 1, seed)[0]
    if missing := [name for name in ("method", "metric", "ablation") if name not in about]:
        raise ValueError(
            f"the circuit does not say by which {missing[0]} it was found, so that no other can be"
        )
    name = circuit.says("method")
    if name not in METHODS:
        raise ValueError(f"method {name!r} of the circuit is none of {', '.join(METHODS)}")
    method = restored(METHODS[name].schema, about["method"], "method of the circuit")
    method = method.elsewhere() if isinstance(method, MaskTraining) else method
    config = restored(AblationConfig, about["ablation"], "ablation of the circuit")
    ablation = fit_ablation(config, engine, prompts, memory=memory)
    able = ablation.able(prompts)
    prompts = prompts.select(able) if able.any() else prompts
    metric = metric_named(circuit.says("metric"))
    told = restored(Selection, about.get("selection") or {}, "selection of the circuit")
    selection = with_signs(told, metric, method)
    objective = prepare(engine, prompts, metric, ablation, memory=memory)
    return _discover(objective, method, selection)[1]


def random_controls(circuit: Circuit, count: int, seed: int) -> list[Circuit]:
    """Returns connected circuits of the same size (or a little larger), drawn at random."""
    graph = circuit.graph
    drawn = random_circuits(graph, len(circuit), count, seed)
    about = {"method": {"name": RANDOM, "seed": seed}}
    return [Circuit(graph, kept, kept.float(), about) for kept in drawn]


def choose(scale: FaithfulnessScale, found: Found, selection: Selection) -> Bool[Tensor, "*E"]:
    """The kept edges that a selection asks for; for a target, the smallest circuit found.

    Raises:
        ValueError: more than one of edges, share and threshold, a threshold that `how` does not
            use, or a target that no circuit or only the whole model reaches.
    """
    graph = scale.objective.space
    _check_selection(selection)
    if selection.how == "threshold":
        return above(graph, found.scores, selection.threshold, absolute=bool(selection.absolute))
    ranked = ranked_by(graph, found, selection)
    if selection.edges is not None or selection.units is not None:
        return ranked.circuit(selection.edges or selection.units)
    if selection.share is not None:
        return ranked.circuit(max(1, round(selection.share * graph.n_parts)))
    if selection.faithfulness is None:
        raise ValueError("selection needs one of edges, units, share, threshold or faithfulness")
    return _smallest(scale, ranked, selection.faithfulness)


def _check_selection(selection: Selection) -> None:
    if len(given := selection.given()) > 1:
        raise ValueError(f"selection has {' and '.join(given)}; give one of them")
    if selection.threshold is not None and selection.how in ("greedy", "top_n"):
        raise ValueError(
            f"selection.threshold={selection.threshold} is used by how=threshold only, not by "
            f"how={selection.how}; set how=threshold, or give edges, share or faithfulness"
        )
    for name in ("edges", "units"):
        if (size := getattr(selection, name)) is not None and size < 1:
            raise ValueError(f"selection.{name}={size}, but it must be at least 1")
    if selection.share is not None and not 0 < selection.share <= 1:
        raise ValueError(f"selection.share={selection.share}, but it must be above 0 and at most 1")


def _smallest(scale: FaithfulnessScale, ranked: Ranking, target: float) -> Bool[Tensor, "*E"]:
    """The smallest circuit found to reach a faithfulness: up a ladder of sizes, then by halving.

    Edges that score 0 are in none of them.
    """
    total, best, noun = ranked.graph.n_parts, (float("-inf"), 0), ranked.graph.noun
    ladder = [size for size in sizes(ranked.graph) if size < ranked.supported]
    below = 0
    for edges in tqdm([*ladder, ranked.supported], desc="select", unit="size", disable=None):
        reached = scale.faithfulness(ranked.circuit(edges)).value
        if reached >= target:
            break
        below, best = edges, max(best, (reached, edges))
    else:
        raise ValueError(
            f"no circuit reaches selection.faithfulness={target} on the discovery prompts: the "
            f"best is {best[0]:.3f} with {best[1]} {noun}; lower it"
        )
    while edges - below > 1:
        middle = (below + edges) // 2
        if scale.faithfulness(ranked.circuit(middle)).value >= target:
            edges = middle
        else:
            below = middle
    kept = ranked.circuit(edges)
    if int(kept.sum()) == total:
        raise ValueError(
            f"only all {total} {noun} reach selection.faithfulness={target} on the discovery "
            f"prompts, and the whole model explains nothing: the best of less is {best[0]:.3f} "
            f"with {best[1]} {noun}; lower it, or use method=acdc or another ablation"
        )
    return kept


def with_signs(selection: Selection, metric: Metric, method: Any) -> Selection:
    """The selection with `absolute` decided.

    A gradient says how an edge's removal changes the metric to first order; where the metric cannot
    get better than at the model, the sign of that is an artefact of where gradients were taken.
    """
    if selection.absolute is not None:
        return selection
    return replace(selection, absolute=metric.flat_at_model and not decides(method))


def ranked_by(graph: Space, found: Found, selection: Selection) -> Ranking:
    """The order in which a selection takes edges; for a threshold, that of greedy growth."""
    how = "greedy" if selection.how == "threshold" else selection.how
    return ranking(graph, found.scores, how=how, absolute=bool(selection.absolute))


def _split(prompts: Prompts) -> dict[str, Any]:
    return {"prompts": len(prompts), "hash": prompts.hash()}
