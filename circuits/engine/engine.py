"""The model as writers and readers: clean run, run under an edge mask, run of a suffix.

Under a mask m[r, w] in [0, 1] (1 = kept) every reader gets its own input,

    x_r = sum_w  m[r, w] a_w + (1 - m[r, w]) ablated_w  +  attention output biases
        = base_r + sum_w m[r, w] (a_w - ablated_w)

with a_w the writer's output in this run, and its norm is applied to that mixture.  The engine keeps
the differences a_w - ablated_w in one buffer, writers first, so that all readers of a layer are one
matrix product.  It works on the weights of a TransformerLens bridge, never through hooks, and does
only the work that a mask leaves: readers that nothing kept depends on are not evaluated, and
writers that no kept edge reads are not computed.

Shapes: batch B, pos S, d_model D, head width E, writers W, readers R, candidate masks K, scored
positions P, vocabulary V.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.engine.live_nodes import live_nodes
from circuits.engine.masked import Ablated, MaskedRun, Seen, Start
from circuits.graph import Graph
from circuits.model.architecture import Architecture, Attention
from circuits.model.attention import attend
from circuits.model.families import describe
from circuits.model.load import LoadedModel
from circuits.model.output_head import OutputHead


@dataclass(frozen=True)
class Clean:
    """What every writer writes in a plain run, and the logits."""

    writers: Float[Tensor, "W B S D"]
    logits: Float[Tensor, "B P V"]
    sides: tuple[
        tuple[Tensor, Tensor], ...
    ] = ()  # queries [heads, B, S, E] and keys [kv, B, S, E] of each layer


class Engine:
    """A model as a sum of writers, read by readers.

    With `n_positions` its edges are told apart by position, for prompts of exactly so many tokens.
    Construction compares the engine with the bridge, and both with the logits that the HuggingFace
    model gave before it was wrapped, on random tokens.

    Raises: ValueError: the architecture or a configuration field is not supported, or the
        comparison fails.
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
            if model.head.weight.shape[-1] != described.width:
                raise ValueError(
                    f"the head reads {model.head.weight.shape[-1]} numbers, but the model's "
                    "residual stream has "
                    f"{described.width}"
                )
            weight, bias = (
                part.to(self.device, self.dtype) for part in (model.head.weight, model.head.bias)
            )
            self.architecture = replace(
                self.architecture, unembed=OutputHead(weight, bias), logit_cap=None
            )

    @property
    def device(self) -> torch.device:
        return self.architecture.token.weight.device  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        return self.architecture.token.weight.dtype  # type: ignore[return-value]

    # ---- plain runs
    # -------------------------------------------------------------------------------

    @torch.no_grad()
    def clean(
        self,
        tokens: Int[Tensor, "B S"],
        key_mask: Bool[Tensor, "B S"] | None = None,
        positions: Int[Tensor, "B P"] | None = None,
        *,
        sides: bool = False,
    ) -> Clean:
        """Runs the model and keeps what every writer wrote.

        Args:
            tokens: token ids, padded on the right.
            key_mask: True on real tokens; needed by bidirectional models when there is padding.
            positions: where logits are wanted (-1: nowhere); None: everywhere.
            sides: keep queries and keys as well.
        """
        embedded = self.embed(tokens)
        writers = embedded.new_empty(len(self.graph.writers), *embedded.shape[1:])
        writers[: len(embedded)] = embedded
        taps: list[tuple[Tensor, list[Tensor]]] | None = [] if sides else None
        logits = self._plain(embedded.sum(0), key_mask, positions, writers, taps)
        return Clean(
            writers,
            logits,
            tuple((q, k) for _, (q, k, *_) in filter(lambda tap: len(tap[1]) == 3, taps or [])),
        )

    @torch.no_grad()
    def logits(
        self,
        tokens: Int[Tensor, "B S"],
        key_mask: Bool[Tensor, "B S"] | None = None,
        positions: Int[Tensor, "B P"] | None = None,
    ) -> Float[Tensor, "B P V"]:
        """The model's logits, like `clean` but without keeping the writers."""
        return self._plain(self.embed(tokens).sum(0), key_mask, positions)

    @torch.no_grad()
    def residual(
        self,
        tokens: Int[Tensor, "B S"],
        key_mask: Bool[Tensor, "B S"] | None = None,
        positions: Int[Tensor, "B P"] | None = None,
    ) -> Float[Tensor, "B P D"]:
        """The residual stream after the last block, before the final norm."""
        return self._stream(self.embed(tokens).sum(0), key_mask, positions)

    def embed(self, tokens: Int[Tensor, "B S"]) -> Float[Tensor, "inputs B S D"]:
        """What the input writers write: one row, or token and position apart."""
        context = self.architecture.context
        if tokens.shape[1] > context:
            raise ValueError(
                f"prompts of {tokens.shape[1]} tokens, but the model's context is {context}; "
                "shorten the prompts"
            )
        parts = [self.architecture.token(tokens)]
        if self.architecture.position is not None:
            ids = torch.arange(tokens.shape[1], device=tokens.device)
            parts.append(self.architecture.position(ids).expand_as(parts[0]))
        return (
            torch.stack(parts)
            if self.graph.split_input
            else torch.stack(parts).sum(0, keepdim=True)
        )

    def _plain(
        self,
        residual: Float[Tensor, "B S D"],
        key_mask: Bool[Tensor, "B S"] | None,
        positions: Int[Tensor, "B P"] | None,
        keep: Float[Tensor, "W B S D"] | None = None,
        taps: list[tuple[Tensor, list[Tensor]]] | None = None,
    ) -> Float[Tensor, "B P V"]:
        """One forward pass.  `keep` receives the writers; `taps` the residual and the reader-side
        tensors.
        """
        residual = self._stream(residual, key_mask, positions, keep, taps)
        normed = self.architecture.final_norm(residual)
        if taps is not None:
            taps.append((residual, [normed]))
        return self._unembed(normed)

    def _stream(
        self,
        residual: Float[Tensor, "B S D"],
        key_mask: Bool[Tensor, "B S"] | None,
        positions: Int[Tensor, "B P"] | None,
        keep: Float[Tensor, "W B S D"] | None = None,
        taps: list[tuple[Tensor, list[Tensor]]] | None = None,
    ) -> Float[Tensor, "B P D"]:
        """All blocks of `_plain`."""
        graph = self.graph
        for layer, block in enumerate(self.architecture.blocks):
            before, attention = residual, block.attention
            normed = block.norm1(residual)
            sides: list[Tensor] | None = None if taps is None else []
            z = self.heads(attention, normed, key_mask, sides)
            first = graph.first_writer(layer)
            if keep is None:
                written = attention.o(z.movedim(0, -2).flatten(-2))
                written = written if block.post_norm1 is None else block.post_norm1(written)
            else:
                heads = keep[first : first + graph.n_heads]
                torch.bmm(z.flatten(1, 2), self._output_weight(attention), out=heads.flatten(1, 2))
                if block.post_norm1 is not None:
                    heads.mul_(block.post_norm1.factor(heads.sum(0)))
                written = (
                    heads.sum(0)
                    if attention.o.bias is None
                    else heads.sum(0).add_(attention.o.bias)
                )
            residual = residual + written
            if taps is not None and sides is not None:
                taps.append((before, sides))
            if block.mlp is None or block.norm2 is None:
                continue
            mlp_input = before if graph.parallel else residual
            normed = block.norm2(mlp_input)
            if (
                taps is not None
            ):  # without a norm this is the residual itself, which others read too
                normed = normed.view_as(normed)
            written = block.feed_forward(normed)
            residual = residual + written
            if keep is not None:
                keep[first + graph.n_heads] = written
            if taps is not None:
                taps.append((mlp_input, [normed]))
        return _at(residual, positions)

    # ---- runs under a mask
    # ------------------------------------------------------------------------

    def ablated(self, writers: Float[Tensor, "W B S D"]) -> Ablated:
        """Prepares the values that removed edges carry; once per batch, shared by all runs on it."""
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
            return Ablated(writers, levels)
        unread = [
            torch.einsum(
                "hbse,hed->hbsd",
                self.heads(block.attention, block.norm1(x), None),
                self._output_weight(block.attention),
            )
            for block, x in zip(self.architecture.blocks, levels[::2], strict=False)
        ]
        return Ablated(writers, levels, torch.stack(unread))

    def masked(
        self,
        tokens: Int[Tensor, "B S"],
        mask: Float[Tensor, "*K_R_W_S"] | Bool[Tensor, "*K_R_W_S"],
        ablated: Ablated,
        *,
        key_mask: Bool[Tensor, "B S"] | None = None,
        positions: Int[Tensor, "B P"] | None = None,
        start: Start | None = None,
        per_example: bool = False,
        upstream: Float[Tensor, "W B S D"] | None = None,
        observe: Callable[[Seen], None] | None = None,
    ) -> Float[Tensor, "*KB P V"]:
        """Runs the model under an edge mask, or under K masks at once.

        Differentiable in the mask, in `start.writers`, in `ablated` and in the weights.

        With post-norms (Gemma 2) a head's output is scaled by a norm over all heads of its layer.
        A head that the logits do not depend on enters it with all of its inputs ablated, whatever
        edges it keeps, so that dropping dead ends changes nothing.

        Args: tokens: token ids, padded on the right. mask: share of each edge that is kept, [R, W]
            or [K, R, W] (with one more axis, of positions, where the
                graph tells edges apart by position); entries of edges that cannot exist count as 0.
            ablated: what removed edges carry.
            key_mask: True on real tokens; needed by bidirectional models when there is padding.
            positions: where logits are wanted (-1: nowhere); None: everywhere.
            start: begin at a later block, from the values of all writers before it.
            per_example: mask k is for example k alone (K = B), and the result is [B, P, V].
            upstream: every reader is given these values of the writers, say the model's own, and
                not what the writers write in this run: each node is then one step away from them.
            observe: is called with what nodes do, block by block; it must copy what it keeps.
        """
        graph = self.graph
        edge_axes = graph.exists.ndim
        if mask.shape[-edge_axes:] != graph.exists.shape:
            positions_of = "" if graph.n_positions is None else f" at {graph.n_positions} positions"
            raise ValueError(
                f"mask of shape {tuple(mask.shape)}, but the graph has {len(graph.readers)} "
                "readers and "
                f"{len(graph.writers)} writers{positions_of}"
            )
        if graph.n_positions is not None:
            lengths = {tokens.shape[1]} if key_mask is None else set(key_mask.sum(1).tolist())
            if others := sorted(lengths - {graph.n_positions}):
                raise ValueError(
                    f"prompts of {others[0]} tokens, but edges are told apart by position for "
                    "prompts of exactly "
                    f"{graph.n_positions}"
                )
        if per_example and mask.shape[:-edge_axes] != tokens.shape[:1]:
            raise ValueError(
                f"per_example needs one mask per prompt: {tuple(mask.shape)} for {len(tokens)} "
                "prompts"
            )
        single = mask.ndim == edge_axes
        masks = (mask[None] if single else mask).to(device=tokens.device, dtype=self.dtype)
        masks = masks * graph.exists.to(masks.device)
        start = start or Start(
            0, self.embed(tokens) if upstream is None else upstream[: graph.n_inputs]
        )
        todo = live_nodes(graph, masks, first_layer=start.layer)
        grad = torch.is_grad_enabled() and any(
            tensor.requires_grad
            for tensor in (masks, start.writers, ablated.base, *self.model.bridge.parameters())
        )
        run = MaskedRun(
            self, todo, masks, ablated, start, key_mask, per_example, grad, upstream, observe
        )
        logits = run.logits(positions)
        return logits[0] if single or per_example else logits

    # ---- gradients at the readers
    # -----------------------------------------------------------------

    def reader_gradients(
        self,
        embedded: Float[Tensor, "B S D"],
        scalar: Callable[[Float[Tensor, "B P V"]], Float[Tensor, ""]],
        key_mask: Bool[Tensor, "B S"] | None = None,
        positions: Int[Tensor, "B P"] | None = None,
    ) -> Iterator[tuple[int, Float[Tensor, "r B S D"]]]:
        """Yields, group by group from the output, the gradient of `objective(logits)` at each
        reader's input.

        One forward and one backward pass.  Each item is (first reader of the group, its gradients);
        for `logits` only scored positions differ from zero.
        """
        graph, taps = self.graph, []
        with torch.enable_grad():
            logits = self._plain(embedded.detach().requires_grad_(), key_mask, positions, taps=taps)
            gradients = iter(
                torch.autograd.grad(scalar(logits), [t for _, tensors in taps for t in tensors])
            )
        groups = [(residual, [next(gradients) for _ in tensors]) for residual, tensors in taps]
        residual, (gradient,) = groups.pop()
        yield (
            len(graph.readers) - 1,
            _scatter(
                self.architecture.final_norm.pull_back(residual, gradient[None]),
                positions,
                embedded.shape[1],
            ),
        )
        for layer in reversed(range(graph.n_layers)):
            block, first = self.architecture.blocks[layer], graph.first_reader(layer)
            if block.norm2 is not None:
                residual, (gradient,) = groups.pop()
                yield (
                    first + graph.n_heads + 2 * graph.kv_heads,
                    block.norm2.pull_back(residual, gradient[None]),
                )
            residual, sides = groups.pop()
            at_norm = torch.empty(
                graph.n_heads + 2 * graph.kv_heads,
                *residual.shape,
                dtype=residual.dtype,
                device=residual.device,
            )
            row = 0
            for side, projection in zip(
                sides, (block.attention.q, block.attention.k, block.attention.v), strict=True
            ):
                weight = projection.weight.detach().unflatten(
                    0, (-1, self.architecture.head_width)
                )  # [heads, E, D]
                into = at_norm[row : row + len(side)]
                torch.bmm(side.flatten(1, 2), weight, out=into.flatten(1, 2))
                row += len(side)
            yield first, block.norm1.pull_back(residual, at_norm)

    # ---- components
    # -------------------------------------------------------------------------------

    def heads(
        self,
        attention: Attention,
        normed: Float[Tensor, "B S D"],
        key_mask: Bool[Tensor, "B S"] | None,
        taps: list[Tensor] | None = None,
    ) -> Float[Tensor, "heads B S E"]:
        """What all heads of a layer move when all read the same input; `taps` receives q, k and v."""
        q, k, v = (
            projection(normed).unflatten(-1, (-1, self.architecture.head_width)).movedim(-2, 0)
            for projection in (attention.q, attention.k, attention.v)
        )  # each [heads, B, S, E]
        if taps is not None:
            taps += [q, k, v]
        return attend(self.architecture, attention, q, k, v, key_mask)

    def _output_weight(self, attention: Attention) -> Float[Tensor, "heads E D"]:
        return attention.o.weight.T.unflatten(0, (-1, self.architecture.head_width))

    def _unembed(self, normed: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch V"]:
        logits, cap = self.architecture.unembed(normed), self.architecture.logit_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    # ---- never silently wrong
    # ---------------------------------------------------------------------

    @torch.no_grad()
    def _check(self, model: LoadedModel) -> None:
        """Compares engine, bridge and the unwrapped model's logits on random tokens."""
        tokens = model.probe_tokens
        clean = self.clean(tokens)
        tolerance = (
            1e-3 if self.dtype in (torch.float32, torch.float64) else 0.2
        )  # two to three digits, added up
        bridge, cache = model.bridge.run_with_cache(
            tokens, names_filter=lambda name: name.endswith("hook_out")
        )
        residual = cache[f"blocks.{self.graph.n_layers - 1}.hook_out"]
        biases = sum(
            b.attention.o.bias for b in self.architecture.blocks if b.attention.o.bias is not None
        )
        pairs = {
            "the bridge's logits": (clean.logits, bridge),
            "the unwrapped model's logits": (clean.logits, model.probe_logits),
            "the bridge's residual stream (sum of all writers)": (
                clean.writers.sum(0) + biases,
                residual,
            ),
        }
        for name, (ours, theirs) in pairs.items():
            scale = theirs.float().abs().max().clamp(min=1.0)
            worst = ((ours.float() - theirs.float()).abs().max() / scale).item()
            if not worst <= tolerance:  # NaN fails too
                raise ValueError(
                    f"the engine and {name} differ by {worst:.2g} (relative; bound {tolerance:g}) "
                    "on random tokens; "
                    "the model computes something that this version does not know, or its weights "
                    "are not finite"
                )


def _at(
    residual: Float[Tensor, "B S D"], positions: Int[Tensor, "B P"] | None
) -> Float[Tensor, "B P D"]:
    """The residual at the scored positions; absent ones (-1) give the last position, for the caller
    to drop.
    """
    if positions is None:
        return residual
    return residual[torch.arange(len(residual), device=residual.device)[:, None], positions]


def _scatter(values: Tensor, positions: Int[Tensor, "B P"] | None, n_positions: int) -> Tensor:
    """The adjoint of `_at` on [1, B, P, D]; absent positions carry no gradient."""
    if positions is None:
        return values
    full = values.new_zeros(*values.shape[:2], n_positions, values.shape[-1])
    index = (positions % n_positions)[None, ..., None].expand_as(values)
    return full.scatter_add_(2, index, values)
