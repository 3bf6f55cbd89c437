"""The language model's attention, registered with transformers: trees of shared prefixes, and a cache without copies.

transformers' ``sdpa`` repeats each key/value head once for every query head that shares it as soon as a mask is given,
so a decoding step copies the whole cache several times over. With few queries the group can be folded into the query
axis instead: the same products, nothing repeated.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from arft_fast.kernels.attention_tree import AttentionTree
from arft_fast.kernels.prefix_attention import prefix_attention

NAME = "arft_sdpa"  # transformers hands over to FlashAttention's packing wherever a name contains "flash"


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree: AttentionTree | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """``sdpa`` of transformers; over a ``tree`` a row sees its ancestors, and grouped query heads share their keys.

    Args:
        query: [B, H, T, d]; key, value: [B, H / r, L, d]; attention_mask: [B, 1, T, L] or None.
        tree: B is 1 and T = L are its rows; a mask is not looked at then.

    Returns:
        [B, T, H, d] and None, as transformers' attention functions do.
    """
    if tree is not None:
        scale = options.get("scaling")
        return prefix_attention(query, key, value, tree, scale=scale).transpose(1, 2).contiguous(), None
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


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)  # None for plain causal attention; a mask for a sliding window
