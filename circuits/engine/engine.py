"""The model as writers and readers: clean run, run under edge masks, gradients at the readers.

The engine works on the weights of a TransformerLens bridge, never through hooks, and does only the
work that a mask leaves: readers that nothing kept depends on are not evaluated, and writers that no
kept edge reads are not computed.  What readers get under a mask: `circuits.engine.mixing`.

Shapes: batch B, pos S, d_model D, head width E, writers W, readers R, candidate masks K, scored
positions P, vocabulary V.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuits.engine.live_nodes import live_nodes
from circuits.engine.masked import Ablated, MaskedRun, Place, Seen, Start
from circuits.engine.plain import Edit, Record, Sides, reader_gradients, residual_stream
from circuits.engine.rules import under
from circuits.graph import Graph
from circuits.model.architecture import Architecture
from circuits.model.attention import attend
from circuits.model.families import describe
from circuits.model.load import LoadedModel
from circuits.model.output_head import OutputHead
from circuits.prompts.errors import InputError
from circuits.prompts.prompts import Prompts


@dataclass(frozen=True)
class Clean:
    """What every writer writes in a plain run, and the logits at the scored positions."""

    writers: Float[Tensor, "W B S D"]
    logits: Float[Tensor, "B P V"]
    # queries [heads, B, S, E] and keys [kv, B, S, E] of each layer, if asked for
    sides: tuple[tuple[Tensor, Tensor], ...] = ()


class Engine:
    """A model as a sum of writers, read by readers.

    With `n_positions` its edges are told apart by position, for prompts of exactly so many tokens.
    Construction compares the engine with the bridge, and both with the logits that the HuggingFace
    model gave before it was wrapped, on random tokens.

    >>> from circuits.model.load import load_model
    >>> Engine(load_model("pkg://mad/models/recall_redirect")).graph.n_edges
    110

    Raises:
        ValueError: the architecture or a configuration field is not supported, or the comparison
            fails.
    """

    graph: Graph

    def __init__(
        self, model: LoadedModel, *, split_input: bool | None = None, n_positions: int | None = None
    ) -> None:
        described = describe(model.bridge, model.hf_config)
        split_input = model.split_input if split_input is None else split_input
        self.graph = replace(described.graph, split_input=split_input, n_positions=n_positions)
        self.architecture: Architecture = replace(described, graph=self.graph)
        self.model = model
        if split_input and described.position is None:
            raise ValueError(
                "split_input=true, but this model has no position embedding to split off (rotary)"
            )
        self._check(model)
        if model.head is not None:
            self._replace_head(model.head)

    def _replace_head(self, head: OutputHead) -> None:
        if head.weight.shape[-1] != self.architecture.width:
            raise ValueError(
                f"the head reads {head.weight.shape[-1]} numbers, but the model's residual stream "
                f"has {self.architecture.width}"
            )
        weight, bias = (part.to(self.device, self.dtype) for part in (head.weight, head.bias))
        own = OutputHead(weight, bias)
        self.architecture = replace(self.architecture, unembed=own, logit_cap=None)

    @property
    def device(self) -> torch.device:
        return self.architecture.token.weight.device  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        return self.architecture.token.weight.dtype  # type: ignore[return-value]

    # ---- plain runs ------------------------------------------------------------------------------

    @torch.no_grad()
    def clean(self, prompts: Prompts, *, sides: bool = False) -> Clean:
        """Runs the model and keeps what every writer wrote; with `sides` queries and keys too."""
        read: list[Sides] | None = [] if sides else None
        writers, residual = self._written(prompts, read)
        logits = self.architecture.logits(residual)
        return Clean(writers, logits, tuple((q, k) for q, k, _ in read or ()))

    @torch.no_grad()
    def writers(self, prompts: Prompts) -> Float[Tensor, "W B S D"]:
        """What every writer writes, without the logits."""
        return self._written(prompts, None)[0]

    @torch.no_grad()
    def logits(self, prompts: Prompts) -> Float[Tensor, "B P V"]:
        """The model's logits at the scored positions."""
        return self.architecture.logits(self.residual(prompts))

    @torch.no_grad()
    def residual(self, prompts: Prompts) -> Float[Tensor, "B P D"]:
        """The residual stream after the last block, before the final norm, where it is scored."""
        prompts = prompts.to(self.device)
        return residual_stream(self.architecture, prompts, self.embed(prompts).sum(0))

    def edited(
        self,
        prompts: Prompts,
        edit: Edit,
        embedded: Float[Tensor, "B S D"] | None = None,
        *,
        rule: str = "plain",
    ) -> Float[Tensor, "B P V"]:
        """The logits of a plain run in which `edit` may change values on their way.

        Differentiable, by a rule (`circuits.engine.rules`), in what `edit` puts in, in `embedded`
        (the stream that the run starts from, by default what the input writers write) and in the
        weights.
        """
        prompts, architecture = prompts.to(self.device), under(rule, self.architecture)
        embedded = self.embed(prompts).sum(0) if embedded is None else embedded
        return architecture.logits(residual_stream(architecture, prompts, embedded, edit=edit))

    def embed(self, prompts: Prompts) -> Float[Tensor, "inputs B S D"]:
        """What the input writers write; InputError where a prompt is longer than the context."""
        tokens, context = prompts.clean.to(self.device), self.architecture.context
        if tokens.shape[1] > context:
            raise InputError(
                f"prompts of {tokens.shape[1]} tokens, but the model's context is {context}; "
                "shorten the prompts"
            )
        parts = [self.architecture.token(tokens)]
        if self.architecture.position is not None:
            ids = torch.arange(tokens.shape[1], device=tokens.device)
            parts.append(self.architecture.position(ids).expand_as(parts[0]))
        stacked = torch.stack(parts)
        return stacked if self.graph.split_input else stacked.sum(0, keepdim=True)

    def _written(
        self, prompts: Prompts, sides: list[Sides] | None
    ) -> tuple[Float[Tensor, "W B S D"], Float[Tensor, "B P D"]]:
        """What every writer writes, and the residual stream at the end of a plain run."""
        prompts = prompts.to(self.device)
        embedded = self.embed(prompts)
        writers = embedded.new_empty(len(self.graph.writers), *embedded.shape[1:])
        writers[: len(embedded)] = embedded
        record = Record(writers, sides)
        return writers, residual_stream(self.architecture, prompts, embedded.sum(0), record)

    # ---- runs under a mask -----------------------------------------------------------------------

    def ablated(self, writers: Float[Tensor, "W B S D"], place: Place | None = None) -> Ablated:
        """Prepares what removed edges carry; once per batch, shared by all runs on it.

        Where the values are another prompt's, `place` says where in a run they go.
        """
        graph = self.graph
        total = writers[: graph.n_inputs].sum(0)
        base = [total]
        for layer, block in enumerate(self.architecture.blocks):
            first = graph.first_writer(layer)
            attention = writers[first : first + graph.n_heads].sum(0)
            if block.attention.o.bias is not None:
                attention = attention + block.attention.o.bias
            base.append(total if graph.parallel else total + attention)
            total = total + attention
            if not graph.attention_only:
                total = total + writers[first + graph.n_heads]
            base.append(total)
        levels = torch.stack(base)
        if not any(block.post_norm1 is not None for block in self.architecture.blocks):
            return Ablated(writers, levels, place=place)
        placed = levels if place is None else place.of(levels)
        return Ablated(writers, levels, self._unread(placed), place)

    def _unread(self, levels: Float[Tensor, "levels B S D"]) -> Float[Tensor, "L heads B S D"]:
        """What each head gives its layer's post-norm when all of its inputs are ablated."""
        unread = []
        for block, x in zip(self.architecture.blocks, levels[::2], strict=False):
            sides = self.architecture.sides(block.attention, block.norm1(x))
            z = attend(self.architecture, block.attention, *sides, None)
            weight = self.architecture.output_weight(block.attention)
            unread.append(torch.einsum("hbse,hed->hbsd", z, weight))
        return torch.stack(unread)

    def masked(
        self,
        prompts: Prompts,
        mask: Float[Tensor, "*K_R_W_S"] | Bool[Tensor, "*K_R_W_S"],
        ablated: Ablated,
        *,
        start: Start | None = None,
        per_example: bool = False,
        closed: bool = False,
        upstream: Float[Tensor, "W B S D"] | None = None,
        observe: Callable[[Seen], None] | None = None,
    ) -> Float[Tensor, "*KB P V"]:
        """Runs the model under an edge mask, or under K masks at once; logits where it is scored.

        Differentiable in the mask, in `start.writers`, in `ablated` and in the weights.

        With post-norms (Gemma 2) a head's output is scaled by a norm over all heads of its layer.
        A head that the logits do not depend on enters it with all of its inputs ablated, whatever
        edges it keeps, so that dropping dead ends changes nothing.

        Args:
            mask: share of each edge that is kept, [R, W] or [K, R, W] (with one more axis, of
                positions, where the graph tells edges apart by position); entries of edges that
                cannot exist count as 0.
            ablated: what removed edges carry; with `donors`, which take no `per_example` masks and
                no gradient, each reader its own.
            start: begin at a later block, from the values of all writers before it.
            per_example: mask k is for example k alone (K = B), and the result is [B, P, V].
            closed: entries that are 0 need no gradient, as those of a clamped mask, so that a
                differentiated run too does only the work that the mask leaves.
            upstream: every reader is given these values of the writers, say the model's own, and
                not what the writers write in this run: each node is then one step away from them.
            observe: is called with what nodes do, block by block; it must copy what it keeps.

        Raises:
            ValueError: the mask is of another shape than the graph's edges, or removes edges into
                blocks before `start`; or prompts have another length than edges by position are
                told apart for.
        """
        graph, prompts = self.graph, prompts.to(self.device)
        single = mask.ndim == graph.exists.ndim
        self._check_mask(prompts, mask, per_example)
        masks = (mask[None] if single else mask).to(device=self.device, dtype=self.dtype)
        masks = masks * graph.exists.to(masks.device)
        if start is None:
            inputs = self.embed(prompts) if upstream is None else upstream[: graph.n_inputs]
            start = Start(0, inputs)
        self._check_start(masks.detach(), start.layer)
        differentiated = (masks, start.writers, ablated.base, *self.model.bridge.parameters())
        run = MaskedRun(
            self.architecture,
            live_nodes(graph, masks.detach() if closed else masks, first_layer=start.layer),
            masks,
            ablated,
            start,
            prompts,
            per_example=per_example,
            grad=torch.is_grad_enabled() and any(part.requires_grad for part in differentiated),
            upstream=upstream,
            observe=observe,
        )
        logits = run.logits(prompts.positions)
        return logits[0] if single or per_example else logits

    def _check_mask(self, prompts: Prompts, mask: Tensor, per_example: bool) -> None:
        graph = self.graph
        edge_axes = graph.exists.ndim
        if mask.shape[-edge_axes:] != graph.exists.shape:
            by_position = f" at {graph.n_positions} positions" if graph.n_positions else ""
            raise ValueError(
                f"mask of shape {tuple(mask.shape)}, but the graph has {len(graph.readers)} "
                f"readers and {len(graph.writers)} writers{by_position}"
            )
        prompts.check_length(graph.n_positions)
        if per_example and mask.shape[:-edge_axes] != prompts.clean.shape[:1]:
            raise ValueError(
                f"per_example needs one mask per prompt: {tuple(mask.shape)} for "
                f"{len(prompts)} prompts"
            )

    def _check_start(self, masks: Float[Tensor, "K R W *S"], layer: int) -> None:
        """Refuses masks that remove edges into what a run that starts later does not run."""
        skipped = slice(0, self.graph.first_reader(layer))
        removed = masks[:, skipped] != self.graph.exists[skipped].to(masks.device)
        if removed.any():
            edge = self.graph.edge_name(*removed.nonzero()[0, 1:].tolist())
            raise ValueError(
                f"the run starts at block {layer}, with given values of all writers before it, but "
                f"the mask removes edges before it, such as {edge}; keep them, or start at block 0"
            )

    def reader_gradients(
        self,
        prompts: Prompts,
        embedded: Float[Tensor, "B S D"],
        scalar: Callable[[Float[Tensor, "B P V"]], Float[Tensor, ""]],
        *,
        rule: str = "plain",
        edit: Edit | None = None,
    ) -> Iterator[tuple[int, Float[Tensor, "r B S D"]]]:
        """Yields (first reader, gradients of `scalar(logits)` at a group's inputs), logits first.

        One forward and one backward pass, from the given residual stream at the beginning.  For
        `logits` only scored positions differ from zero.

        Args:
            rule: what the backward pass takes the model for (`circuits.engine.rules`).
            edit: may change values on their way; readers of what it cuts off get 0.

        Raises:
            ValueError: there is no such rule, or the model has something that it does not define.
        """
        architecture = under(rule, self.architecture)
        return reader_gradients(architecture, prompts.to(self.device), embedded, scalar, edit)

    # ---- never silently wrong --------------------------------------------------------------------

    @torch.no_grad()
    def _check(self, model: LoadedModel) -> None:
        """Compares engine, bridge and the unwrapped model's logits on random tokens."""
        tokens = model.probe_tokens
        clean = self.clean(Prompts.from_tokens(tokens))
        exact = self.dtype in (torch.float32, torch.float64)
        tolerance = 1e-3 if exact else 0.2  # two to three digits, added up
        last = f"blocks.{self.graph.n_layers - 1}.hook_out"
        bridge, cache = model.bridge.run_with_cache(tokens, names_filter=last)
        residual = cache[last]
        biases = (block.attention.o.bias for block in self.architecture.blocks)
        stream = clean.writers.sum(0) + sum(bias for bias in biases if bias is not None)
        pairs = {
            "the bridge's logits": (clean.logits, bridge),
            "the unwrapped model's logits": (clean.logits, model.probe_logits),
            "the bridge's residual stream (sum of all writers)": (stream, residual),
        }
        for name, (ours, theirs) in pairs.items():
            scale = theirs.float().abs().max().clamp(min=1.0)
            worst = ((ours.float() - theirs.float()).abs().max() / scale).item()
            if not worst <= tolerance:  # NaN fails too
                raise ValueError(
                    f"the engine and {name} differ by {worst:.2g} (relative; bound {tolerance:g}) "
                    "on random tokens; the model computes something that this version does not "
                    "know, or its weights are not finite"
                )
