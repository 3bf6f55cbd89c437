"""TRL's own GRPO update on given samples: its trainer, reference scoring, loss, backward pass, clipping and optimizer.

The trainer is a real ``GRPOTrainer`` made offline; what replaces generation hands it the tensors that its
``_generate_and_score_completions`` would (trl 1.16). As there, a prompt's samples make a micro-batch, the reference
scores all of them first, and the old log-probs are the current ones. It knows of no logit bias.

Dimension letters: B samples, G samples of a prompt, P padded prompt, R padded completion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from datasets import Dataset  # type: ignore[import-untyped]
from torch import Tensor, nn
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid

from arft_fast.trajectory import Trajectory

from .plain_rollout import ImageTextProcessor, open_processor
from .train_problem import Models, open_stock

Trainer = TypeVar("Trainer", bound=GRPOTrainer)


class Given(GRPOTrainer):
    """A trainer that is handed its micro-batches instead of generating them."""

    def _prepare_inputs(self, generation_batch: dict[str, Any]) -> dict[str, Any]:
        return generation_batch


class TrlUpdate:
    """One update at a time of TRL's trainer, on samples given once.

    Args:
        models: folders of the policy and of its reference.
        scratch: a folder for whatever the trainer writes.
        groups: G samples each.
        advantages: [B], group by group.
    """

    def __init__(
        self,
        models: Models,
        scratch: Path,
        groups: Sequence[Sequence[Trajectory]],
        advantages: Tensor,
        *,
        device: torch.device,
        dtype: torch.dtype,
        beta: float,
        learning_rate: float,
        total_steps: int,
        temperature: float = 1.0,
    ) -> None:
        samples = len(groups[0])
        if any(len(group) != samples for group in groups):
            raise ValueError("groups: TRL's trainer takes groups of equal size; give the same number of samples each")
        processor = open_processor(models.policy)
        self._groups = len(groups)
        self.trainer = open_trainer(
            *(Given, models, scratch, processor, _no_reward),
            groups=len(groups),
            samples=samples,
            device=device,
            dtype=dtype,
            beta=beta,
            learning_rate=learning_rate,
            total_steps=total_steps,
            temperature=temperature,
        )
        self.model = cast(nn.Module, self.trainer.model)
        trajectories = [t for group in groups for t in group]
        inputs = prepared(trajectories, advantages, processor.tokenizer.pad_token_id, processor.image_token_id)
        self._inputs = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in inputs.items()}

    def backward(self) -> float:
        """The loss; gradients stay in the model's parameters."""
        trainer, inputs = self.trainer, dict(self._inputs)
        scored = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
        self.model.train()
        with torch.no_grad():
            inputs["ref_per_token_logps"], _, _ = trainer._get_per_token_logps_and_entropies(
                trainer.ref_model,
                torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
                torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
                inputs["completion_ids"].shape[1],
                batch_size=trainer.args.per_device_train_batch_size,
                **{name: inputs[name] for name in scored if name in inputs},
            )
        parts: list[Any] = split_tensor_dict(cast(Any, split_pixel_values_by_grid(inputs)), self._groups)
        losses = [trainer.training_step(self.model, unsplit_pixel_values_by_grid(part), None) for part in parts]
        return float(sum(losses))

    def __call__(self) -> float:
        """The update: gradients, clipping, the optimizer's and the scheduler's step."""
        loss = self.backward()
        apply_gradients(self.trainer)
        return loss

    def metrics(self) -> dict[str, float]:
        """``entropy`` and ``kl`` of the last update: means over sampled tokens, as TRL logs them a micro-batch."""
        masks = self._inputs["completion_mask"] * self._inputs["tool_mask"]
        return last_metrics(self.trainer, masks.sum(1).view(self._groups, -1).sum(1))


def open_trainer(
    kind: type[Trainer],
    models: Models,
    scratch: Path,
    processor: ImageTextProcessor,
    reward: Callable[..., list[float | None]],
    *,
    groups: int,
    samples: int,
    device: torch.device,
    dtype: torch.dtype,
    beta: float,
    learning_rate: float,
    total_steps: int,
    temperature: float = 1.0,
    **fields: Any,
) -> Trainer:
    """A trainer with its optimizer, offline; ``samples`` of one prompt are a micro-batch, ``groups`` of those a step.

    Args:
        fields: further ones of ``GRPOConfig``.
    """
    config = GRPOConfig(
        output_dir=str(scratch),
        per_device_train_batch_size=samples,
        gradient_accumulation_steps=groups,
        num_generations=samples,
        num_iterations=1,
        max_steps=total_steps,
        learning_rate=learning_rate,
        max_grad_norm=1.0,
        beta=beta,
        loss_type="grpo",
        use_bias_correction_kl=False,  # its default multiplies the KL by the ratio, which is another gradient
        temperature=temperature,
        gradient_checkpointing=False,  # its default is for GPUs that are full; nobody here recomputes
        bf16=False,  # the weights' own dtype, no autocast
        use_cpu=device.type == "cpu",
        report_to=[],
        disable_tqdm=True,
        **fields,
    )
    model = open_stock(models.policy, device, dtype)
    model.config._name_or_path = str(models.reference)  # where it looks for its reference
    trainer = kind(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["unused"] * groups}),
        processing_class=processor,
    )
    trainer.create_optimizer_and_scheduler(total_steps)
    trainer.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.current_gradient_accumulation_steps = groups
    return trainer


def apply_gradients(trainer: GRPOTrainer) -> None:
    """Clipping, the optimizer's and the scheduler's step."""
    assert trainer.model and trainer.optimizer and trainer.lr_scheduler, "made in open_trainer"
    trainer._clip_grad_norm(trainer.model)
    trainer.optimizer.step()
    trainer.lr_scheduler.step()
    trainer.model.zero_grad()


def last_metrics(trainer: GRPOTrainer, tokens: Tensor) -> dict[str, float]:
    """``entropy`` and ``kl`` of the last update: means over its ``tokens``, sampled ones of each micro-batch."""
    logged, weights = trainer._metrics["train"], tokens.double().cpu()
    return {
        name: float((torch.tensor(logged[name][-len(weights) :]).double() * weights).sum() / weights.sum())
        for name in ("entropy", "kl")
        if name in logged
    }


def prepared(trajectories: Sequence[Trajectory], advantages: Tensor, pad: int, image_token_id: int) -> dict[str, Any]:
    """Samples as TRL keeps them: prompts [B, P] padded on the left, completions [B, R] on the right."""
    starts = [int(np.argmax(t.policy_mask)) for t in trajectories]
    before, after = max(starts), max(len(t.token_ids) - start for t, start in zip(trajectories, starts, strict=True))
    count = len(trajectories)
    prompt_ids, completion_ids = torch.full((count, before), pad), torch.full((count, after), pad)
    prompt_mask, completion_mask = (torch.zeros_like(ids) for ids in (prompt_ids, completion_ids))
    tool_mask = torch.ones_like(completion_ids)
    for b, (trajectory, start) in enumerate(zip(trajectories, starts, strict=True)):
        ids, left = torch.from_numpy(trajectory.token_ids), before - start
        length = len(ids) - start
        prompt_ids[b, left:], prompt_mask[b, left:] = ids[:start], 1
        completion_ids[b, :length], completion_mask[b, :length] = ids[start:], 1
        tool_mask[b, :length] = torch.from_numpy(trajectory.policy_mask[start:])
    inputs: dict[str, Any] = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "tool_mask": tool_mask,
        "advantages": advantages,
        "num_items_in_batch": (completion_mask * tool_mask).sum(),
    }
    images = [image for t in trajectories for image in t.images]
    if images:
        inputs["pixel_values"] = torch.cat([image.pixel_values for image in images])
        inputs["image_grid_thw"] = torch.tensor([image.grid_thw for image in images])
        inputs["num_images"] = [len(t.images) for t in trajectories]
        inputs["mm_token_type_ids"] = (torch.cat([prompt_ids, completion_ids], dim=1) == image_token_id).long()
    return inputs


def _no_reward(completions: Sequence[Any], **_: Any) -> list[float | None]:
    raise AssertionError("samples come with their advantages")
