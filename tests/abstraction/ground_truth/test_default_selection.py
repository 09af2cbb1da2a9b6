"""What attribution keeps by default where the right answer is known: never all, nothing dead."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from abstraction.ground_truth.programs import PROGRAMS
from abstraction.ground_truth.scoreboard import VARIANTS, cases, subject
from circuits.discovery import METHODS, default_metric
from circuits.discovery.masks.settings import MaskTraining
from circuits.engine import Engine
from circuits.extraction import choose, with_signs
from circuits.faithfulness import faithfulness_scale
from circuits.metrics import metric_named
from circuits.selection import Selection

ABLATIONS = ("zero", "mean", "positional_mean", "counterfactual", "resample")
SCORES = tuple(
    name
    for name, method in METHODS.items()
    if not method.decides and not issubclass(method.schema, MaskTraining)
)


def out_of_silent_heads(engine: Engine) -> torch.Tensor:
    """The edges out of heads whose output weights are all zero."""
    graph = engine.graph
    edges = torch.zeros_like(graph.exists)
    for layer, block in enumerate(engine.architecture.blocks):
        weight = engine.architecture.output_weight(block.attention)
        for head in range(graph.n_heads):
            if not weight[head].any():
                edges[:, graph.first_writer(layer) + head] = True
    return edges & graph.exists


def keeps_some_but_no_dead_edge(
    program: str, variant: str, ablation: str, count: int, methods=METHODS
) -> bool:
    """Whether a circuit was found; each that is found is looked at."""
    objective, truth = subject(program, variant, ablation, count, 0)
    silent, found_one = out_of_silent_heads(objective.engine), False
    for name in methods:
        method = METHODS[name]
        if method.decides:
            continue
        quick = {"steps": 80} if issubclass(method.schema, MaskTraining) else {}
        config, metric = method.schema(**quick), metric_named(default_metric(name))
        ours = replace(objective, metric=metric)
        found = method.run(config, ours)
        try:
            scale = faithfulness_scale(ours)
            kept = choose(scale, found, with_signs(Selection(), metric, config))
        except ValueError as error:
            assert "reach" in str(error), error
            continue
        found_one = True
        assert 0 < kept.sum() < objective.engine.graph.n_edges
        assert not (kept & silent).any() and not (kept & (found.scores == 0)).any()
        assert scale.faithfulness(kept).value >= 0.9
        assert (kept & truth).sum() >= 0.5 * truth.sum()
    return found_one


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_default_selection_keeps_no_dead_edge_and_not_the_whole_model(ablation):
    assert keeps_some_but_no_dead_edge("recall", "rotated", ablation, 16, SCORES)


def test_there_are_silent_heads():
    objective, _ = subject("sensors", "plain", "zero", 4, 0)
    assert out_of_silent_heads(objective.engine).any()


@pytest.mark.slow
@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize(("program", "variant"), cases(tuple(PROGRAMS), VARIANTS))
def test_on_every_model_default_selection_keeps_no_dead_edge(program, variant, ablation):
    keeps_some_but_no_dead_edge(program, variant, ablation, 64)
