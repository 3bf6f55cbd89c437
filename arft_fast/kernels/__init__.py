"""What other trainers take away: four functions on tensors, importing torch and nothing else of this package.

Each has one name in four places: its public file here (checks, dispatch), its definition in ``reference.py``, its test
and its benchmark. ``impl="reference"`` is always there and is what correct means; for ``prefix_attention``, which is
attention with a mask, that is ``impl="dense"`` in its own file.
"""

from . import native, reference
from .attention_tree import AttentionTree, Node
from .dispatch import head_impl
from .group_advantage import GroupAdvantage, group_advantage, group_advantage_impl
from .linear_logprob import linear_logprob
from .policy_loss import policy_loss
from .prefix_attention import prefix_attention, tree_impl

__all__ = [
    "AttentionTree",
    "GroupAdvantage",
    "Node",
    "group_advantage",
    "group_advantage_impl",
    "head_impl",
    "linear_logprob",
    "native",
    "policy_loss",
    "prefix_attention",
    "reference",
    "tree_impl",
]
