"""Collecting groups: all trajectories of a step run as tasks of one loop and meet only when the last has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from zlib import crc32

from arft_fast.rollout.agent import Agent
from arft_fast.tasks.task import Task
from arft_fast.trajectory import Group, Prompt, Trajectory


async def collect(
    prompts: Sequence[Prompt],
    agents: Mapping[str, Agent],
    tasks: Mapping[str, Task],
    *,
    group_size: int,
    seed: Sequence[int],
) -> list[Group]:
    """Roll out ``group_size`` episodes of each prompt and score them.

    Args:
        agents, tasks: by task name.
        seed: entropy of this collection, e.g. (run seed, step). A trajectory's own random stream derives from it, the
            prompt's uid and the sample index, so it does not matter which rank rolls it out.
    """

    async def episode(prompt: Prompt, sample: int) -> Trajectory:
        trajectory = await agents[prompt.task].play(prompt, sample, [*seed, crc32(prompt.uid.encode()), sample])
        if not trajectory.infra_failed:
            trajectory.rewards = tasks[prompt.task].reward(trajectory)
        return trajectory

    async with asyncio.TaskGroup() as running:
        started = [[running.create_task(episode(prompt, sample)) for sample in range(group_size)] for prompt in prompts]
    return [
        Group(prompt=prompt, trajectories=[task.result() for task in row])
        for prompt, row in zip(prompts, started, strict=True)
    ]
