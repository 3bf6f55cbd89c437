"""Confined execution of Python that a model wrote. See ``pool`` for what is covered and what is not."""

from arft_fast.tools.sandbox.layers import Mode
from arft_fast.tools.sandbox.pool import Sandbox, SandboxRefused, SandboxResult

__all__ = ["Mode", "Sandbox", "SandboxRefused", "SandboxResult"]
