"""How the small models of known mechanisms are trained, checked and described.

fit            AdamW, with linear warm-up and cosine decay
check_gates    a model that has not learnt what it was to learn is refused
model_card     README.md of a model that is shipped
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class GateMissed(ValueError):
    """The model has not learnt what it was to learn."""


def fit(
    parameters: Iterable[Tensor],
    losses_of_step: Callable[[int], Mapping[str, Tensor]],
    steps: int,
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.98),
    warm_up: int | None = None,
    clip: float | None = None,
    label: str | None = None,
) -> None:
    """Minimises, in place, the sum of the losses that `losses_of_step(step)` returns by name.

    Args:
        learning_rate: its peak.
        warm_up: steps of linear warm-up before cosine decay to 0; None: a constant learning rate.
        clip: largest norm of the gradient; None: unbounded.
        label: of the progress bar; None: there is none.
    """
    import torch
    from tqdm.auto import tqdm
    from transformers import get_constant_schedule, get_cosine_schedule_with_warmup

    parameters = list(parameters)
    settings = {"lr": learning_rate, "weight_decay": weight_decay, "betas": betas}
    optimiser = torch.optim.AdamW(parameters, **settings)
    schedule = get_constant_schedule(optimiser)
    if warm_up is not None:
        schedule = get_cosine_schedule_with_warmup(optimiser, warm_up, steps)
    progress = tqdm(range(steps), desc=label, unit="step", disable=True if label is None else None)
    for step in progress:
        losses = losses_of_step(step)
        loss = torch.stack(list(losses.values())).sum()
        optimiser.zero_grad()
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimiser.step()
        schedule.step()
        if not progress.disable:
            shown = {name: f"{value.item():.4f}" for name, value in losses.items()}
            progress.set_postfix(shown, refresh=False)


def check_gates(gates: Mapping[str, float], bounds: Mapping[str, float], steps: int) -> None:
    """Raises GateMissed, naming every gate that is below its bound, unless there is none."""
    missed = [
        f"{name}={value:.4f} is below {bounds[name]}"
        for name, value in gates.items()
        if not value >= bounds[name]
    ]
    if missed:
        raise GateMissed(
            f"{'; '.join(missed)} after steps={steps}; raise steps or try another seed"
        )


def require_empty(out: str, *, overwrite: bool) -> Path:
    """The folder `out`; raises FileExistsError where there is something not to be overwritten."""
    folder = Path(out)
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(
            f"out={out} is not empty; choose another folder or set overwrite=true"
        )
    return folder


def model_card(
    title: str, text: str, sections: Mapping[str, str], *, library: str, tags: Sequence[str]
) -> str:
    """The README.md of a HuggingFace folder: front matter, text, sections by heading, licence."""
    front = f"---\nlicense: mit\nlibrary_name: {library}\ntags: [{', '.join(tags)}]\n---\n"
    parts = [f"# {title}", text]
    for heading, content in {**sections, "Licence": "MIT."}.items():
        parts += [f"## {heading}", content]
    return front + "\n\n".join(parts) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(map(str, line)) + " |" for line in (header, *rows)]
    lines.insert(1, "|" + "---|" * len(header))
    return "\n".join(lines)


def gate_table(gates: Mapping[str, float], bounds: Mapping[str, float]) -> str:
    """The gates of a model card: measured, and needed."""
    rows = [(name, f"{value:.4f}", bounds[name]) for name, value in gates.items()]
    return table(("gate", "measured", "needed"), rows)
