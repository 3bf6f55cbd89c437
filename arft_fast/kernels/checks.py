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

Kind = Literal["floating", "integer"]
_INTEGERS = (torch.int64, torch.int32)


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
        if not (value.dtype.is_floating_point if kind == "floating" else value.dtype in _INTEGERS):
            remedy = "cast it with .float()" if kind == "floating" else "cast it with .long()"
            raise TypeError(f"{name}: expected a {kind} dtype, got {value.dtype}; {remedy}")
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


def on_host(value: Tensor) -> bool:
    """Whether reading ``value`` waits for no accelerator."""
    return value.device.type == "cpu"


def finite(name: str, value: Tensor, remedy: str) -> None:
    """Refuse NaN and infinity (CPU tensors only)."""
    if on_host(value) and not bool(value.isfinite().all()):
        row = int((~value.isfinite()).nonzero()[0, 0])
        raise ValueError(f"{name}: row {row} is not finite; {remedy}")


def token_range(name: str, value: Tensor, vocabulary: int) -> None:
    """Refuse ids outside 0 .. vocabulary - 1 (CPU tensors only)."""
    if value.numel() and on_host(value):
        low, high = (int(v) for v in value.aminmax())
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"{name}: ids must lie in 0 .. {vocabulary - 1} (rows of weight), got {low} .. {high}; "
                "leave padding rows out instead of marking them with an id"
            )


def head(arguments: Arguments, hidden: Tensor, weight: Tensor, token_ids: Tensor, bias: Tensor | None) -> None:
    """Check the tensors that every function on the vocabulary head takes: shapes first, then values."""
    arguments.tensor("hidden", hidden, "N D", "floating")
    arguments.tensor("weight", weight, "V D", "floating")
    arguments.tensor("token_ids", token_ids, "N", "integer")
    if weight.shape[0] == 0:
        raise ValueError("weight: has no rows (V is 0); pass the whole lm_head.weight (gather it if it is sharded)")
    token_range("token_ids", token_ids, weight.shape[0])
    if bias is not None:
        arguments.tensor("bias", bias, "V", "floating")
        logit_bias("bias", bias)


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


def positive_int(name: str, value: int) -> None:
    """Refuse what is not an integer > 0."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value <= 0:
        raise ValueError(f"{name}: must be > 0, got {value}")


def choice(name: str, value: str, allowed: Collection[str]) -> None:
    """Refuse what is not one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}: must be one of {', '.join(map(repr, allowed))}, got {value!r}")
