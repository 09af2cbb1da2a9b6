"""GPT-2 and its parallel successors: LayerNorm, plain MLPs, as many key-value heads as heads."""

from __future__ import annotations

from typing import Any

from torch import Tensor

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


def gpt_neox(bridge: Any, config: Any) -> Architecture:
    """GPT-NeoX, Pythia (Black et al. 2022, Biderman et al. 2023): parallel or not; part rotary."""
    refuse_unknown("GPT-NeoX", config, _NEOX)
    blocks = tuple(_block(block, part(block.attn).scaling) for block in bridge.blocks)
    positions = rotary("GPT-NeoX", bridge, config)
    return _decoder(bridge, config, blocks, positions, parallel=config.use_parallel_residual)


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

    blocks = tuple(_block(block, 1.0 / part(block.attn).scale_attn) for block in bridge.blocks)
    return _decoder(bridge, config, blocks, Rotary(tables, pairs="adjacent"), parallel=True)


def _block(block: Any, scale: float) -> Block:
    """A block with LayerNorms; where there is one norm, attention and MLP share it."""
    return Block(
        norm1=layer_norm(block.ln1),
        attention=Attention(*qkvo(block.attn), scale=scale),
        norm2=layer_norm(block.ln2 if "ln2" in block._modules else block.ln1),
        mlp=MLP(
            up=projection(getattr(block.mlp, "in")),
            down=projection(block.mlp.out),
            activation=activation(part(block.mlp).act),
        ),
    )


def _decoder(
    bridge: Any,
    config: Any,
    blocks: tuple[Block, ...],
    positions: Rotary | None = None,
    *,
    parallel: bool = False,
) -> Architecture:
    """The whole model; without rotary positions it has a learned table of them."""
    n_heads = config.num_attention_heads
    return Architecture(
        graph=Graph(config.num_hidden_layers, n_heads, parallel=parallel),
        blocks=blocks,
        token=part(bridge.embed),
        position=part(bridge.pos_embed) if positions is None else None,
        rotary=positions,
        final_norm=layer_norm(bridge.ln_final),
        unembed=projection(bridge.unembed),
        head_width=config.hidden_size // n_heads,
        context=config.max_position_embeddings,
    )
