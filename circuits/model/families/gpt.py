"""GPT-2 and its successors: LayerNorm, plain MLPs, as many key-value heads as heads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from circuits.graph import Graph
from circuits.model.architecture import MLP, Architecture, Attention, Block, Rotary
from circuits.model.families.parts import (
    activation,
    layer_norm,
    part,
    projection,
    qkvo,
    refuse_unknown,
    rotary,
)

_COMMON = (
    "n_positions n_ctx n_embd n_layer n_head n_inner activation_function layer_norm_epsilon "
    "scale_attn_weights resid_pdrop embd_pdrop attn_pdrop summary_type summary_use_proj "
    "summary_activation summary_proj_to_labels summary_first_dropout "
)
_NEO = (
    "hidden_size num_layers num_heads intermediate_size activation_function attention_types "
    "attention_layers window_size layer_norm_epsilon max_position_embeddings resid_dropout "
    "embed_dropout attention_dropout classifier_dropout summary_type summary_use_proj "
    "summary_activation summary_proj_to_labels summary_first_dropout"
)
_OPT = (
    "hidden_size ffn_dim num_hidden_layers num_attention_heads activation_function "
    "max_position_embeddings do_layer_norm_before word_embed_proj_dim enable_bias "
    "layer_norm_elementwise_affine dropout attention_dropout layerdrop init_std"
)
_NEOX = (
    "hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act "
    "max_position_embeddings layer_norm_eps use_parallel_residual rope_parameters attention_bias "
    "rotary_pct rotary_emb_base partial_rotary_factor rope_theta attention_dropout hidden_dropout "
    "classifier_dropout"
)


def gpt2(bridge: Any, config: Any) -> Architecture:
    """GPT-2 (Radford et al. 2019): learned positions, Conv1D projections."""
    # reorder_and_upcast_attn rounds attention in another way and changes nothing else.
    fields = "scale_attn_by_inverse_layer_idx reorder_and_upcast_attn"
    refuse_unknown("GPT-2", config, _COMMON + fields)
    blocks = tuple(_block(block, part(block.attn).scaling) for block in bridge.blocks)
    return _decoder(bridge, config, blocks)


def gpt_neo(bridge: Any, config: Any) -> Architecture:
    """GPT-Neo, TinyStories (Black et al. 2021, Eldan & Li 2023): scores unscaled; some windows."""
    refuse_unknown("GPT-Neo", config, _NEO)
    windows = {"global": None, "local": config.window_size}
    blocks = tuple(
        _block(block, 1.0, window=windows[kind])
        for block, kind in zip(bridge.blocks, config.attention_layers, strict=True)
    )
    return _decoder(bridge, config, blocks)


def opt(bridge: Any, config: Any) -> Architecture:
    """OPT (Zhang et al. 2022): ReLU, positions that begin at row 2 of their table."""
    refuse_unknown("OPT", config, _OPT)
    if not config.do_layer_norm_before or config.word_embed_proj_dim != config.hidden_size:
        raise ValueError(
            f"OPT: do_layer_norm_before={config.do_layer_norm_before}, "
            f"word_embed_proj_dim={config.word_embed_proj_dim} with hidden_size="
            f"{config.hidden_size}: norms of the residual stream itself, and embeddings of another "
            "width (opt-350m), leave no sum of writers; use another size, such as opt-125m"
        )
    blocks = tuple(_block(block, part(block.attn).scaling) for block in bridge.blocks)
    described = _decoder(bridge, config, blocks)
    return replace(described, position=_FromRowTwo(part(bridge.pos_embed)))


class _FromRowTwo(nn.Module):
    """OPT's positions by their number; its own module wants a mask beside them."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table

    def forward(self, positions: Tensor) -> Tensor:
        return self.table(None, position_ids=positions)


def gpt_neox(bridge: Any, config: Any) -> Architecture:
    """GPT-NeoX, Pythia (Black et al. 2022, Biderman et al. 2023): parallel or not; part rotary."""
    refuse_unknown("GPT-NeoX", config, _NEOX)
    turned = rotary("GPT-NeoX", bridge, config)
    blocks = tuple(_block(block, part(block.attn).scaling, turned) for block in bridge.blocks)
    return _decoder(bridge, config, blocks, parallel=config.use_parallel_residual)


def gptj(bridge: Any, config: Any) -> Architecture:
    """GPT-J (Wang & Komatsuzaki 2021): parallel blocks with one norm, rotary in adjacent pairs."""
    return _gptj("GPT-J", bridge, config)


def codegen(bridge: Any, config: Any) -> Architecture:
    """CodeGen (Nijkamp et al. 2022): GPT-J with fused projections."""
    return _gptj("CodeGen", bridge, config)


def _gptj(family: str, bridge: Any, config: Any) -> Architecture:
    refuse_unknown(family, config, _COMMON + "rotary_dim rotary")
    first = part(bridge.blocks[0].attn)

    def tables(positions: int, like: Tensor) -> tuple[Tensor, Tensor]:
        sin, cos = first.embed_positions[:positions].to(like).chunk(2, -1)  # each pair's angle once
        return cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)

    turned = Rotary(tables, pairs="adjacent")
    blocks = tuple(
        _block(block, 1.0 / part(block.attn).scale_attn, turned) for block in bridge.blocks
    )
    return _decoder(bridge, config, blocks, parallel=True)


def _block(
    block: Any, scale: float, turned: Rotary | None = None, window: int | None = None
) -> Block:
    """A block with LayerNorms; where there is one norm, attention and MLP share it."""
    mlp = part(block.mlp) or part(block)  # OPT's MLP is no module of its own
    return Block(
        norm1=layer_norm(block.ln1),
        attention=Attention(*qkvo(block.attn), scale=scale, window=window, rotary=turned),
        norm2=layer_norm(block.ln2 if "ln2" in block._modules else block.ln1),
        mlp=MLP(
            up=projection(getattr(block.mlp, "in")),
            down=projection(block.mlp.out),
            activation=activation(getattr(mlp, "act", None) or mlp.activation_fn),
        ),
    )


def _decoder(
    bridge: Any,
    config: Any,
    blocks: tuple[Block, ...],
    *,
    parallel: bool = False,
) -> Architecture:
    """The whole model; without rotary positions it has a learned table of them."""
    n_heads = config.num_attention_heads
    return Architecture(
        graph=Graph(config.num_hidden_layers, n_heads, parallel=parallel),
        blocks=blocks,
        token=part(bridge.embed),
        position=part(bridge.pos_embed) if blocks[0].attention.rotary is None else None,
        final_norm=layer_norm(bridge.ln_final),
        unembed=projection(bridge.unembed),
        head_width=config.hidden_size // n_heads,
        context=config.max_position_embeddings,
    )
