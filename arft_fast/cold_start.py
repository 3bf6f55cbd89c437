"""Cold start of a policy that does not know the protocol: imitate the teachers, or reuse an earlier run's weights."""

from __future__ import annotations

from dataclasses import asdict

import torch

from arft_fast.config import Config
from arft_fast.observe.console import Console
from arft_fast.policy.checkpoint import WeightCache
from arft_fast.policy.imitation import imitate
from arft_fast.policy.model import Policy
from arft_fast.policy.parallel import Ranks
from arft_fast.policy.update import StepReport
from arft_fast.rollout.stop import StopSignal
from arft_fast.rollout.teacher import Teacher
from arft_fast.tasks.mixture import Mixture


def cold_start(
    config: Config, policy: Policy, mixture: Mixture, ranks: Ranks, console: Console, stop: StopSignal
) -> None:
    """Train ``policy`` in place: clean episodes first, then episodes of a teacher that slips.

    Raises:
        Stopped: a stop was requested; the policy keeps what it has learnt so far.
    """
    settings = config.cold_start
    if not settings.steps + settings.slip_steps:
        return
    cache = None
    if settings.cache is not None:
        cache = WeightCache(
            settings.cache,
            {
                "cold_start": {name: value for name, value in asdict(settings).items() if name != "cache"},
                "policy": asdict(config.policy),
                "task": asdict(config.task),
                "search": {"form": config.search.form, "passage_limit": config.search.passage_limit},
                "max_tokens": config.rollout.max_tokens,
                "seed": config.train.seed,
                "micro_batch_tokens": config.train.micro_batch_tokens,
                "prefix_tree": config.train.prefix_tree,
                "world": ranks.world,
                "threads": torch.get_num_threads(),
            },
        )
        if all(ranks.gather([cache.path.is_file()])):  # all or none: ranks that differ here would train apart
            cache.load(policy)
            console.print(f"cold start: weights of an earlier one with the same settings ({cache.path})")
            return
    phases = (
        ("cold start", settings.steps, settings.learning_rate, settings.warmup_steps, 0.0),
        ("slips", settings.slip_steps, settings.slip_learning_rate, 0, settings.slip_rate),
    )
    for title, steps, rate, warmup, slip_rate in phases:
        if not steps:
            continue
        teacher = Teacher(
            policy, mixture, seed=config.train.seed, slip_rate=slip_rate, distinct=settings.traces,
            max_tokens=config.rollout.max_tokens,
        )  # fmt: skip
        with console.progress(title, steps, every=50) as progress:

            def on_step(step: int, report: StepReport) -> None:
                progress.advance(loss=report.loss, **({"skipped": "not finite"} if report.skipped else {}))
                stop.check(ranks)

            imitate(
                policy, teacher.episode, steps=steps, batch_size=settings.batch_size, learning_rate=rate,
                warmup_steps=warmup, micro_batch_tokens=config.train.micro_batch_tokens,
                prefix_tree=config.train.prefix_tree, ranks=ranks, on_step=on_step,
            )  # fmt: skip
    if cache is not None and ranks.main:
        cache.save(policy)
    ranks.barrier()
