"""Argument checks that the public functions share: each error names the argument and the remedy.

Checks of shape, dtype and device cost no arithmetic and always run. Checks of values read the tensor, and on a CUDA
device that would wait for everything queued before it: they run on CPU tensors only.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from .rows import Transform

Kind = Literal["floating", "integer", "boolean"]
_INTEGERS = (torch.int64, torch.int32)
_CASTS = {"floating": ".float()", "integer": ".long()", "boolean": ".bool()"}


class Arguments:
    """The tensor arguments of one call, checked against each other in the order in which they are given."""

    def __init__(self) -> None:
        self._sizes: dict[str, tuple[int, str]] = {}  # dimension letter -> size and the argument that fixed it
        self._device: tuple[torch.device, str] | None = None

    def tensor(self, name: str, value: Tensor, dims: str, kind: Kind) -> None:
        """Check one tensor; ``dims`` holds a letter per dimension (``"N D"``), a letter means one size everywhere.

        Raises:
            TypeError: not a tensor, or not of ``kind``.
            ValueError: another shape, or another device than the tensors before it.
        """
        letters = dims.split()
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor [{', '.join(letters)}], got {type(value).__name__}")
        if not _is(value.dtype, kind):
            raise TypeError(f"{name}: expected a {kind} dtype, got {value.dtype}; cast it with {_CASTS[kind]}")
        whole(name, value)
        if value.dim() != len(letters):
            raise ValueError(f"{name}: expected shape [{', '.join(letters)}], got {list(value.shape)}; reshape it")
        for letter, size in zip(letters, value.shape, strict=True):
            known, source = self._sizes.setdefault(letter, (size, name))
            if size != known:
                raise ValueError(
                    f"{name}: expected shape [{', '.join(letters)}] with {letter}={known} (from {source}), "
                    f"got {list(value.shape)}; pass {name} and {source} of the same {letter}"
                )
        device, source = self._device = self._device or (value.device, name)
        if value.device != device:
            raise ValueError(
                f"{name}: is on {value.device} but {source} on {device}; move it with .to({source}.device)"
            )

    def size(self, letter: str) -> int:
        """The size that earlier tensors gave to a dimension."""
        return self._sizes[letter][0]

    def offsets(self, name: str, value: Tensor, count: str, letter: str) -> None:
        """Check offsets [count + 1] that rise from 0 to the size of ``letter`` (their values on a CPU only)."""
        self.tensor(name, value, f"{count}+1", "integer")
        end, source = self._sizes[letter]
        if value.numel() == 0:
            raise ValueError(f"{name}: is empty; offsets start with 0 and end with {letter}={end}")
        self._sizes.setdefault(count, (value.numel() - 1, name))
        if not on_host(value):
            return
        if int(value[0]) != 0 or int(value[-1]) != end:
            raise ValueError(
                f"{name}: must start at 0 and end at {letter}={end} (from {source}), got {int(value[0])} .. "
                f"{int(value[-1])}; pass the cumulative sum of the lengths with a leading 0"
            )
        if bool((value.diff() < 0).any()):
            raise ValueError(f"{name}: must not decrease; pass the cumulative sum of the lengths with a leading 0")


def _is(dtype: torch.dtype, kind: Kind) -> bool:
    if kind == "floating":
        return dtype.is_floating_point
    return dtype == torch.bool if kind == "boolean" else dtype in _INTEGERS


def whole(name: str, value: Tensor) -> None:
    """Refuse a tensor of which this rank holds a part only: products with a shard would be silently wrong."""
    if hasattr(value, "full_tensor"):
        raise ValueError(
            f"{name}: is a DTensor, sharded over ranks; call this inside the forward of the module that owns it, where "
            "FSDP has gathered it, or pass .full_tensor(grad_placements=[Partial()]), which gathers it here and sums "
            "its gradient over the ranks in the backward pass"
        )
    if hasattr(value, "ds_id") and value.numel() == 0:
        raise ValueError(
            f"{name}: is partitioned by DeepSpeed ZeRO-3 and empty on this rank; gather it around forward and backward "
            "with deepspeed.zero.GatheredParameters"
        )


def on_host(value: Tensor) -> bool:
    """Whether reading ``value`` waits for no accelerator; a tracer's tensors are subclasses and hold no values."""
    plain = type(value) in (Tensor, torch.nn.Parameter)
    return plain and value.device.type == "cpu" and not torch.compiler.is_compiling()


def finite(name: str, value: Tensor, remedy: str, where: Tensor | None = None) -> None:
    """Refuse NaN and infinity (CPU tensors only), looking only at rows in ``where``."""
    if not on_host(value):
        return
    bad = ~value.isfinite() if where is None else ~value.isfinite() & where
    if bool(bad.any()):
        raise ValueError(f"{name}: row {int(bad.nonzero()[0, 0])} is not finite; {remedy}")


def not_negative(name: str, value: Tensor, where: Tensor | None = None) -> None:
    """Refuse values below 0 (CPU tensors only), looking only at rows in ``where``."""
    if not on_host(value):
        return
    bad = value < 0 if where is None else (value < 0) & where
    if bool(bad.any()):
        raise ValueError(f"{name}: row {int(bad.nonzero()[0, 0])} is negative; pass weights >= 0")


def token_range(name: str, value: Tensor, vocabulary: int) -> None:
    """Refuse ids outside 0 .. vocabulary - 1 (CPU tensors only)."""
    if value.numel() and on_host(value):
        low, high = (int(v) for v in value.aminmax())
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"{name}: ids must lie in 0 .. {vocabulary - 1} (rows of weight), got {low} .. {high}; "
                "leave padding rows out instead of marking them with an id"
            )


def row_range(name: str, value: Tensor, rows: int) -> None:
    """Refuse row numbers outside 0 .. rows - 1 (CPU tensors only)."""
    if value.numel() and on_host(value):
        low, high = (int(v) for v in value.aminmax())
        if low < 0 or high >= rows:
            raise ValueError(
                f"{name}: must lie in 0 .. {rows - 1} (there are {rows} rows of hidden), got {low} .. {high}; "
                "number the rows that you pass, and leave tokens without a row out"
            )


def row_numbers(arguments: Arguments, value: Tensor | None) -> Tensor | None:
    """``row_index`` [N] into the M rows of hidden, checked, as int64."""
    if value is None:
        return None
    arguments.tensor("row_index", value, "N", "integer")
    row_range("row_index", value, arguments.size("M"))
    return value.long()


def head(
    arguments: Arguments, hidden: Tensor, weight: Tensor, token_ids: Tensor, bias: Tensor | None, rows: str = "N"
) -> None:
    """Check the tensors that every function on the vocabulary head takes: shapes first, then values."""
    arguments.tensor("hidden", hidden, f"{rows} D", "floating")
    arguments.tensor("weight", weight, "V D", "floating")
    arguments.tensor("token_ids", token_ids, rows, "integer")
    if weight.shape[0] == 0:
        raise ValueError("weight: has no rows (V is 0); pass the whole lm_head.weight (gather it if it is sharded)")
    token_range("token_ids", token_ids, weight.shape[0])
    if bias is not None:
        arguments.tensor("bias", bias, "V", "floating")
        logit_bias("bias", bias)


def allowed(token_ids: Tensor, bias: Tensor | None) -> None:
    """Refuse sampled ids that the bias forbids (CPU tensors only)."""
    if bias is not None and on_host(bias) and not bool(bias[token_ids].isfinite().all()):
        raise ValueError("token_ids: holds an id that bias forbids; sample with the same bias")


def transform(temperature: float, softcap: float | None, logit_scale: float) -> Transform:
    """What turns products into logits, checked."""
    number("temperature", temperature)
    number("logit_scale", logit_scale)
    if softcap is not None:
        number("softcap", softcap)
    return Transform(float(temperature), float(softcap or 0.0), float(logit_scale))


def budgets(chunk_bytes: int | None, stash_bytes: int | None, default: int) -> tuple[int, int]:
    """Budgets of a chunk and of the stash, checked; the stash defaults to one chunk."""
    chunk_bytes = default if chunk_bytes is None else chunk_bytes
    stash_bytes = chunk_bytes if stash_bytes is None else stash_bytes
    positive_int("chunk_bytes", chunk_bytes)
    positive_int("stash_bytes", stash_bytes, zero=True)
    return chunk_bytes, stash_bytes


def logit_bias(name: str, value: Tensor) -> None:
    """Refuse NaN, +inf and a bias that forbids every id (CPU tensors only)."""
    if on_host(value) and not (bool((value < math.inf).all()) and bool((value > -math.inf).any())):
        raise ValueError(f"{name}: must be finite, or -inf for forbidden ids, with one finite entry at least")


def number(name: str, value: float, *, zero: bool = False) -> None:
    """Refuse what is not a finite number > 0 (``zero``: >= 0)."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name}: must be finite and {'>= 0' if zero else '> 0'}, got {value}")


def positive_int(name: str, value: int, *, zero: bool = False) -> None:
    """Refuse what is not an integer > 0 (``zero``: >= 0)."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name}: must be {'>= 0' if zero else '> 0'}, got {value}")


def pair(name: str, value: tuple[float, float]) -> None:
    """Refuse what is not two numbers."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{name}: expected two numbers, got {value!r}")


def choice(name: str, value: str, allowed: Collection[str]) -> None:
    """Refuse what is not one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}: must be one of {', '.join(map(repr, allowed))}, got {value!r}")
