"""Visual agentic reinforcement fine-tuning (arXiv 2505.14246) as a fast GRPO trainer for Qwen2.5-VL.

For other trainers: ``from arft_fast import policy_loss, linear_logprob, group_advantage``. The names are looked up on
first use, so that ``import arft_fast`` itself stays free of torch: tool workers start through it in milliseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .kernels import group_advantage, linear_logprob, policy_loss

__version__ = "0.1.0"
__all__ = ["__version__", "group_advantage", "linear_logprob", "policy_loss"]


def __getattr__(name: str) -> object:
    """Resolve the kernels lazily (PEP 562)."""
    if name in __all__:
        from . import kernels

        return getattr(kernels, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
