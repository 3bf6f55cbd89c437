"""Python imports this at start from the first folder of PYTHONPATH: here that is every process of SGLang.

PyPI's torchvision is a CUDA build. On a torch without CUDA it finds no library of operators, and stops at the two whose
shapes it describes itself, because torch knows no such names. Their schemas are enough for it, and nothing calls them.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

_KEPT: list[object] = []  # schemas live as long as the object that defined them


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Defines the schemas when torchvision is about to be imported: a process without it need not pay for torch."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name == "torchvision" and not _KEPT:
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _KEPT.append(library)
        return None  # the usual finders find it


sys.meta_path.insert(0, _BeforeTorchvision())
