"""How many bytes the engine's work takes, and so how many prompts and masks fit in a budget.

The budget, `memory="2GB"`, is working memory beside the model's own weights.  Bytes that a prompt
takes, with e bytes an element:

    plain run          e S block + logits
    clean run          e S (W D + block) + logits
    prepared           e S (2 W D + (2 L + 1) D) + logits      if prompts have own ablated values
    under K masks      K (e S (W D + max(3 r D, r D + heads, block)) + logits), and the masks
    incremental        e (S W D + P (2 W D + (2 L + 1) D)) + logits       of a circuit; of K that
                       lack some of its edges as under K masks, and e S (W D + r D) for all
    observed run       prepared + e S L sides + under a mask + scores;
                       at least clean run + e S L (sides + 3 D)
    attribution        e S (W D + 1.5 (L graph + max(5 r D, 4 H S))) + logits with their graph
    explanation        1.5 e S (3 W D + L (r D + graph) + 2 r D) + logits with their graph,
                       and its mask
    training           explanation + prepared + gates; and the parameters of the mask
    donor              clean run + e S (2 L + 1) D, of a prompt whose values other prompts are given
    placed             e S (heads + 1) D + logits, of a prompt that is given them

`block` is what one block holds for a moment, `sides` its queries, keys and values, `graph` what its
backward pass needs.  Every edge counts as kept and every prompt as long as the longest one, so that
these are upper bounds.  The factor 1.5 is for what a CPU's allocator cannot use again because it is
freed in another order than it was taken. `tests/circuits/engine/test_memory.py` compares with
measured peaks.

Shapes: pos S, d_model D, writers W, readers r of one block's attention, its query heads H, layers
L, candidate masks K, scored positions P, vocabulary V.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from circuits.prompts.errors import InputError

if TYPE_CHECKING:
    from circuits.engine import Engine
    from circuits.prompts import Prompts

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
MOST_PROMPTS = 64  # of one batch, however large the budget
GATES = 12  # numbers of 4 bytes that drawing a mask's gates holds for each of its entries
HOLES = 1.5  # what backward passes take of the machine, as a multiple of what they hold


def parse_memory(memory: str) -> int:
    """Returns a number of bytes; units are decimal.

    >>> parse_memory("1.5GB")
    1500000000

    Raises:
        ValueError: it is no number with one of the units, or it is 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B|)", memory.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(
            f"memory={memory!r} is no number of bytes, kB, MB or GB; give one such as memory=2GB"
        )
    size = round(float(match[1]) * UNITS[match[2].upper()])
    if size < 1:
        raise ValueError(f"memory={memory!r}, but it must be above 0; give one such as memory=2GB")
    return size


def written(size: int) -> str:
    """A number of bytes as `parse_memory` reads it, rounded up.

    >>> written(1_234_567_890)
    '1.24GB'
    """
    unit = next((unit for unit in ("GB", "MB", "KB") if size >= UNITS[unit]), "")
    hundredths = -(-100 * size // UNITS[unit])
    return f"{hundredths / 100:.10g}{unit.replace('K', 'k')}"


class TooLittleMemory(InputError):
    """Not even one prompt fits in the budget."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that work on one prompt takes at most, beside the weights."""

    element: int  # bytes
    tokens: int  # S
    scored: int  # P
    width: int  # D
    writers: int  # W
    readers: int  # r
    query_heads: int  # of one layer
    sides: int  # numbers at a token that a layer's queries, keys and values are
    layers: int  # L
    heads: int  # numbers that attention holds at a token for a moment
    hidden: int  # that an MLP does
    graph: int  # numbers at a token that the backward pass of a block needs
    vocabulary: int  # V
    capped: bool  # logits pass through tanh
    unread: int  # numbers at a token that post-norms add to the ablated values
    edges: int  # entries of one mask, in the shape of `Graph.exists`

    @property
    def _block(self) -> float:
        return HOLES * (5 * self.width + max(self.heads, self.hidden))

    @property
    def _levels(self) -> int:
        return (2 * self.layers + 1) * self.width + self.unread

    @property
    def _logits(self) -> int:
        return self.element * self.scored * self.vocabulary * (3 if self.capped else 1)

    @property
    def _metric(self) -> int:
        """What a metric makes of logits, in float32 at least."""
        return 4 * max(self.element, 4) * self.scored * self.vocabulary

    def _bytes(self, per_token: float) -> int:
        return int(self.element * self.tokens * per_token)

    @property
    def logits(self) -> int:
        """Logits at the scored positions, with no work on them."""
        return self.element * self.scored * self.vocabulary

    @property
    def node(self) -> int:
        """One node on an input of its own, and a metric of the logits."""
        return self._bytes(self._block) + self._logits + self._metric

    @property
    def plain(self) -> int:
        """A run of which only logits are kept, and a metric of them."""
        return self._bytes(self._block) + self._logits + self._metric

    @property
    def clean(self) -> int:
        """A run that keeps what every writer wrote."""
        return self._bytes(self.writers * self.width + self._block) + self._logits

    def prepared(self, ablated_per_prompt: bool) -> int:
        """What a prompt's clean run and its ablated values hold on to."""
        values = self.writers * self.width * (2 if ablated_per_prompt else 1)
        levels = self._levels if ablated_per_prompt else 0
        return self._bytes(values + levels) + self.element * self.scored * self.vocabulary

    def shared(self, ablated_per_prompt: bool) -> int:
        """Ablated values that are the same for all prompts: what a batch holds on to besides."""
        return 0 if ablated_per_prompt else self._bytes(self.writers * self.width + self._levels)

    @property
    def donor(self) -> int:
        """What a prompt holds on to that gives its values to runs on others."""
        return self.clean + self._bytes((2 * self.layers + 1) * self.width)

    @property
    def placed(self) -> int:
        """What a run takes of a donor at a time, and the logits that its own are compared with."""
        levels = self._levels if self.unread else 0  # all at once, for the heads that are not read
        taken = (self.query_heads + 1) * self.width + levels
        return self._bytes(taken) + self.element * self.scored * self.vocabulary

    def preparing(self, ablated_per_prompt: bool) -> int:
        """What comes on top while they are made."""
        return self._bytes(self._block + self._levels) + self._logits

    def objective(self, ablated_per_prompt: bool) -> int:
        """All that is done with a prepared prompt: made beside the one before, run, attributed."""
        prepared = self.prepared(ablated_per_prompt)
        made = 2 * prepared + self.preparing(ablated_per_prompt)
        return max(made, prepared + self.masked(), self.attribution)

    def masked(self, masks: int = 1) -> int:
        """A run under K masks, beside what is prepared."""
        mixed = self.readers * self.width
        per_token = self.writers * self.width + max(3 * mixed, mixed + self.heads, self._block)
        gathered = self.element * self.scored * (self.writers + 2) * self.width
        return masks * (self._bytes(per_token) + gathered + self._logits + self._metric)

    @property
    def incremental(self) -> int:
        """A circuit's run from which others are reached: values everywhere and where scored."""
        scored = self.element * self.scored * (2 * self.writers * self.width + self._levels)
        return self._bytes(self.writers * self.width) + scored + self._logits

    @property
    def present(self) -> int:
        """What readers get in that run, beside what they get under each candidate."""
        return self._bytes((self.writers + self.readers) * self.width)

    @property
    def observed(self) -> int:
        """A clean run that keeps queries and keys, and a run under a mask to compare with it."""
        taken = self.clean + self._bytes(self.layers * (self.sides + 3 * self.width))
        scores = 4 * self.query_heads * self.scored * self.tokens + 2 * self.heads * self.tokens
        rows = 3 * self.query_heads * self.scored * self.width
        run = self.masked() - self._metric + self._bytes(self.layers * self.sides)
        return max(taken, self.prepared(False) + run + self.element * (scores + rows))

    @property
    def mask(self) -> int:
        """One mask in a run: what is made of it on the way, for all prompts."""
        return 3 * self.element * self.edges

    @property
    def attribution(self) -> int:
        """The differences that it starts from, a forward pass, and the gradients of all readers.

        Those of one block are held at a time, or before that the patterns that a backward rule
        makes anew.
        """
        gradients, patterns = 5 * self.readers * self.width, 4 * self.query_heads * self.tokens
        backward = HOLES * (self.layers * self.graph + max(gradients, patterns))
        return self._bytes(self.writers * self.width + backward) + 2 * (self._logits + self._metric)

    @property
    def recomputed(self) -> int:
        """What attention moves once one writer is taken from the stream that it reads."""
        pattern = 3 * self.query_heads * self.tokens
        return self._bytes(HOLES * (3 * self.width + 4 * self.sides + self.heads + pattern))

    @property
    def explanation(self) -> int:
        """A run under the prompt's own mask and the gradient of that, beside the ablated values."""
        mixed = self.readers * self.width
        written = 3 * self.writers * self.width
        backward = HOLES * (written + self.layers * (mixed + self.graph) + 2 * mixed)
        return self._bytes(backward) + 2 * (self._logits + self._metric) + 2 * self.mask

    def training(self, ablated_per_prompt: bool) -> int:
        """A step of a mask's training: an explanation, a copy of what is prepared, the gates."""
        gates = GATES * 4 * self.edges
        return self.explanation + self.prepared(ablated_per_prompt) + gates

    @property
    def parameters(self) -> int:
        """A trained mask's parameters, with their gradient, their optimiser's and their share."""
        return 2 * GATES * 4 * self.edges


def most_prompts(prompts: Prompts, each: int, budget: int, shared: int = 0) -> int:
    """How many prompts of so many bytes fit at once, up to `MOST_PROMPTS`; or TooLittleMemory."""
    if (fit := (budget - shared) // max(each, 1)) < 1:
        raise TooLittleMemory(
            f"one prompt of {prompts.clean.shape[1]} tokens takes up to {written(each + shared)} "
            f"of working memory, but memory={written(budget)}; raise memory, or use shorter prompts"
        )
    return min(fit, MOST_PROMPTS)


def footprint(engine: Engine, prompts: Prompts) -> Footprint:
    """Returns what a model takes for a prompt as long as the longest of `prompts`."""
    architecture, graph = engine.architecture, engine.graph
    blocks, n_tokens = architecture.blocks, prompts.clean.shape[1]
    width = blocks[0].attention.o.weight.shape[0]
    moved = graph.n_heads * architecture.head_width  # what all heads move
    keys = graph.kv_heads * architecture.head_width
    read = moved + 2 * keys
    turned = moved + keys if any(block.attention.rotary for block in blocks) else 0
    repeated = 2 * moved if graph.kv_group > 1 else 0
    capped = any(block.attention.soft_cap is not None for block in blocks)
    scores = 3 * graph.n_heads * n_tokens if capped else 0
    allowed = 0 if graph.causal else 2 * n_tokens  # each prompt's keys, as truths and as numbers
    normed = read if any(block.attention.q_norm is not None for block in blocks) else 0
    # what a layer makes of each query head's input, where its queries are normed together
    together = graph.n_heads * moved if any(block.attention.q.norm for block in blocks) else 0
    mlps = [block.mlp for block in blocks if block.mlp is not None]
    hidden = max((mlp.up.weight.shape[0] for mlp in mlps), default=0)
    gated = any(mlp.gate is not None for mlp in mlps)
    post = any(block.post_norm1 is not None for block in blocks)
    attended = read + normed + turned + repeated + scores + moved + together
    forward = (5 if post else 3) * width + attended + hidden * (1 + 2 * gated)
    return Footprint(
        element=engine.dtype.itemsize,
        tokens=n_tokens,
        scored=prompts.positions.shape[1],
        width=width,
        writers=len(graph.writers),
        readers=graph.n_heads + 2 * graph.kv_heads,
        query_heads=graph.n_heads,
        sides=read,
        layers=graph.n_layers,
        heads=2 * (read + moved + turned) + repeated + scores + allowed + together,
        hidden=hidden * (2 + gated),
        graph=max(forward, 4 * width + 2 * read),
        vocabulary=engine.model.outputs,
        capped=architecture.logit_cap is not None,
        unread=graph.n_layers * graph.n_heads * width if post else 0,
        edges=graph.exists.numel(),
    )
