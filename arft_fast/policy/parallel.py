"""Data-parallel ranks under torchrun: each rank rolls out its own prompts, gradients are summed, weights stay equal.

A loss is divided by global denominators before ``backward``, so that a sum over ranks is the whole batch's gradient.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among its peers."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def initialise(cls, device: str = "auto") -> Ranks:
        """Join the process group that torchrun describes; alone when there is none.

        Args:
            device: ``auto`` (a GPU when there is one), ``cpu`` or ``cuda``.
        """
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(place)
        if world > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
        return cls(rank=rank, world=world, device=place)

    @property
    def main(self) -> bool:
        """True on the one rank that writes to the terminal and the run folder."""
        return self.rank == 0

    def share(self, items: Sequence[Any]) -> Sequence[Any]:
        """This rank's contiguous part of ``items``; the parts differ by at most one item."""
        bounds = [len(items) * k // self.world for k in range(self.world + 1)]
        return items[bounds[self.rank] : bounds[self.rank + 1]]

    def gather(self, items: list[Any]) -> list[Any]:
        """All ranks' ``items`` in rank order, on every rank."""
        if self.world == 1:
            return items
        parts: list[list[Any]] = [[] for _ in range(self.world)]
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def sum(self, *values: float) -> list[float]:
        """Element-wise sum over ranks, in double precision."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(total)
        return [float(v) for v in total]

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum gradients over ranks in place; a parameter that got none on this rank counts as zero."""
        if self.world == 1:
            return
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat: Tensor = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        for parameter, summed in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
            parameter.grad = summed.view_as(parameter)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def close(self) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()
