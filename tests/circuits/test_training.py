"""The training loop against the same steps by hand; gates, and the card of a model."""

from __future__ import annotations

import pytest
import torch

from circuits.training import GateMissed, check_gates, fit, gate_table, model_card, require_empty

TARGET = torch.tensor([1.0, -2.0, 3.0])


def by_hand(steps: int, warm_up: int | None, clip: float | None) -> torch.Tensor:
    """Warm-up, then half a cosine, written out."""
    weights = torch.zeros(3, requires_grad=True)
    optimiser = torch.optim.AdamW([weights], lr=0.1, weight_decay=0.01, betas=(0.9, 0.98))
    for step in range(steps):
        rate = 1.0
        if warm_up is not None:
            done = torch.tensor((step - warm_up) / (steps - warm_up))
            rate = step / warm_up if step < warm_up else (1 + torch.cos(torch.pi * done)).item() / 2
        optimiser.param_groups[0]["lr"] = 0.1 * rate
        optimiser.zero_grad()
        ((weights - TARGET) ** 2).sum().backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([weights], clip)
        optimiser.step()
    return weights.detach()


@pytest.mark.parametrize(("warm_up", "clip"), [(3, 1.0), (None, None), (None, 0.5), (2, None)])
def test_fit_takes_the_steps_that_it_says(warm_up, clip):
    weights, seen = torch.zeros(3, requires_grad=True), []

    def losses(step: int) -> dict[str, torch.Tensor]:
        seen.append(step)
        errors = (weights - TARGET) ** 2
        return {"first": errors[0], "others": errors[1:].sum()}

    fit([weights], losses, 10, learning_rate=0.1, weight_decay=0.01, warm_up=warm_up, clip=clip)
    assert seen == list(range(10))
    torch.testing.assert_close(weights.detach(), by_hand(10, warm_up, clip))


def test_every_missed_gate_is_named():
    bounds = {"accuracy": 0.9, "effect": 0.1}
    check_gates({"accuracy": 0.9, "effect": 0.1}, bounds, 5)
    message = "accuracy=0.8999 is below 0.9; effect=nan is below 0.1 after steps=5; raise steps"
    with pytest.raises(GateMissed, match=message):
        check_gates({"accuracy": 0.8999, "effect": float("nan")}, bounds, 5)


def test_a_card_has_front_matter_sections_and_a_licence():
    gates = gate_table({"accuracy": 0.99}, {"accuracy": 0.9})
    card = model_card("name: what", "Text.", {"Reached": gates}, library="lib", tags=["a", "b"])
    assert card.split("\n") == [
        *("---", "license: mit", "library_name: lib", "tags: [a, b]", "---"),
        *("# name: what", "", "Text.", "", "## Reached", ""),
        *("| gate | measured | needed |", "|---|---|---|", "| accuracy | 0.9900 | 0.9 |", ""),
        *("## Licence", "", "MIT.", ""),
    ]


def test_a_used_folder_is_refused_unless_it_may_be_overwritten(tmp_path):
    assert require_empty(str(tmp_path), overwrite=False) == tmp_path
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is not empty; choose another folder or set overwr"):
        require_empty(str(tmp_path), overwrite=False)
    assert require_empty(str(tmp_path), overwrite=True) == tmp_path
