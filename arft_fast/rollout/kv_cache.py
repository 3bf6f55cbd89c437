"""Keys and values of many sequences in fixed slots, presented to a transformers model as its cache.

Dimension letters: S slots, C capacity in tokens, B rows of one forward pass, T new tokens a row, L visible tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class SlotCache:
    """Storage [S, kv heads, C, head dim] a layer; a row's tokens lie at the front of its slot, in order."""

    def __init__(self, config: Any, *, slots: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        heads = config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (slots, heads, capacity, head_dim)
        # Zeros, not empty: a masked column still meets a zero weight, and 0 * NaN is NaN.
        self._keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self._values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of slot ``source`` to slot ``target``."""
        for storage in (*self._keys, *self._values):
            storage[target, :, :length] = storage[source, :, :length]

    def view(self, slots: Tensor | None, columns: Tensor, visible: int) -> CacheView:
        """The cache of one forward pass.

        Args:
            slots: [B] slot of each row; None: row b is slot b, and nothing is gathered.
            columns: [B, T] where each new token is written.
            visible: L, how many columns the pass attends to.
        """
        return CacheView(self._keys, self._values, slots, columns, visible)


class CacheView:
    """What an attention layer sees as ``past_key_values``: it writes the new tokens and returns the visible ones."""

    def __init__(
        self, keys: list[Tensor], values: list[Tensor], slots: Tensor | None, columns: Tensor, visible: int
    ) -> None:
        self._keys, self._values = keys, values
        self._slots, self._visible = slots, visible
        rows = torch.arange(len(columns), device=columns.device) if slots is None else slots
        self._where = (rows[:, None], slice(None), columns)

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write ``key`` and ``value`` [B, heads, T, head dim]; return the rows' visible [B, heads, L, head dim]."""
        return self._write(self._keys[layer], key), self._write(self._values[layer], value)

    def _write(self, storage: Tensor, new: Tensor) -> Tensor:
        storage[self._where] = new.transpose(1, 2)  # indexed dimensions come first: [B, T, heads, head dim]
        rows = storage if self._slots is None else storage[self._slots]
        return rows[:, :, : self._visible]
