"""What a removed edge carries instead of its writer's value.

    zero              nothing
    mean              the writer's mean over positions of a reference set; position 0 keeps its own
                      mean, because attention sinks live there
    positional_mean   the mean at each position
    counterfactual    the writer's value on the prompt's own corrupt twin
    resample          the writer's value on another prompt of the reference set, drawn at random
    optimal           a constant, trained so that circuits are as near to the model as can be

Means leave padding out.  Fit once on a reference set, then ask for the values on each batch.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from circuits.ablation.ablation import Ablation, AblationConfig, able_prompts
from circuits.ablation.means import Mean, PositionalMean
from circuits.ablation.optimal import Optimal
from circuits.ablation.runs import Counterfactual, Resample
from circuits.ablation.source import WRITERS, Source
from circuits.ablation.zero import Zero
from circuits.engine.engine import Engine
from circuits.prompts.prompts import Prompts

ABLATIONS: dict[str, type[Ablation]] = {
    kind.name: kind for kind in (Zero, Mean, PositionalMean, Counterfactual, Resample, Optimal)
}

__all__ = [
    "ABLATIONS",
    "Ablation",
    "AblationConfig",
    "able_prompts",
    "fit_ablation",
    "restore_ablation",
]


def fit_ablation(
    config: AblationConfig,
    engine: Engine,
    reference: Prompts,
    *,
    memory: str = "2GB",
    source: Source = WRITERS,
) -> Ablation:
    """Returns an ablation fitted on reference prompts; by default of what writers write.

    Raises:
        ValueError: there is none such, or none for such a source.
    """
    kind = _kind(config.name)
    if source is not WRITERS and not kind.any_source:
        able = ", ".join(name for name, other in ABLATIONS.items() if other.any_source)
        raise ValueError(
            f"ablation={config.name} has values for edges only; use units=edges, or ablation={able}"
        )
    return kind.fit(engine, reference, config, memory=memory, source=source)


def restore_ablation(name: str, engine: Engine, state: Mapping[str, Tensor]) -> Ablation:
    """Returns an ablation from its `state`; ValueError where there is none, or it keeps none."""
    return _kind(name).restore(engine, state)


def _kind(name: str) -> type[Ablation]:
    if name not in ABLATIONS:
        raise ValueError(f"ablation={name!r}, but the ablations are {', '.join(ABLATIONS)}")
    return ABLATIONS[name]
