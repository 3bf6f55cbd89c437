"""Attacks on the sandbox. ``ATTACKS`` holds all of them; ``World`` is what they aim at outside."""

from __future__ import annotations

from tests.sandbox_attacks.attack import Attack
from tests.sandbox_attacks.files import FILES
from tests.sandbox_attacks.images import IMAGES
from tests.sandbox_attacks.kernel import KERNEL
from tests.sandbox_attacks.processes import PROCESSES
from tests.sandbox_attacks.resources import RESOURCES
from tests.sandbox_attacks.world import World

ATTACKS: tuple[Attack, ...] = (*FILES, *PROCESSES, *KERNEL, *RESOURCES, *IMAGES)

__all__ = ["ATTACKS", "Attack", "World"]
