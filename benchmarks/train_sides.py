"""The trainers whose whole updates are compared, and the gate that each passes before it is timed.

All have the same weights, samples, loss (per-sequence mean, k3 KL to a reference), clipping and AdamW; none recomputes
activations. TRL knows of no logit bias, so nobody has one here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from arft_fast.policy.model import Policy
from arft_fast.policy.parallel import Ranks
from arft_fast.policy.update import GrpoLoss, Optimizer, StepReport, grpo_update

from .plain_reference import plain_backward, plain_update
from .train_problem import Models, TrainProblem, TrainShape, open_policies, open_stock, without_bias

OURS, NO_TREE, PLAIN, TRL = "arft_fast", "arft_fast, no tree", "plain reference", "TRL"
BETA = 0.04
LEARNING_RATE = 1e-6
TOTAL_STEPS = 10**6  # of the linear decay: the rate stays what it is


class Found(NamedTuple):
    """What an update is made of."""

    loss: float
    gradients: dict[str, Tensor]
    """By parameter, before clipping."""
    metrics: dict[str, float]


class Errors(NamedTuple):
    """Distances between two updates."""

    loss: float
    """Absolute: the policy's part of it is 0 but for the samples' lengths."""
    gradient: float
    """Relative, of the parameter where it is largest."""
    metrics: float
    """Absolute, of the metric where it is largest."""


AT_MOST = {
    torch.float64: Errors(1e-12, 1e-9, 1e-9),
    torch.float32: Errors(1e-6, 1e-4, 1e-5),
    torch.bfloat16: Errors(2e-2, 3e-1, 5e-2),
}
"""What rounding may do to an update."""


class Side(Protocol):
    """One trainer with its model and optimizer."""

    def gradients(self) -> Found:
        """Loss, gradients and metrics of the update that would come next; the weights stay."""

    def update(self) -> object:
        """One whole update."""


class Ours:
    """``grpo_update`` as a run calls it."""

    def __init__(self, policy: Policy, reference: Policy, problem: TrainProblem, settings: GrpoLoss) -> None:
        self._policy, self._reference, self._problem, self._settings = policy, reference, problem, settings
        self._ranks = Ranks(rank=0, world=1, device=policy.device)
        self._optimizer = self._optimizer_of(Optimizer)

    def _optimizer_of(self, kind: type[Optimizer]) -> Optimizer:
        return kind(
            self._policy.trainable_parameters(),
            learning_rate=LEARNING_RATE,
            total_steps=TOTAL_STEPS,
            ranks=self._ranks,
        )

    def _update(self, optimizer: Optimizer) -> tuple[StepReport, dict[str, float]]:
        problem = self._problem
        return grpo_update(
            *(self._policy, self._reference, optimizer, problem.trajectories, problem.advantages),
            *(self._settings, self._ranks),
        )

    def gradients(self) -> Found:
        report, metrics = self._update(self._optimizer_of(_NoStep))
        wanted = {name: metrics[name] for name in ("entropy", "kl", "sampler_gap")}
        return Found(report.loss, take_gradients(self._policy.model), wanted)

    def update(self) -> object:
        return self._update(self._optimizer)


class _NoStep(Optimizer):
    """Leaves the gradients where they are."""

    def step(self, backward: Callable[[], float]) -> StepReport:
        return StepReport(loss=backward(), grad_norm=0.0, learning_rate=0.0, skipped=True)


class Plain:
    """``plain_reference`` on the stock models."""

    def __init__(
        self, models: Models, problem: TrainProblem, logit_bias: Tensor, settings: GrpoLoss, dtype: torch.dtype
    ) -> None:
        self.model, reference = (open_stock(folder, logit_bias.device, dtype) for folder in models)
        reference.requires_grad_(False)
        self._frozen, self._problem, self._bias, self._settings = reference, problem, logit_bias, settings
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)

    def gradients(self) -> Found:
        problem = self._problem
        loss, metrics = plain_backward(
            *(self.model, self._frozen, problem.groups, problem.advantages),
            logit_bias=self._bias,
            beta=self._settings.beta,
            temperature=self._settings.temperature,
        )
        return Found(loss, take_gradients(self.model), metrics)

    def update(self) -> object:
        problem = self._problem
        return plain_update(
            *(self.model, self._frozen, self._optimizer, problem.groups, problem.advantages),
            logit_bias=self._bias,
            beta=self._settings.beta,
            temperature=self._settings.temperature,
        )


class Trl:
    """TRL's trainer."""

    def __init__(
        self, models: Models, scratch: Path, problem: TrainProblem, settings: GrpoLoss,
        device: torch.device, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        from .trl_update import TrlUpdate  # may be missing

        self._trainer = TrlUpdate(
            *(models, scratch, problem.groups, problem.advantages),
            device=device,
            dtype=dtype,
            beta=settings.beta,
            temperature=settings.temperature,
            learning_rate=LEARNING_RATE,
            total_steps=TOTAL_STEPS,
        )

    def gradients(self) -> Found:
        loss = self._trainer.backward()
        return Found(loss, take_gradients(self._trainer.model), self._trainer.metrics())

    def update(self) -> object:
        return self._trainer()


def take_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients by parameter, on the CPU; the model has none afterwards."""
    found = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def builders(
    models: Models, scratch: Path, shape: TrainShape, problem: TrainProblem, device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[], Side]]:
    """Each side by name, to be made when it is its turn; the plain reference first."""
    settings = GrpoLoss(beta=BETA)

    def ours(settings: GrpoLoss) -> Side:
        policy, reference = (without_bias(policy) for policy in open_policies(models, shape, device, dtype))
        return Ours(policy, reference, problem, settings)

    def plain() -> Side:
        no_bias = torch.zeros((), device=device)
        return Plain(models, problem, no_bias, settings, dtype)

    return {
        PLAIN: plain,
        OURS: lambda: ours(settings),
        NO_TREE: lambda: ours(GrpoLoss(beta=BETA, prefix_tree=False)),
        TRL: lambda: Trl(models, scratch, problem, settings, device, dtype),
    }


def errors_of(found: Found, truth: Found) -> Errors:
    """How far two updates are apart.

    Raises:
        ValueError: they have gradients of different parameters.
    """
    if found.gradients.keys() != truth.gradients.keys():
        names = sorted(found.gradients.keys() ^ truth.gradients.keys())
        raise ValueError(f"gradients: only one side has those of {', '.join(names[:3])} ({len(names)} in all)")
    gradients = (
        float((found.gradients[name].double() - exact.double()).norm() / exact.double().norm())
        for name, exact in truth.gradients.items()
    )
    metrics = (abs(value - truth.metrics[name]) for name, value in found.metrics.items())
    return Errors(abs(found.loss - truth.loss), max(gradients), max(metrics))


class AnotherUpdate(ValueError):
    """A side does not compute what the plain reference does."""


def admit(build: Callable[[], Side], truth: Found | None, dtype: torch.dtype) -> tuple[Side, Found, Errors]:
    """A side that has shown that its update is ``truth`` (None: it is the first one, and the truth for the others).

    Raises:
        AnotherUpdate: it is another one; a NaN is.
    """
    side = build()
    found = side.gradients()
    errors = errors_of(found, truth or found)
    for what, error, most in zip(Errors._fields, errors, AT_MOST[dtype], strict=True):
        if not error <= most:
            raise AnotherUpdate(f"{what} off by {error:.1e}, allowed {most:.0e}")
    return side, found, errors
