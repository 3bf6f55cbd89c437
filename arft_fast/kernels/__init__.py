"""What other trainers take away: three functions on tensors, importing torch and nothing else of this package.

Each has one name in four places: its public file here (checks, dispatch), its definition in ``reference.py``, its test
and its benchmark. ``impl="reference"`` is always there and is what correct means.
"""

from . import native, reference
from .dispatch import head_impl
from .group_advantage import GroupAdvantage, group_advantage, group_advantage_impl
from .linear_logprob import linear_logprob
from .policy_loss import policy_loss

__all__ = [
    "GroupAdvantage",
    "group_advantage",
    "group_advantage_impl",
    "head_impl",
    "linear_logprob",
    "native",
    "policy_loss",
    "reference",
]
