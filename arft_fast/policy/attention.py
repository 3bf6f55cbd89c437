"""Grouped-query attention over a cache without copying keys and values for every query head.

transformers' ``sdpa`` repeats each key/value head once for every query head that shares it as soon as a mask is given,
so a decoding step copies the whole cache several times over. With few queries the group can be folded into the query
axis instead: the same products, nothing repeated.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "grouped_sdpa"


def grouped_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """``sdpa`` of transformers; with a mask, query heads of a group share their keys and values in place.

    Args:
        query: [B, H, T, d]; key, value: [B, H / r, L, d]; attention_mask: [B, 1, T, L] or None.

    Returns:
        [B, T, H, d] and None, as transformers' attention functions do.
    """
    batch, heads, length, width = query.shape
    repeats = heads // key.shape[1]
    if attention_mask is None or repeats == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    # Query head h uses key head h // r: [B, H, T, d] is [B, H / r, r * T, d] as it lies in memory.
    folded = query.reshape(batch, heads // repeats, repeats * length, width)
    mask = attention_mask.repeat(1, 1, repeats, 1)
    output = scaled_dot_product_attention(
        folded, key, value, attn_mask=mask, dropout_p=options.get("dropout", 0.0), scale=options.get("scaling")
    )
    return output.reshape(batch, heads, length, width).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, grouped_sdpa)
