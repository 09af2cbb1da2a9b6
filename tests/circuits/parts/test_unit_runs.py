"""Runs under masks of units: against masks of edges, against hooks on the model's own modules, and
against gradients in the mask.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from circuits.ablation import Ablation, AblationConfig, fit_ablation
from circuits.engine import Engine
from circuits.parts import Divided, UnitsConfig, divide
from circuits.prompts import prompts_from_records
from tests import tiny

ENGINES = {
    "gpt2": Engine(tiny.gpt2()),
    "llama": Engine(tiny.llama()),  # gated, with biases, grouped queries
    "neox": Engine(tiny.huggingface("neox")),  # parallel
    "gemma2": Engine(tiny.huggingface("gemma2")),  # post-norms
    "bidirectional": Engine(tiny.native(attention_dir="bidirectional")),
    "split input": Engine(tiny.gpt2(), split_input=True),
    "attention only": Engine(tiny.native(attn_only=True)),
}
WITH_MLPS = [name for name in ENGINES if name != "attention only"]
PLAIN = [name for name in ENGINES if name != "gemma2"]  # without post-norms
PROMPTS = tiny.prompts(4, seed=2, longest=8)
REFERENCE = tiny.prompts(6, seed=1, longest=9)


def bound(name: str) -> float:
    return 1e-4 if name in ("llama", "gemma2") else 1e-9  # their norms compute in float32


def made(name: str, config: UnitsConfig, ablation: str = "counterfactual") -> tuple:
    """The divided model, and the ablated numbers on the prompts."""
    engine = ENGINES[name]
    divided = divide(engine, config)
    return divided, ablated(divided, ablation).writers(engine, PROMPTS)[0]


def ablated(divided: Divided, name: str) -> Ablation:
    return fit_ablation(AblationConfig(name), divided.engine, REFERENCE, source=divided)


def random_mask(divided: Divided, *leading: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    shape = (*leading, *divided.units.shape)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def close(ours: torch.Tensor, expected: torch.Tensor, atol: float = 1e-9) -> None:
    torch.testing.assert_close(ours, expected, atol=atol, rtol=atol)


# ---- masks of ones and zeros ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ENGINES)
def test_all_kept_is_the_model_and_no_node_kept_is_the_ablated_run(name):
    divided, numbers = made(name, UnitsConfig("nodes"))
    ones = torch.ones(divided.units.shape)
    kept, removed = divided.masked(PROMPTS, torch.stack([ones, 0 * ones]), numbers)
    close(kept, ENGINES[name].logits(PROMPTS))
    close(removed, ENGINES[name].logits(PROMPTS.corrupted()), bound(name))


@pytest.mark.parametrize("ablation", tiny.UNTRAINED)
@pytest.mark.parametrize("name", PLAIN)
def test_a_node_is_removed_as_all_of_its_edges_are(name, ablation):
    engine = ENGINES[name]
    divided, numbers = made(name, UnitsConfig("nodes"), ablation)
    edges = fit_ablation(AblationConfig(ablation), engine, REFERENCE).values(engine, PROMPTS)
    graph = engine.graph
    inputs = [writer for writer in graph.writers if writer.startswith("input")]
    columns = {"input": inputs, **{one: [one] for one in graph.writers[len(inputs) :]}}
    assert [divided.units.part_name(unit) for unit in range(divided.units.n_units)] == [*columns]
    for unit, written in enumerate(columns.values()):
        mask = torch.ones(divided.units.shape)
        mask[unit] = 0.25
        of_edges = torch.ones(graph.exists.shape)
        of_edges[:, [graph.writer_index[writer] for writer in written]] = 0.25
        ours = divided.masked(PROMPTS, mask, numbers)
        theirs = engine.masked(PROMPTS, of_edges, edges)
        real = PROMPTS.positions >= 0  # elsewhere runs give some position or other
        close(ours[real], theirs[real], bound(name))


@pytest.mark.parametrize("ablation", tiny.UNTRAINED)
@pytest.mark.parametrize("name", [name for name in PLAIN if name in WITH_MLPS])
def test_an_mlp_without_neurons_writes_what_it_does_in_the_ablation(name, ablation):
    engine = ENGINES[name]
    divided, numbers = made(name, UnitsConfig("neurons", layers=[1]), ablation)
    mask = torch.zeros(divided.units.shape)
    nodes, of_nodes = made(name, UnitsConfig("nodes"), ablation)
    mlp = torch.ones(nodes.units.shape)
    mlp[nodes.units.index("m1")] = 0
    if ablation == "zero":  # no neuron is active, but what their projection adds stays
        bias = engine.architecture.blocks[1].mlp.down.bias
        of_nodes = of_nodes.expand(len(PROMPTS), PROMPTS.clean.shape[1], -1).clone()
        of_nodes[..., -engine.architecture.width :] = 0.0 if bias is None else bias
    close(
        divided.masked(PROMPTS, mask, numbers),
        nodes.masked(PROMPTS, mlp, of_nodes),
        bound(name),
    )


# ---- masks in between, against hooks -------------------------------------------------------------


def through_modules(engine: Engine, tokens: torch.Tensor, at: dict) -> torch.Tensor:
    """The bridge's logits where what some modules read is changed: {module: input -> input}."""
    handles = [
        module.register_forward_pre_hook(lambda _, args, change=change: (change(args[0]),))
        for module, change in at.items()
    ]
    try:
        return engine.model.bridge(tokens)
    finally:
        for handle in handles:
            handle.remove()


def projections(engine: Engine, kind: str) -> list:
    """What reads the neurons, or what heads have moved, of each block."""
    blocks = engine.architecture.blocks
    return [block.mlp.down.module if kind == "m" else block.attention.o.module for block in blocks]


@pytest.mark.parametrize("kind", ["neurons", "nodes"])
@pytest.mark.parametrize("name", [name for name in WITH_MLPS if name != "split input"])
def test_masked_runs_are_those_with_changed_projections(name, kind):
    engine = ENGINES[name]
    if kind == "neurons":
        divided, numbers = made(name, UnitsConfig("neurons"))
        modules, width = projections(engine, "m"), 1
    else:
        divided, numbers = made(name, UnitsConfig("nodes"))
        modules, width = projections(engine, "a"), engine.architecture.head_width
    mask = random_mask(divided)
    shares = {}
    for site, span in divided.units.spans():
        if site.kind in ("heads", "neurons"):
            shares[modules[site.layer]] = mask[span].repeat_interleave(width)
        else:
            mask[span] = 1
    ours = divided.masked(PROMPTS, mask, numbers)
    for row, length in enumerate(PROMPTS.lengths.tolist()):
        corrupt, seen = PROMPTS.corrupt[row, None, :length], {}
        keep = {one: partial(seen.setdefault, one) for one in shares}
        through_modules(engine, corrupt, keep)
        mixed = {one: partial(torch.lerp, seen[one], weight=share) for one, share in shares.items()}
        theirs = through_modules(engine, PROMPTS.clean[row, None, :length], mixed)[0]
        positions = PROMPTS.positions[row]
        real = positions >= 0
        close(ours[row, real], theirs[positions[real]], bound(name))


@pytest.mark.parametrize("config", [UnitsConfig("nodes"), UnitsConfig("neurons", nodes=True)])
def test_several_masks_at_once_and_one_for_each_prompt(config):
    divided, numbers = made("gpt2", config)
    masks = random_mask(divided, len(PROMPTS))
    together = divided.masked(PROMPTS, masks, numbers)
    for row, mask in enumerate(masks):
        close(together[row], divided.masked(PROMPTS, mask, numbers))
    own = divided.masked(PROMPTS, masks, numbers, per_example=True)
    rows = torch.arange(len(PROMPTS))
    close(own, together[rows, rows])


def test_units_by_position():
    records = tiny.records(5, seed=4, shortest=6, longest=6)
    prompts = prompts_from_records(records)
    engine = Engine(tiny.gpt2(), n_positions=6)
    divided, plain = (
        divide(engine, UnitsConfig("neurons")),
        divide(ENGINES["gpt2"], UnitsConfig("neurons")),
    )
    assert divided.units.part_name(2, 5) == "m0.n2@5"
    numbers = fit_ablation(AblationConfig("counterfactual"), engine, prompts, source=divided)
    numbers = numbers.writers(engine, prompts)[0]
    mask = random_mask(plain)
    everywhere = mask[:, None].expand(divided.units.shape)
    close(divided.masked(prompts, everywhere, numbers), plain.masked(prompts, mask, numbers))
    # What happens at the last position alone is nothing to the ones before.
    last = torch.ones(divided.units.shape)
    last[:, -1] = 0
    changed = divided.masked(prompts, last, numbers) - engine.logits(prompts)
    before = prompts.positions < 5
    assert changed[~before & (prompts.positions >= 0)].abs().max() > 0.01
    assert changed[before & (prompts.positions >= 0)].abs().max() < 1e-12


# ---- gradients -----------------------------------------------------------------------------------


BOTH = [(name, "nodes") for name in ENGINES] + [(name, "neurons") for name in WITH_MLPS]


@pytest.mark.parametrize(("name", "kind"), BOTH)
def test_gradients_in_the_numbers_are_those_in_the_mask(name, kind):
    divided, numbers = made(name, UnitsConfig(kind))
    engine = ENGINES[name]
    weights = torch.randn(engine.logits(PROMPTS).shape, dtype=torch.float64)

    def scalar(logits: torch.Tensor) -> torch.Tensor:
        return (logits * weights).sum()

    mask = torch.ones(divided.units.shape, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(scalar(divided.masked(PROMPTS, mask, numbers)), mask)
    embedded = engine.embed(PROMPTS).sum(0)
    products = divided.gradients(PROMPTS, embedded, scalar)
    products = products * (divided.read(engine, PROMPTS)[0] - numbers)
    close(divided.gathered(products).sum((0, 1)), expected)
    # And both are what a small step in the mask changes.
    step = 1e-5
    for unit in range(0, divided.units.n_units, 7):
        ends = mask.detach().repeat(2, 1)
        ends[:, unit] += torch.tensor([-step, step])
        low, high = (scalar(run) for run in divided.masked(PROMPTS, ends, numbers))
        slope = (high - low) / (2 * step)
        if name not in ("llama", "gemma2"):
            close(slope, expected[unit], 1e-5)


def test_runs_start_from_a_given_embedding_and_are_differentiable_in_it():
    divided, numbers = made("gpt2", UnitsConfig("nodes"))
    mask = random_mask(divided)
    start = ENGINES["gpt2"].embed(PROMPTS).sum(0)
    close(
        divided.masked(PROMPTS, mask, numbers, embedded=start),
        divided.masked(PROMPTS, mask, numbers),
    )
    start = (start + 0.3).requires_grad_()
    (gradient,) = torch.autograd.grad(
        divided.masked(PROMPTS, mask, numbers, embedded=start).sum(), start
    )
    assert gradient.abs().max() > 0


# ---- what is refused -----------------------------------------------------------------------------


def test_masks_of_another_shape_are_refused():
    divided, numbers = made("gpt2", UnitsConfig("nodes"))
    with pytest.raises(ValueError, match=r"mask of shape \(3,\), but there are 9 units"):
        divided.masked(PROMPTS, torch.ones(3), numbers)
    with pytest.raises(ValueError, match="per_example needs one mask per prompt"):
        divided.masked(PROMPTS, torch.ones(2, 9), numbers, per_example=True)


REFUSED = {
    "units='features '": UnitsConfig("features "),
    "units=features needs units.dictionaries": UnitsConfig("features"),
    "units.dictionaries are for units=features": UnitsConfig("nodes", dictionaries=["x"]),
    "units.layers has 2, but the model's blocks are 0 to 1": UnitsConfig("neurons", layers=[2]),
    "units.layers has -1": UnitsConfig("nodes", layers=[-1]),
    r"units.layers=\[\] leaves no unit": UnitsConfig("nodes", layers=[]),
    "units.nodes is for units=neurons": UnitsConfig("nodes", nodes=True),
    "units=edges is no division": UnitsConfig("edges"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_do_not_fit_are_refused(message):
    with pytest.raises(ValueError, match=message):
        divide(ENGINES["gpt2"], REFUSED[message])


def test_a_model_without_mlps_has_no_neurons():
    with pytest.raises(ValueError, match="the model has no MLPs; use units=nodes"):
        divide(ENGINES["attention only"], UnitsConfig("neurons"))
