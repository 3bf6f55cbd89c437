"""Several tasks in one run: prompts are dealt out in turn, so every step mixes them in equal shares."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from arft_fast.tasks.task import Task
from arft_fast.trajectory import Prompt


class Mixture:
    """The tasks of a run, by name."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.by_name: Mapping[str, Task] = {task.name: task for task in tasks}
        self._tasks = list(tasks)

    def train_prompts(self, start: int, count: int) -> list[Prompt]:
        """Training items ``start`` .. ``start + count`` of the mixed stream: item i belongs to task i mod K."""
        kinds = len(self._tasks)
        return [self._tasks[i % kinds].train_prompt(i // kinds) for i in range(start, start + count)]

    def eval_prompts(self, per_task: int) -> list[Prompt]:
        """Held-out items of every task, task by task."""
        return [prompt for task in self._tasks for prompt in task.eval_prompts(per_task)]

    @asynccontextmanager
    async def running_tools(self) -> AsyncIterator[list[str]]:
        """Every tool, started once also where tasks share it; a line for each says what runs.

        All are closed at the end, also of a failed start, and where another one fails to close.
        """
        tools = list({id(tool): tool for task in self._tasks for tool in task.tools.values()}.values())
        async with AsyncExitStack() as closing:
            for tool in reversed(tools):  # a stack: the first one is closed first
                closing.push_async_callback(tool.close)
            yield [await tool.start() for tool in tools]
