"""Imitation: supervised steps on teacher episodes, with the template and the policy mask that GRPO uses afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from arft_fast.kernels import linear_logprob
from arft_fast.policy.forward import hidden_rows
from arft_fast.policy.micro_batches import micro_batches
from arft_fast.policy.model import Policy
from arft_fast.policy.parallel import Ranks
from arft_fast.policy.update import Optimizer, StepReport
from arft_fast.trajectory import Trajectory


def imitate(
    policy: Policy,
    episode: Callable[[int], Trajectory],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    warmup_steps: int,
    micro_batch_tokens: int,
    prefix_tree: bool = True,
    ranks: Ranks,
    on_step: Callable[[int, StepReport], None],
) -> None:
    """Minimise the mean negative log-prob of the teacher's own tokens; tool text, images and template add nothing.

    Args:
        episode: the teacher's i-th episode; step s imitates ``s * batch_size`` .. of them, shared among the ranks.
        on_step: called after each step with its index and report.
    """
    optimizer = Optimizer(
        policy.trainable_parameters(), learning_rate=learning_rate, total_steps=steps, warmup_steps=warmup_steps,
        betas=(0.9, 0.98), ranks=ranks,
    )  # fmt: skip
    for step in range(steps):
        mine = [episode(i) for i in ranks.share(range(step * batch_size, (step + 1) * batch_size))]
        (tokens,) = ranks.sum(sum(e.completion_length for e in mine))

        def backward(mine: Sequence[Trajectory] = mine, tokens: float = tokens) -> float:
            total = 0.0
            for _, batch in micro_batches(policy, mine, micro_batch_tokens, prefix_tree):
                logprobs, _ = linear_logprob(
                    hidden_rows(policy, batch), policy.head.weight, batch.targets, bias=policy.logit_bias
                )
                loss = -batch.per_token(logprobs).sum() / tokens
                loss.backward()
                total += float(loss.detach())
            return total

        on_step(step, optimizer.step(backward))
