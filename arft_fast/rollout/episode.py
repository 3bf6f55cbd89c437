"""What a live episode has so far. However it ends, and whenever, a trajectory can be made of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from PIL.Image import Image

from arft_fast.rollout.engine import Generation
from arft_fast.rollout.ledger import Ledger
from arft_fast.trajectory import Ending, Prompt, Trajectory, Turn

FAULT_LIMIT = 300
"""Characters of ``Trajectory.fault``."""


@dataclass(kw_only=True)
class Episode:
    """Grows turn by turn."""

    prompt: Prompt
    sample: int
    ledger: Ledger
    """Empty until the prompt's images are encoded."""
    image: Image | None
    """What the next tool call works on."""
    turns: list[Turn] = field(default_factory=list)
    generations: list[Generation] = field(default_factory=list)
    waits_for: str = "its start"
    """What a deadline would find it waiting for."""

    @property
    def track(self) -> str:
        """Its name on the timeline."""
        return f"{self.prompt.uid}#{self.sample}"

    def add_generation(self, generation: Generation, text: str) -> None:
        """The policy wrote a turn."""
        self.generations.append(generation)
        self.ledger.add_sampled(generation.token_ids, generation.logprobs)
        self.turns.append(Turn(role="assistant", text=text, seconds=generation.seconds))

    def trajectory(self, ending: Ending, fault: str | None = None) -> Trajectory:
        """The episode as it stands.

        Args:
            fault: what broke it; may quote the world, and is cut to one printable line of ``FAULT_LIMIT`` characters.
        """
        token_ids, policy_mask, logprobs = self.ledger.arrays()
        return Trajectory(
            prompt=self.prompt,
            sample=self.sample,
            token_ids=token_ids,
            policy_mask=policy_mask,
            logprobs=logprobs,
            images=self.ledger.images,
            turns=self.turns,
            ending=ending,
            weight_version=self.generations[0].weight_version if self.generations else 0,
            cached_tokens=sum(g.cached_tokens for g in self.generations),
            prefilled_tokens=sum(g.prefilled_tokens for g in self.generations),
            fault=None if fault is None else _one_line(fault),
        )


def _one_line(text: str) -> str:
    return "".join(c for c in " ".join(text.split()) if c.isprintable())[:FAULT_LIMIT]
