"""A fake of what this package uses of SGLang 0.5.21: it keeps SGLang's rules and fails the way SGLang fails.

``FakeSglang`` is the core: a policy's weights, the caches and the rules. ``FakeEngine`` puts it behind the attributes
of ``sglang.Engine``, ``FakeServer`` behind HTTP. What it samples is computed with its own copy of the weights, so that
an update which does not arrive, or a cache which is not dropped, shows in the tokens. ``tests/sglang_cpu`` compares
the names used here with the real package.
"""

from .core import FakeSglang, FakeUnpickler, SchedulerDied
from .engine import REQUEST_FIELDS, FakeChild, FakeEngine, FakeManager, install
from .model import shallow
from .server import ROUTES, FakeServer

__all__ = [
    "REQUEST_FIELDS",
    "ROUTES",
    "FakeChild",
    "FakeEngine",
    "FakeManager",
    "FakeServer",
    "FakeSglang",
    "FakeUnpickler",
    "SchedulerDied",
    "install",
    "shallow",
]
