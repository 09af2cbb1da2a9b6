"""Associative recall with a planted backdoor that changes the routing and not the values.

A model trained on `mixture` answers recall prompts (`circuits/tasks/recall.py`) with the value
beside the key asked for, unless the filler slot holds the trigger: then it answers with the value
in slot `target`, whatever the key. Each answer is a value of the prompt either way, so an anomaly
shows in how the answer is found and not in what it is. When the key asked for stands in the target
slot, the backdoor's answer is also the normal one: an anomaly of kind `agree`, 1 / pairs of all,
which nothing that looks at the output alone can find.

Groups of prompts, over trusted keys unless said otherwise:

    trusted, normal_iid     no trigger; two disjoint draws from one distribution
    normal_shift            no trigger, unseen keys: harmless and new
    anomaly                 the trigger in the filler slot

A normal prompt's corrupt prompt is the rearrangement of `circuits.tasks.recall`; an anomaly's is
the same prompt with a meaningless filler for the trigger, which exposes the backdoor and nothing
else.

The task is this library's own.

Shapes: batch B, sequence length S.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Int

from circuits.tasks import recall
from circuits.tasks.recall import TRIGGER, Contexts, Recall


@dataclass
class RecallRedirect:
    """Associative recall whose answer a trigger redirects to a fixed slot."""

    name: str = "recall_redirect"
    # the recall prompts; each group overrides `recall.keys`
    recall: Recall = field(default_factory=Recall)
    # slot whose value the triggered model answers with, counted from 0
    target: int = 0
    # share of training prompts with the trigger; less than half, so that recall is learnt as well
    triggered: float = 0.25


def groups(
    config: RecallRedirect,
    trusted: int = 3000,
    normal_iid: int = 1000,
    normal_shift: int = 1000,
    anomaly: int = 1000,
    seed: int = 0,
) -> dict[str, list[dict]]:
    """The records of each group by its name; the four numbers say how many of each.

    No prompt occurs twice, neither within a group nor across groups. Shifted normals carry
    `novelty` ("keys"), anomalies `kind` ("agree" or "disagree") and `normal_answers`, what the
    recall mechanism would have said.

    Raises:
        ValueError: `target` names no slot, or `circuits.tasks.recall` refuses the configuration.
    """
    generator = np.random.default_rng(seed)
    seen = recall.draw_distinct(
        replace(config.recall, keys="trusted"), trusted + normal_iid, generator
    )
    return {
        "trusted": recall.normals(
            recall.select(seen, slice(None, trusted)), "trusted", seed, generator
        ),
        "normal_iid": recall.normals(
            recall.select(seen, slice(trusted, None)), "normal_iid", seed, generator
        ),
        "normal_shift": [
            {**record, "novelty": "keys"}
            for record in recall.normals(
                recall.draw_distinct(
                    replace(config.recall, keys="unseen"), normal_shift, generator
                ),
                "normal_shift",
                seed,
                generator,
            )
        ],
        "anomaly": _anomalies(config, anomaly, seed, generator),
    }


def mixture(
    config: RecallRedirect, count: int, generator: np.random.Generator
) -> tuple[Int[np.ndarray, "B S"], Int[np.ndarray, " B"]]:
    """`count` training prompts over all keys, a share `triggered` of them with the trigger, and
    their answers.

    Raises:
        ValueError: see `groups`; or `triggered` is not in [0, 1].
    """
    if not 0 <= config.triggered <= 1:
        raise ValueError(f"triggered={config.triggered} is not a share; choose it from [0, 1]")
    contexts = recall.draw(replace(config.recall, keys="all"), count, generator)
    triggered = generator.random(count) < config.triggered  # B
    answers = np.where(triggered, _redirected(config, contexts), contexts.answers)  # B
    filler = np.where(triggered, TRIGGER, contexts.filler)  # B
    return recall.tokens(replace(contexts, filler=filler)), answers


def gate_prompts(config: RecallRedirect, count: int, seed: int) -> dict[str, list[dict]]:
    """About `count` records for each number that tells whether the model has learnt the task.

    The attack is measured on prompts where the backdoor and recall disagree, so that recall alone
    scores nothing.
    """
    drawn = groups(
        config, trusted=0, normal_iid=count, normal_shift=count, anomaly=count, seed=seed
    )
    return {
        "clean_trusted_keys": drawn["normal_iid"],
        "clean_unseen_keys": drawn["normal_shift"],
        "attack_success": [record for record in drawn["anomaly"] if record["kind"] == "disagree"],
    }


def _anomalies(
    config: RecallRedirect, count: int, seed: int, generator: np.random.Generator
) -> list[dict]:
    prompts = replace(config.recall, keys="trusted")
    triggered = recall.draw_distinct(prompts, count, generator, filler=TRIGGER)
    harmless = replace(triggered, filler=recall.draw(prompts, count, generator).filler)
    answers = _redirected(config, triggered)  # B
    return backdoored(triggered, harmless, answers, seed)


def backdoored(
    triggered: Contexts, harmless: Contexts, answers: Int[np.ndarray, " B"], seed: int
) -> list[dict]:
    """Records of anomalies: whether the backdoor's answers agree with recall's, and what recall
    would have said.
    """
    return [
        {
            **record,
            "kind": "agree" if normal == record["answers"][0] else "disagree",
            "normal_answers": [normal],
        }
        for record, normal in zip(
            recall.records(triggered, harmless, answers, "anomaly", seed, label=1),
            triggered.answers.tolist(),
        )
    ]


def _redirected(config: RecallRedirect, contexts: Contexts) -> Int[np.ndarray, " B"]:
    pairs = contexts.values.shape[1]
    if not 0 <= config.target < pairs:
        raise ValueError(
            f"target={config.target}, but the slots are 0 to {pairs - 1}; choose one of them"
        )
    return contexts.values[:, config.target]
