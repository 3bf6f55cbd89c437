"""Stands in for SGLang's compiled kernels, whose wheel is for CUDA: every name can be imported, none can be called.

SGLang imports kernels by name wherever some model or device may want one, and on a CPU computes with torch instead. A
module that does not import is skipped in silence, the image processor of Qwen's models too, so every name has to be
there. A call of one is an error that names it, not a wrong number.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

import torch

__version__ = "0.4.7"


class Absent:
    """A kernel that is not here."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *arguments: Any, **named: Any) -> NoReturn:
        raise NotImplementedError(f"{self._name} is a compiled kernel of SGLang, which a CPU has not")

    def __getattr__(self, name: str) -> Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self._name}.{name}")


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self.__name__}.{name}")


class _Submodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """``import sgl_kernel.anything``."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.startswith("sgl_kernel.") else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


class _Operators:
    """``torch.ops.sgl_kernel``: SGLang binds CPU kernels while it is imported, and calls them on AMX machines only.

    It takes a machine for one where ``convert_weight_packed`` is here, so only names that end in ``_cpu`` may be.
    """

    def __getattr__(self, name: str) -> Absent:
        if not name.endswith("_cpu"):
            raise AttributeError(name)
        return Absent(f"torch.ops.sgl_kernel.{name}")


def __getattr__(name: str) -> Absent:
    if name.startswith("__"):
        raise AttributeError(name)
    return Absent(f"sgl_kernel.{name}")


sys.meta_path.append(_Submodules())
torch.ops.sgl_kernel = _Operators()  # type: ignore[assignment]
