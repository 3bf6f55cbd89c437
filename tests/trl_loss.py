"""TRL's own ``GRPOTrainer._compute_loss``, run unbound on a stand-in for its trainer."""

from __future__ import annotations

import types
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from .packing import Batch, gradients

LOW, HIGH = 0.2, 0.28
SAPO = (0.75, 1.25)
"""Temperatures that float32, to which TRL rounds them, holds exactly."""
EXTRA = 3
"""The longest completion allowed, beyond the longest of the batch."""
ITEMS = torch.tensor(37.0, dtype=torch.float64)
"""Tokens of all completions that were generated at once ..."""
PROCESSES, STEPS = 2, 4
"""... by so many processes, for so many calls of the loss."""


@dataclass(frozen=True)
class Settings:
    """A row of the test matrix, in TRL's words."""

    loss_type: str = "grpo"
    level: str = "token"
    off_policy: bool = True
    beta: float = 0.0
    correct_kl: bool = False
    delta: float | None = None
    weights: str | None = None
    """Level of the sampler's importance weights."""
    quantile: float = 1.0
    entropy_coef: float = 0.0
    accumulation: int = 2


class Accelerator:
    """One process that says it is one of several: TRL divides by the share of each in the tokens."""

    num_processes = PROCESSES
    sync_gradients = True

    @staticmethod
    def gather(value: Tensor) -> Tensor:
        return value

    @staticmethod
    def reduce(value: Tensor, reduction: str) -> Tensor:
        assert reduction == "sum"
        return value

    @staticmethod
    def pad_across_processes(value: Tensor, dim: int, pad_index: float) -> Tensor:
        return value


def stand_in(settings: Settings, batch: Batch) -> types.SimpleNamespace:
    """What ``_compute_loss`` reads of a trainer."""
    trainer = types.SimpleNamespace(
        args=types.SimpleNamespace(
            delta=settings.delta,
            use_bias_correction_kl=settings.correct_kl,
            sapo_temperature_pos=SAPO[0],
            sapo_temperature_neg=SAPO[1],
            steps_per_generation=STEPS,
        ),
        model=types.SimpleNamespace(training=True),
        accelerator=Accelerator(),
        loss_type=settings.loss_type,
        importance_sampling_level=settings.level,
        epsilon_low=LOW,
        epsilon_high=1 + HIGH if settings.loss_type == "cispo" else HIGH,
        beta=settings.beta,
        top_entropy_quantile=settings.quantile,
        off_policy_mask_threshold=None,
        use_vllm=settings.weights is not None,
        vllm_importance_sampling_correction=True,
        max_completion_length=batch.ids.shape[1] + EXTRA,
        current_gradient_accumulation_steps=settings.accumulation,
        _entropy_bonus_enabled=settings.entropy_coef > 0,
        use_adaptive_entropy=False,
        entropy_coef=settings.entropy_coef,
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (*batch.logprobs(), None),
    )
    trainer.get_high_entropy_mask = types.MethodType(GRPOTrainer.get_high_entropy_mask, trainer)
    return trainer


def run_trl(settings: Settings, batch: Batch, weights: Tensor | None) -> tuple[Tensor, Any, dict[str, list[float]]]:
    """TRL's loss, gradients and logged metrics."""
    trainer = stand_in(settings, batch)
    empty = batch.ids[:, :0]
    inputs = {
        "prompt_ids": empty,
        "prompt_mask": empty,
        "completion_ids": batch.ids,
        "completion_mask": batch.completion.long(),
        "tool_mask": batch.sampled.long(),
        "advantages": batch.advantages,
        "num_items_in_batch": ITEMS,
        "ref_per_token_logps": batch.ref,
        "old_per_token_logps": batch.old if settings.off_policy else None,
        "importance_sampling_ratio": weights,
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss.detach(), gradients(batch, loss), trainer._metrics["train"]
