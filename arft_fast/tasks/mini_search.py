"""Task ``mini_search``: a question whose answer stands only in the bundled corpus.

<think>..</think> <search> query </search>  ->  <information> .. </information>
<think>..</think> <answer> .. </answer>
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random

from arft_fast.protocol import Action, neutralise, render_turn
from arft_fast.rewards.episode import GoldStep, episode_rewards
from arft_fast.tasks.mini_corpus import (
    CITIES,
    CITY_QUESTION,
    FAMILY_NAMES,
    FIRST_NAMES,
    HELD_OUT_PEOPLE,
    JOB_QUESTION,
    JOBS,
    TRAIN_PEOPLE,
    people,
)
from arft_fast.tasks.slips import slip_format
from arft_fast.tools.search import Search
from arft_fast.tools.search_index import SearchIndex
from arft_fast.tools.search_local import LocalSearch
from arft_fast.tools.tool import Tool, ToolResult
from arft_fast.trajectory import Prompt, Trajectory, Turn

_SYSTEM = "Search, then answer."
_SEARCH_THOUGHT, _ANSWER_THOUGHT = "I look it up.", "I found it."


class MiniSearch:
    """Questions about invented people; see ``tasks.task.Task`` for the contract.

    Args:
        index: over ``mini_corpus``; demonstrations look things up in it.
        search: the tool of the rollouts; None searches ``index``.
    """

    name = "mini_search"
    stepwise = False

    def __init__(self, index: SearchIndex, *, search: Search | None = None, seed: int = 0) -> None:
        self._search = search or Search(LocalSearch(index), top_k=index.top_k)
        self.tools: Mapping[str, Tool] = {"search": self._search}
        self._index = index
        self._seed = seed

    def train_prompt(self, index: int) -> Prompt:
        rng = Random(f"{self.name}/train/{self._seed}/{index}")
        return self._prompt(f"train-{index}", rng.randrange(TRAIN_PEOPLE), rng.random() < 0.5)

    def eval_prompts(self, count: int) -> Sequence[Prompt]:
        chosen = Random(f"{self.name}/eval").sample(range(HELD_OUT_PEOPLE), min(count, HELD_OUT_PEOPLE))
        return [self._prompt(f"eval-{k}", TRAIN_PEOPLE + who, k % 2 == 0) for k, who in enumerate(chosen)]

    def _prompt(self, uid: str, who: int, asks_city: bool) -> Prompt:
        person = people()[who]
        question = (CITY_QUESTION if asks_city else JOB_QUESTION).format(name=person.name)
        return Prompt(
            uid=f"{self.name}/{uid}",
            task=self.name,
            messages=[
                {"role": "system", "content": _SYSTEM},
                {"role": "user", "content": [{"type": "text", "text": f"<query> {question} </query>"}]},
            ],
            gold={
                "query": f"{person.name} {'birthplace' if asks_city else 'profession'}",
                "answer": person.city if asks_city else person.job,
            },
        )

    def observe(self, action: Action, result: ToolResult | None) -> str:
        if result is None:
            return "<tips> Search or answer. </tips>"
        return f"<information> {neutralise(result.error or result.text)} </information>"

    def reward(self, trajectory: Trajectory) -> dict[str, float]:
        gold = trajectory.prompt.gold
        steps = [GoldStep(kind="search", target=gold["query"]), GoldStep(kind="answer", target=gold["answer"])]
        return episode_rewards(trajectory.turns, steps)

    def demonstrate(self, prompt: Prompt, rng: Random, slip_rate: float = 0.0) -> Sequence[Turn]:
        query, answer = prompt.gold["query"], prompt.gold["answer"]
        if rng.random() < slip_rate:
            topic = query.split()[-1]
            query = f"{rng.choice(FIRST_NAMES)} {rng.choice(FAMILY_NAMES)} {topic}"
        if rng.random() < slip_rate:
            answer = rng.choice(CITIES if answer in CITIES else JOBS)
        passages = self._index.search(query)
        found = ToolResult(text=self._search.render(passages))
        turns = [
            Turn(role="assistant", text=render_turn(_SEARCH_THOUGHT, "search", query)),
            Turn(
                role="observation",
                text=self.observe(Action(kind="search", body=query, think="", well_formed=True), found),
                tool="search",
            ),
            Turn(role="assistant", text=render_turn(_ANSWER_THOUGHT, "answer", answer)),
        ]
        return [replace(t, text=slip_format(t.text, rng, slip_rate)) if t.role == "assistant" else t for t in turns]

    def scaffold_texts(self) -> Sequence[str]:
        return [self.observe(Action(kind="problem", body="", think="", well_formed=False), None)]
