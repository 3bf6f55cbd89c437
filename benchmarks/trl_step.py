"""TRL's own whole GRPO step: its generation, rewards, advantages, reference scoring, loss and optimizer (trl 1.16).

A real ``GRPOTrainer`` without vLLM is handed rows of a vision-language data set, a prompt's row once a sample, as its
data loader hands them. It generates for all prompts at once, then trains on micro-batches of a group's size.

Dimension letters: B samples, G samples of a prompt.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch import nn
from trl import GRPOTrainer

from arft_fast.trajectory import Prompt, Trajectory

from .plain_rollout import ImageTextProcessor, encoded, one_turn
from .step_problem import even_share
from .train_problem import Models, TrainProblem, TrainShape
from .trl_update import apply_gradients, last_metrics, open_trainer


class Timed(GRPOTrainer):
    """A trainer that tells how long it last generated."""

    rollout_s = 0.0

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        start = time.perf_counter()
        found: tuple[Any, ...] = super()._generate(prompts)
        self.rollout_s = time.perf_counter() - start
        return found


class TrlStep:
    """One step at a time of TRL's trainer.

    Args:
        models: folders of the policy and of its reference.
        scratch: a folder for whatever the trainer writes.
        suppressed: ids that it may not sample.
    """

    def __init__(
        self,
        models: Models,
        scratch: Path,
        processor: ImageTextProcessor,
        shape: TrainShape,
        suppressed: Sequence[int],
        *,
        device: torch.device,
        dtype: torch.dtype,
        beta: float,
        learning_rate: float,
        total_steps: int,
    ) -> None:
        self._shape = shape
        self.trainer = open_trainer(
            *(Timed, models, scratch, processor, _reward),
            groups=shape.groups,
            samples=shape.samples,
            device=device,
            dtype=dtype,
            beta=beta,
            learning_rate=learning_rate,
            total_steps=total_steps,
            max_completion_length=shape.sampled_tokens,
            generation_kwargs={"suppress_tokens": list(suppressed)},
        )
        self.model = cast(nn.Module, self.trainer.model)

    def backward(self, prompts: Sequence[Prompt]) -> float:
        """The loss on new samples of ``prompts``; gradients stay in the model's parameters."""
        trainer = self.trainer
        rows: Any = [
            {"prompt": list(prompt.messages), "image": prompt.images[0]}
            for prompt in prompts
            for _ in range(self._shape.samples)
        ]
        losses = [trainer.training_step(self.model, rows, None) for _ in prompts]  # the first one generates for all
        return float(sum(losses))

    def __call__(self, prompts: Sequence[Prompt]) -> float:
        """A whole step, with the optimizer's and the scheduler's. Returns the seconds of the rollout."""
        self.backward(prompts)
        apply_gradients(self.trainer)
        return self.trainer.rollout_s

    def watched_backward(self, prompts: Sequence[Prompt]) -> tuple[TrainProblem, float, dict[str, float]]:
        """What it sampled, with its own advantages; the loss on that; ``entropy`` and ``kl``, means over the tokens."""
        trainer, scored = self.trainer, {}
        score = trainer._generate_and_score_completions

        def keep(rows: Any) -> Any:
            scored.update(score(rows))
            return dict(scored)

        with mock.patch.object(trainer, "_generate_and_score_completions", keep):
            loss = self.backward(prompts)
        samples = TrainProblem(self._groups(prompts, scored), scored["advantages"].cpu())
        return samples, loss, last_metrics(trainer, torch.ones(len(prompts)))  # turns of one length weigh the same

    def _groups(self, prompts: Sequence[Prompt], scored: dict[str, Any]) -> tuple[tuple[Trajectory, ...], ...]:
        """The trainer's tensors as trajectories, with the images that its model saw."""
        patches = scored["image_grid_thw"].prod(-1).tolist()
        pixels, grids = scored["pixel_values"].split(patches), scored["image_grid_thw"]
        found: list[Trajectory] = []
        for b in range(len(scored["prompt_ids"])):
            prompt = prompts[b // self._shape.samples]
            before, sampled = (
                scored[f"{part}_ids"][b][scored[f"{part}_mask"][b].bool()].cpu() for part in ("prompt", "completion")
            )
            image = encoded(prompt, pixels[b], grids[b])
            found.append(one_turn(prompt, b % self._shape.samples, before, sampled, image))
        size = self._shape.samples
        return tuple(tuple(found[start : start + size]) for start in range(0, len(found), size))


def _reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float | None]:
    return [even_share(ids) for ids in completion_ids]
