"""The roles of SmolLM2's heads in docs/smollm2.md, and the picture of the circuit that shows them.

Run: python figures/smollm2_heads.py          (a quarter of an hour on two cores)

    name mover        looks from END to IO; its edge to the logits raises the logit difference
    negative mover    the same, but its edge lowers it
    S-suppression     looks from END to S2; its edge to the logits raises the logit difference
    S-inhibition      looks from END to S2; raises it through the queries of the name movers
    duplicate token   looks from S2 to S1; raises it in all
    induction         looks from S2 to S1 + 1; raises it in all
    previous token    looks from each token to the one before; raises it in all

IO and S are the names, S1 and S2 where S stands, END the last token (Wang et al. 2022, arXiv
2211.00593).  An effect is the model's logit difference less that without some edges, which carry
the corrupt prompt's values.  A head has a role where both attention and effect pass a bound.  What
is measured is kept in runs/smollm2; the picture needs the circuit that figures/smollm2.py finds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from smollm2 import MEMORY, OUT, Search, Subject, found, ranked
from torch import Tensor

from circuits.engine import Engine
from circuits.model.attention import attention_scores
from circuits.names import parse_node, reader_name
from circuits.objective import Objective
from circuits.plot import draw_circuit
from circuits.prompts import Prompts
from mad.benchmark.tables import markdown_table

ATTENTION, EFFECT = 0.3, 0.05  # bounds: mean attention, and effect in logits
PROMPTS, AT_ONCE = 32, 16  # held-out prompts, and how many have their attention held at once
DRAWN = 120  # edges of the picture


@dataclass(frozen=True)
class Role:
    """What a head is called where it looks somewhere and does something."""

    name: str
    place: str
    through: str  # of `Head.effects`
    sign: int = 1


ROLES = (
    Role("name mover", "END to IO", "logits"),
    Role("negative mover", "END to IO", "logits", -1),
    Role("S-suppression", "END to S2", "logits"),
    Role("S-inhibition", "END to S2", "queries"),
    Role("duplicate token", "S2 to S1", "all"),
    Role("induction", "S2 to S1 + 1", "all"),
    Role("previous token", "the token before", "all"),
)


@dataclass
class Head:
    """Where a head looks, and its effects, each with its standard error over prompts."""

    attention: dict[str, float]
    effects: dict[str, tuple[float, float]] = field(default_factory=dict)
    on_names: tuple[float, float] | None = None  # what its edge to the logits adds to IO and S

    def role(self) -> Role | None:
        """Of `ROLES` that it has, the one in which it does most."""
        has = [role for role in ROLES if self.looks(role) and self.acts(role)]
        return max(has, key=lambda role: abs(self.effects[role.through][0]), default=None)

    def looks(self, role: Role) -> bool:
        return self.attention[role.place] >= ATTENTION

    def acts(self, role: Role) -> bool:
        effect, error = self.effects.get(role.through, (0.0, 0.0))
        return role.sign * effect >= max(EFFECT, 2 * error)


# ---- attention -----------------------------------------------------------------------------------


def attention(engine: Engine, prompts: Prompts) -> dict[str, Float[Tensor, "L H"]]:
    """How much each head attends from one place to another, on average."""
    parts = [_attention(engine, part) for part in prompts.batches(AT_ONCE)]
    return {place: torch.cat([part[place] for part in parts]).mean(0) for place in parts[0]}


def _attention(engine: Engine, prompts: Prompts) -> dict[str, Float[Tensor, "B L H"]]:
    assert prompts.answers is not None and prompts.wrong_answers is not None
    tokens, rows, end = prompts.clean, torch.arange(len(prompts)), prompts.positions[:, 0]
    (io,) = _places(tokens == prompts.answers[:, 0])
    s1, s2 = _places(tokens == prompts.wrong_answers[:, 0])
    everywhere = torch.arange(tokens.shape[1]).expand_as(tokens)
    blocks, sides = engine.architecture.blocks, engine.clean(prompts, sides=True).sides
    patterns = torch.stack(
        [
            attention_scores(
                engine.architecture, block.attention, *own, prompts.key_mask, at=everywhere
            ).softmax(-1)
            for block, own in zip(blocks, sides, strict=True)
        ]
    ).movedim(2, 0)  # B L H S S
    before = patterns.diagonal(-1, -2, -1) * prompts.key_mask[:, None, None, 1:]
    pairs = {
        "END to IO": (end, io),
        "END to S1": (end, s1),
        "END to S2": (end, s2),
        "END to itself": (end, end),
        "END to the first token": (end, 0 * end),
        "S2 to S1": (s2, s1),
        "S2 to S1 + 1": (s2, s1 + 1),
    }
    looks = {name: patterns[rows, :, :, one, other] for name, (one, other) in pairs.items()}
    return looks | {"the token before": before.sum(-1) / (prompts.lengths - 1)[:, None, None]}


def _places(found: Bool[Tensor, "B S"]) -> Tensor:
    """Where each row is True, as often as all rows are, one after the other."""
    return found.nonzero()[:, 1].view(len(found), -1).T


# ---- effects -------------------------------------------------------------------------------------


class Effects:
    """What edges do for a metric: the model less it without them, per prompt."""

    def __init__(self, objective: Objective) -> None:
        self.objective, self.graph = objective, objective.engine.graph
        self.model = objective.full()

    def edges(self, heads: Sequence[str], readers: Sequence[str] = ()) -> Bool[Tensor, "R W"]:
        """The edges from some heads to some readers; to all where none is named."""
        removed = torch.zeros_like(self.graph.exists)
        rows = [self.graph.reader_index[reader] for reader in readers or self.graph.readers]
        columns = [self.graph.writer_index[head] for head in heads]
        removed[torch.tensor(rows)[:, None], torch.tensor(columns)] = True
        return removed & self.graph.exists

    def without(self, removed: Sequence[Bool[Tensor, "R W"]]) -> Float[Tensor, "K N"]:
        """The effect of each set of edges."""
        masks = torch.stack([self.graph.exists & ~edges for edges in removed])
        readers = torch.stack([*removed]).any(0).any(-1).nonzero()[0].item()
        blocks = range(self.graph.n_layers + 1)
        first = max(block for block in blocks if self.graph.first_reader(block) <= readers)
        return self.model - self.objective.measure(masks, first_layer=first)

    def of_each(self, heads: Sequence[str], readers: Sequence[str] = ()) -> dict[str, Tensor]:
        """The effect of each head; heads of one layer are run at once."""
        effects = {}
        for _, group in groupby(heads, key=_layer):
            own = list(group)
            values = self.without([self.edges([head], readers) for head in own])
            effects |= dict(zip(own, values, strict=True))
        return effects


def on_names(effects: Effects, heads: Sequence[str]) -> dict[str, tuple[float, float]]:
    """What each head's edge to the logits adds to those of IO and S, less that to all tokens."""
    objective = effects.objective
    masks = torch.stack([effects.graph.exists & ~effects.edges([h], ["logits"]) for h in heads])
    added = []
    for batch in objective.batches:
        runs = objective.logits(batch, masks, effects.graph.n_layers)
        each = (batch.clean.logits - runs)[:, :, 0]  # heads B V
        each = each - each.mean(-1, keepdim=True)
        tokens = torch.cat((batch.prompts.answers, batch.prompts.wrong_answers), -1)[:, 0]
        added.append(each.gather(-1, tokens.expand(len(heads), -1, -1)))
    io, s = torch.cat(added, 1).mean(1).T.tolist()
    return dict(zip(heads, zip(io, s)))


def _layer(head: str) -> int:
    return parse_node(head).layer


def measured() -> tuple[dict[str, Head], dict[str, list[float]]]:
    """All heads in forward order, and what is left where several are taken away."""
    file = OUT / "heads.json"
    if file.exists():
        data = json.loads(file.read_text())
        return {name: Head(**head) for name, head in data["heads"].items()}, data["left"]
    subject = Subject()
    graph, prompts = subject.engine.graph, subject.prompts["evaluation"].select(slice(PROMPTS))
    effects = Effects(subject.objective(prompts, "logit_diff", "counterfactual", memory=MEMORY))
    names = [name for name in graph.writers if name.startswith("a")]
    looks = {
        place: values.flatten() for place, values in attention(subject.engine, prompts).items()
    }
    heads = {
        name: Head({place: values[place_of].item() for place, values in looks.items()})
        for place_of, name in enumerate(names)
    }

    def note(through: str, values: Mapping[str, Tensor]) -> None:
        for name, each in values.items():
            error = each.std().item() / len(each) ** 0.5
            heads[name].effects[through] = (each.mean().item(), error)

    note(
        "logits", dict(zip(names, effects.without([effects.edges([n], ["logits"]) for n in names])))
    )
    acting = [name for name in names if abs(heads[name].effects["logits"][0]) >= EFFECT]
    for name, pair in on_names(effects, acting).items():
        heads[name].on_names = pair
    movers = [name for name in names if getattr(heads[name].role(), "name", "") == "name mover"]
    looking = [name for name in names if any(heads[name].looks(role) for role in ROLES)]
    last = max(map(_layer, movers))
    queries = [reader_name(mover, "q") for mover in movers]
    note("queries", effects.of_each([name for name in looking if _layer(name) < last], queries))
    note("all", effects.of_each(looking))
    left = {"the model": effects.model}
    for label, removed in _together(effects, movers, heads).items():
        left[label] = effects.model - effects.without([removed])[0]
    told = {label: [v.mean().item(), (v > 0).float().mean().item()] for label, v in left.items()}
    data = {"heads": {name: asdict(head) for name, head in heads.items()}, "left": told}
    file.write_text(json.dumps(data, indent=1))
    return heads, told


def _together(
    effects: Effects, movers: Sequence[str], heads: Mapping[str, Head]
) -> dict[str, Bool[Tensor, "R W"]]:
    """Edges of several heads that are taken away at once."""
    suppressing = [
        name for name, head in heads.items() if head.looks(ROLES[2]) and head.acts(ROLES[2])
    ]
    return {
        "without the name movers' edges to the logits": effects.edges(movers, ["logits"]),
        "without the name movers": effects.edges(movers),
        "without S-suppression's edge to the logits": effects.edges(suppressing, ["logits"]),
        "without either's edges to the logits": effects.edges([*movers, *suppressing], ["logits"]),
        "without either": effects.edges([*movers, *suppressing]),
    }


# ---- what is told --------------------------------------------------------------------------------


def tables(heads: Mapping[str, Head], left: Mapping[str, Sequence[float]]) -> str:
    """Heads by role; those that only look or only act; what is left without several."""
    rows, only_look = [], []
    for role in ROLES:
        for name, head in _strongest(heads, role):
            effect, error = head.effects[role.through]
            own = head.role() is role
            line = (
                role.name,
                name,
                f"{head.attention[role.place]:.2f}",
                f"{effect:+.2f}±{error:.2f}",
            )
            if own:
                rows.append(line)
            elif head.role() is None and role.sign > 0:
                only_look.append(line)
    at_logits = [
        (
            name,
            getattr(head.role(), "name", ""),
            *(f"{value:+.2f}" for value in (head.effects["logits"][0], *head.on_names)),
            *most_of_end(head),
        )
        for name, head in heads.items()
        if head.on_names is not None
    ]
    ends = [(label, f"{mean:.2f}", f"{above:.2f}") for label, (mean, above) in left.items()]
    headers = ("role", "head", "attention", "effect")
    return "\n\n".join(
        [
            markdown_table(headers, rows),
            "Look, but do nothing:\n\n" + markdown_table(headers, only_look),
            markdown_table(
                ("head", "role", "logit difference", "IO", "S", "END looks", "by"), at_logits
            ),
            markdown_table(("", "logit difference", "IO above S"), ends),
        ]
    )


def _strongest(heads: Mapping[str, Head], role: Role) -> list[tuple[str, Head]]:
    """The heads that look where a role does and whose effect was measured, the strongest first."""
    own = [(n, h) for n, h in heads.items() if h.looks(role) and role.through in h.effects]
    return sorted(own, key=lambda pair: -role.sign * pair[1].effects[role.through][0])


def most_of_end(head: Head) -> tuple[str, str]:
    """Where END looks most."""
    places = {name: value for name, value in head.attention.items() if name.startswith("END")}
    place = max(places, key=lambda name: places[name])
    return place.removeprefix("END "), f"{places[place]:.2f}"


def main() -> None:
    """Measures, writes the tables, and draws."""
    heads, left = measured()
    text = tables(heads, left)
    (OUT / "heads.md").write_text(text + "\n")
    print(text)
    search = Search("eap_ig", "logit_diff")  # whose signs say which way an edge works
    whole = found(search)
    kept = ranked(search, whole.graph, whole.scores).circuit(DRAWN)
    circuit = replace(whole, kept=kept)
    draw_circuit(
        circuit.edges,
        Path(__file__).parent,
        "smollm2_ioi",
        formats=["png"],
        title="Indirect objects in SmolLM2-135M",
        caption=f"the first {len(circuit)} of {circuit.graph.n_edges} edges by EAP-IG "
        "(logit difference, counterfactual ablation)",
        kv_group=circuit.graph.kv_group,
        groups={
            name: role.name for role in ROLES for name, head in heads.items() if head.role() is role
        },
    )


if __name__ == "__main__":
    main()
