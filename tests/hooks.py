"""The masked run a second time, slow and obvious: hooks on the bridge, one reader at a time."""

from __future__ import annotations

import networkx as nx
import torch

from circuits.engine import Engine
from tests import tiny

# HuggingFace's RMSNorm, GPT-J's and GPT-Neo's attention, OPT's where it is eager, StableLM's in its
# bridge, TransformerLens's RMSNorm and its parameter-free norms compute in float32 even in float64
# models.
COARSE = tuple(
    "llama mistral qwen gemma gptj codegen gptneo opt smollm3 phi3 stablelm olmo2 rms".split()
)


def bound(name: str) -> float:
    coarse = any(part in name for part in (*COARSE, "no parameters"))
    return 2e-5 if coarse else 1e-10


def read_by(graph, mask: torch.Tensor, n_positions: int) -> torch.Tensor:
    """Where the logits depend on a writer, [W, S], by the paths of a graph whose nodes are (name,
    position).
    """
    kept = mask * graph.exists != 0
    kept = kept[..., None].expand(-1, -1, n_positions) if kept.ndim == 2 else kept
    paths = nx.DiGraph()
    paths.add_node("end")
    for reader, writer, position in kept.nonzero().tolist():
        name = graph.readers[reader]
        moves = name.endswith(("<k>", "<v>"))
        to = range(position if graph.causal else 0, n_positions) if moves else [position]
        for node in graph.reader_nodes(reader):
            for there in to:
                target = "end" if node == "logits" else (node, there)
                paths.add_edge((graph.writers[writer], position), target)
    ancestors = nx.ancestors(paths, "end")
    return torch.tensor(
        [
            [(name, position) in ancestors for position in range(n_positions)]
            for name in graph.writers
        ]
    )


def through_hooks(
    factored: Engine,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    ablated: torch.Tensor,
    unread: dict | None = None,
    *,
    upstream: torch.Tensor | None = None,
    seen: dict[str, torch.Tensor] | None = None,
    extra: torch.Tensor | None = None,
):
    """The masked run as hooks on one bridge forward: each hook mixes what the hooks before it
    collected.

    With `upstream` it mixes that instead.  `seen` receives what is written [W, B, S, D] and, of
    each layer, queries and keys [heads, B, S, E] and patterns [B, heads, S, S].  Readers get
    `extra` [R, B, S, D] on top.
    """
    bridge, graph, architecture = factored.model.bridge, factored.graph, factored.architecture
    written = list(factored.embed(tiny.from_tokens(tokens)))
    biases = [torch.zeros(())]
    fired = []
    post_normed = "ln1_post" in bridge.blocks[0]._modules
    if post_normed and unread is None:  # what heads give their post-norm when every edge is removed
        through_hooks(factored, tokens, torch.zeros_like(mask), ablated, unread := {})
    read = read_by(graph, mask, tokens.shape[1])
    given = written if upstream is None else upstream
    # OLMo 2's norm is over all heads of a layer: each head's own input goes through all of it
    normed_together = "qk" if bridge.cfg.architecture == "Olmo2ForCausalLM" else ""

    def before(layer: int, x: torch.Tensor) -> torch.Tensor:
        """What the attention of a block projects, from what it reads."""
        norm = getattr(bridge.blocks[layer], "ln1", None)
        return x if norm is None else norm.original_component(x)

    def mixed(reader: str) -> torch.Tensor:
        row = graph.reader_index[reader]
        total = sum(biases[:-1] if graph.parallel and reader.startswith("m") else biases)
        for writer in range(graph.upstream[row]):
            m = mask[row, writer] if mask.ndim == 2 else mask[row, writer][:, None]
            total = total + m * given[writer] + (1 - m) * ablated[writer]
        return total if extra is None else total + extra[row]

    def side_hook(layer: int, side: str):
        def hook(value, hook):
            fired.append(hook.name)
            heads = graph.n_heads if side == "q" else graph.kv_heads
            label = "h" if side == "q" or graph.kv_heads == graph.n_heads else "kv"
            out = value.clone()
            width = architecture.head_width
            for head in range(heads):
                x = before(layer, mixed(f"a{layer}.{label}{head}<{side}>"))
                projected = getattr(bridge.blocks[layer].attn, side).original_component(x)
                if side in normed_together:
                    norm = getattr(bridge.blocks[layer].attn, f"{side}_norm").original_component
                    projected = norm(projected)
                columns = slice(head * width, (head + 1) * width)
                out.flatten(2)[..., columns] = projected[..., columns]
            if seen is not None:
                seen[f"{side}{layer}"] = out.flatten(2).unflatten(-1, (heads, width)).movedim(-2, 0)
            return out

        return hook

    def pattern_hook(layer: int):
        def hook(value, hook):  # GPT-J's may fire after the layer's output
            if seen is not None:
                seen[f"pattern{layer}"] = value.clone()

        return hook

    def z_hook(layer: int):
        def hook(value, hook):
            fired.append(hook.name)
            o = bridge.blocks[layer].attn.o.original_component
            weight = o.weight if type(o).__name__ == "Conv1D" else o.weight.T
            z = value.flatten(2)
            width = architecture.head_width
            columns = [slice(head * width, (head + 1) * width) for head in range(graph.n_heads)]
            outputs = [z[..., these] @ weight[these] for these in columns]
            if post_normed:
                norm = bridge.blocks[layer].ln1_post.original_component
                alone = unread.setdefault(layer, outputs)
                here = read[[graph.writer_index[f"a{layer}.h{h}"] for h in range(graph.n_heads)]][
                    :, None, :, None
                ]
                enter = [torch.where(*values) for values in zip(here, outputs, alone, strict=True)]
                total = sum(enter)
                factor = norm(total) / total
                outputs = [output * factor for output in outputs]
            written.extend(outputs)
            biases.append(torch.zeros(()) if o.bias is None else o.bias)

        return hook

    def mlp_in(layer: int):
        def hook(value, hook):
            fired.append(hook.name)
            shared = "ln2" not in bridge.blocks[layer]._modules  # then the hook is behind the norm
            x = mixed(f"m{layer}")
            return before(layer, x) if shared else x

        return hook

    def mlp_out(value, hook):
        fired.append(hook.name)
        written.append(value)

    def logits_in(value, hook):
        fired.append(hook.name)
        return mixed("logits")

    hooks = []
    for layer in range(graph.n_layers):
        for side in "vqk" if normed_together else "qkv":
            made = f"{side}_norm" if side in normed_together else side
            hooks += [(f"blocks.{layer}.attn.{made}.hook_out", side_hook(layer, side))]
        hooks += [(f"blocks.{layer}.attn.o.hook_in", z_hook(layer))]
        if not graph.attention_only:
            parts = bridge.blocks[layer]._modules
            own = bridge.blocks[layer].mlp.original_component is not None
            start = "ln2" if "ln2" in parts else "mlp"
            after = "ln2_post" if "ln2_post" in parts else "mlp" if own else "mlp.out"
            hooks += [(f"blocks.{layer}.{start}.hook_in", mlp_in(layer))]
            hooks += [(f"blocks.{layer}.{after}.hook_out", mlp_out)]
    hooks += [("ln_final.hook_in", logits_in)]
    patterns = [
        (f"blocks.{layer}.attn.hook_pattern", pattern_hook(layer))
        for layer in range(graph.n_layers)
    ]
    with torch.no_grad():
        logits = bridge.run_with_hooks(
            tokens, fwd_hooks=hooks + (patterns if seen is not None else [])
        )
    assert fired == [name for name, _ in hooks], "hooks can silently never fire"
    if seen is not None:
        seen["written"] = torch.stack(written)
        assert all(f"pattern{layer}" in seen for layer in range(graph.n_layers)), (
            "hooks can silently never fire"
        )
    return logits
