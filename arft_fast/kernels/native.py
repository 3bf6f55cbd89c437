"""The native library (``csrc/arft.h``), loaded through ctypes.

A wheel holds it beside the package's modules. An editable install leaves it in site-packages while the modules stay in
the source tree; both folders are then on the package's ``__path__``, so that is where it is looked up.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

ABI_VERSION = 1
"""``ARFT_ABI_VERSION`` of the header that this file mirrors."""

_FILE_NAME = "libarft.dylib" if sys.platform == "darwin" else "libarft.so"
_BUILD = "build it with `pip install .` (or `pip install -e .`) from the source tree"
_SCALES = {"none": 0, "group": 1, "batch": 2}
_ERRORS = {
    1: "a required pointer is NULL",
    2: "a size is out of range",
    3: "offsets do not rise from 0 to the number of rows",
    4: "unknown scale",
    5: "epsilon is not a positive finite number",
}
_POINTER, _INT64, _INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


@cache
def library_path() -> Path | None:
    """Where the built library lies, or None when the package was not installed from a build."""
    package = (__package__ or "").rpartition(".")[0]
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations if spec else None) or []
    return next((path for folder in folders if (path := Path(folder) / _FILE_NAME).is_file()), None)


def available() -> bool:
    """Whether the native library is built."""
    return library_path() is not None


@cache
def _library() -> ctypes.CDLL:
    path = library_path()
    if path is None:
        raise RuntimeError(f"the native library {_FILE_NAME} is not built; {_BUILD}, or pass impl='reference'")
    library = ctypes.CDLL(str(path))
    library.arft_abi_version.argtypes, library.arft_abi_version.restype = [], _INT32
    built = library.arft_abi_version()
    if built != ABI_VERSION:
        raise RuntimeError(f"{path} has ABI version {built}, this package needs {ABI_VERSION}; re{_BUILD}")
    library.arft_group_advantage_f32.argtypes = [
        *(_POINTER, _POINTER, _POINTER, _INT64, _INT64, _INT64, _INT32, ctypes.c_double),
        *(_POINTER, _POINTER, _POINTER, _POINTER),
    ]
    library.arft_group_advantage_f32.restype = _INT32
    return library


def group_advantage(
    rewards: Tensor, offsets: Tensor, weights: Tensor | None, scale: str, epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``arft_group_advantage_f32`` on CPU tensors; arguments and results as in ``reference.group_advantage``.

    Raises:
        RuntimeError: the library is not built or stale, or refuses the arguments (a caller's invariant is broken).
    """
    rewards, offsets = rewards.detach().contiguous(), offsets.contiguous()
    weights = None if weights is None else weights.detach().contiguous()
    tensors = (rewards, offsets) if weights is None else (rewards, offsets, weights)
    assert [t.dtype for t in tensors] == [torch.float32, torch.int64, torch.float32][: len(tensors)], "see arft.h"
    assert all(t.device.type == "cpu" for t in tensors), "the library reads host memory"
    rows, components = rewards.shape
    groups = offsets.numel() - 1
    advantages, mean, std = (rewards.new_empty(size) for size in (rows, groups, groups))
    no_signal = torch.empty(groups, dtype=torch.bool)
    status = _library().arft_group_advantage_f32(
        rewards.data_ptr(),
        None if weights is None else weights.data_ptr(),
        offsets.data_ptr(),
        rows,
        components,
        groups,
        _SCALES[scale],
        epsilon,
        *(out.data_ptr() for out in (advantages, mean, std, no_signal)),
    )
    if status != 0:
        raise RuntimeError(f"arft_group_advantage_f32: {_ERRORS.get(status, f'unknown status {status}')}")
    return advantages, mean, std, no_signal
