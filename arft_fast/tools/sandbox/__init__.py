"""Confined execution of Python that a model wrote. See ``pool`` for what is covered and what is not."""

from arft_fast.tools.sandbox.pool import Sandbox, SandboxResult

__all__ = ["Sandbox", "SandboxResult"]
