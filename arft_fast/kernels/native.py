"""The native libraries (``csrc/arft.h``), loaded through ctypes: one for the CPU, one for CUDA where nvcc was found.

A wheel holds them beside the package's modules. An editable install leaves them in site-packages while the modules stay
in the source tree; both folders are then on the package's ``__path__``, so that is where they are looked up.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .group_advantage_reference import Normalization

ABI_VERSION = 2
"""``ARFT_ABI_VERSION`` of the header that this file mirrors."""

_FILE_NAME = "libarft.dylib" if sys.platform == "darwin" else "libarft.so"
_CUDA_FILE_NAME = "libarft_cuda.so"
_BUILD = "build it with `pip install .` (or `pip install -e .`) from the source tree"
_CENTERS = {"none": 0, "mean": 1, "leave_one_out": 2}
_SCALES = {"none": 0, "group": 1, "batch": 2}
_ORDERS = {"sum_then_normalize": 0, "normalize_then_sum": 1}
CUDA_ERROR = 11
"""``ARFT_CUDA_ERROR``: ``arft_cuda_last_error`` knows more."""
_ERRORS = {
    1: "a required pointer is NULL",
    2: "a size is out of range",
    3: "offsets do not rise from 0 to the number of rows",
    4: "unknown center, scale or order, or std_floor is negative or not finite",
    5: "epsilon is not a positive finite number",
    6: "these dtypes are not taken",
    7: "a token id lies outside the vocabulary",
    8: "temperature and logit_scale must be positive and finite, softcap zero or positive and finite",
    9: "unknown surrogate, kl or sampler correction",
    10: "the instruction set is not in this build or not in this CPU",
    CUDA_ERROR: "the CUDA runtime refused",
    12: "a gate is no component",
}
_POINTER, _INT64, _INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class _Normalization(ctypes.Structure):
    """``arft_normalization``."""

    _fields_ = (
        *((name, _INT32) for name in ("center", "scale", "order", "whiten")),
        *((name, ctypes.c_double) for name in ("std_floor", "epsilon")),
    )


def _find(file_name: str) -> Path | None:
    package = (__package__ or "").rpartition(".")[0]
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations if spec else None) or []
    return next((path for folder in folders if (path := Path(folder) / file_name).is_file()), None)


@cache
def library_path() -> Path | None:
    """Where the built library lies, or None when the package was not installed from a build."""
    return _find(_FILE_NAME)


@cache
def cuda_library_path() -> Path | None:
    """Where the built CUDA library lies, or None when the build found no nvcc."""
    return _find(_CUDA_FILE_NAME)


def available() -> bool:
    """Whether the native library is built."""
    return library_path() is not None


def _publish_openmp() -> None:
    """Make the OpenMP runtime of this process visible to a library that is loaded after it.

    Ours is not linked to one: with a second runtime, two pools of threads would fight for the cores. torch brings the
    one that counts; without any, loops run in one thread.
    """
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return
    paths = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if "omp" in line}
    names = ("libgomp", "libiomp5", "libomp")
    runtimes = [path for path in paths if Path(path).name.split("-")[0].split(".")[0] in names]
    runtimes.sort(key=lambda path: ("/torch/" not in path, path))
    if runtimes:
        ctypes.CDLL(runtimes[0], ctypes.RTLD_GLOBAL)
    else:
        with suppress(OSError):  # none on this machine: one thread
            ctypes.CDLL("libgomp.so.1", ctypes.RTLD_GLOBAL)


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.arft_abi_version.argtypes, library.arft_abi_version.restype = [], _INT32
    built = library.arft_abi_version()
    if built != ABI_VERSION:
        raise RuntimeError(f"{path} has ABI version {built}, this package needs {ABI_VERSION}; re{_BUILD}")
    return library


@cache
def _library() -> ctypes.CDLL:
    path = library_path()
    if path is None:
        raise RuntimeError(f"the native library {_FILE_NAME} is not built; {_BUILD}, or pass impl='reference'")
    _publish_openmp()
    library = _load(path)
    library.arft_group_advantage_f32.argtypes = [
        *(_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _INT64, _INT64, _INT64),
        *(ctypes.POINTER(_Normalization), _POINTER, _POINTER, _POINTER, _POINTER, _POINTER),
    ]
    library.arft_group_advantage_f32.restype = _INT32
    library.arft_cpu_isa.argtypes, library.arft_cpu_isa.restype = [], _INT32
    library.arft_policy_rows.argtypes = [_POINTER, _POINTER, _POINTER, _INT32, _INT32]
    library.arft_policy_rows.restype = _INT32
    return library


@cache
def _cuda_library() -> ctypes.CDLL:
    path = cuda_library_path()
    if path is None:
        raise RuntimeError(f"the native library {_CUDA_FILE_NAME} is not built; {_BUILD} on a machine with nvcc")
    library = _load(path)
    library.arft_cuda_policy_rows.argtypes = [_POINTER, _POINTER, _POINTER, _INT32, _POINTER]
    library.arft_cuda_policy_rows.restype = _INT32
    library.arft_cuda_last_error.argtypes, library.arft_cuda_last_error.restype = [], ctypes.c_char_p
    return library


def error(status: int) -> str:
    """What an ``arft_status`` other than 0 says."""
    return _ERRORS.get(status, f"unknown status {status}")


def group_advantage(
    rewards: Tensor, offsets: Tensor, weights: Tensor | None, rule: Normalization
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
    assert len(rule.gate_by) == len(rule.gate_threshold) and len(rule.gate_by) in (0, components), "see arft.h"
    advantages, mean, std = (rewards.new_empty(size) for size in (rows, groups, groups))
    no_signal = torch.empty(groups, dtype=torch.bool)
    scratch = torch.empty(rows, dtype=torch.float64)
    settings = _Normalization(
        _CENTERS[rule.center], _SCALES[rule.scale], _ORDERS[rule.order], rule.whiten, rule.std_floor, rule.epsilon
    )
    status = _library().arft_group_advantage_f32(
        rewards.data_ptr(),
        None if weights is None else weights.data_ptr(),
        (_INT64 * components)(*rule.gate_by) if rule.gate_by else None,
        (ctypes.c_float * components)(*rule.gate_threshold) if rule.gate_by else None,
        offsets.data_ptr(),
        rows,
        components,
        groups,
        settings,
        *(array.data_ptr() for array in (scratch, advantages, mean, std, no_signal)),
    )
    if status != 0:
        raise RuntimeError(f"arft_group_advantage_f32: {_ERRORS.get(status, f'unknown status {status}')}")
    return advantages, mean, std, no_signal
