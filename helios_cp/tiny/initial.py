"""Fresh weights of the embedded transformer, from which training soon finds what a video needs: to go on as it was."""

from __future__ import annotations

import torch

from helios_cp.config.checkpoint import TransformerConfig
from helios_cp.model.layers import SelfAttention
from helios_cp.model.transformer import HeliosTransformer

CONFIG = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "rope_dim": [12, 10, 10],
    "rope_theta": 100.0,
    "ffn_dim": 512,
    "num_layers": 4,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 64,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "guidance_cross_attn": True,
    "zero_history_timestep": True,
    "has_multi_term_memory_patch": True,
    "is_amplify_history": True,
    "history_scale_mode": "per_head",
}
COPYING_HEAD = 3
"""Of every layer but the last."""
PAIRS = {2: 0.6, 3: 1.2, 4: 1.2, 6: 2.7, 7: 3.6, 8: 1.8, 11: 2.7, 12: 3.6, 13: 1.8}
"""Channel pairs of the copying head, with what each adds to the score of the token at the same place: of frames, those
that turn slowly enough to tell the last frame from the anchor; of rows and columns, three each."""
BIAS = 4.0
"""Before the norm: more than other channels have, so that the head stays sharp as they grow."""


def make_transformer() -> HeliosTransformer:
    """Outputs start at 0, gates at one half, and history keys are barely amplified, but for the heads that copy.

    The usual start of `history_key_scale` multiplies untrained history by 7.6.
    """
    model = HeliosTransformer(TransformerConfig.from_dict(CONFIG))
    with torch.no_grad():
        for parameter in (*model.proj_out.parameters(), model.condition_embedder.time_proj.bias):
            parameter.zero_()
        model.condition_embedder.time_proj.weight.normal_(std=0.01)
        model.norm_out.scale_shift_table.zero_()
        for block in model.blocks:
            block.scale_shift_table.zero_()[:, 2::3] = 0.5
            block.attn1.history_key_scale.fill_(-4.0)
        model.patch_short.load_state_dict(model.patch_embedding.state_dict())
        for block in model.blocks[:-1]:
            _look_at_the_same_place(block.attn1)
    return model


def _look_at_the_same_place(attention: SelfAttention) -> None:
    """Have a head's noisy tokens look at the history's last frame, where they are themselves, whatever they hold.

    Queries and keys are constant, so a score is the sum of cos(frequency · distance) over the head's channel pairs.
    Without such a head, and with an embedding of the history that drops its details, 11,000 steps of training did not
    find that the next frame looks like the last one.
    """
    dim = attention.norm_q.weight.numel()
    width = dim // attention.heads
    head = slice(COPYING_HEAD * width, (COPYING_HEAD + 1) * width)
    scores = torch.zeros(width // 2)
    scores[list(PAIRS)] = torch.tensor(list(PAIRS.values()))
    first = torch.arange(0, width, 2)  # of each pair; the second stays 0
    for part, norm in enumerate((attention.norm_q, attention.norm_k)):
        rows = slice(part * dim + head.start, part * dim + head.stop)
        attention.to_qkv.weight[rows] = 0
        attention.to_qkv.bias[rows] = 0
        attention.to_qkv.bias[rows][first] = BIAS * (scores > 0)
        norm.weight[head][first] = torch.where(scores > 0, (scores * width**0.5).sqrt(), 1.0)
    attention.history_key_scale[COPYING_HEAD] = -2.0
