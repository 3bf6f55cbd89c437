"""Leaves a service alone that keeps failing, so that a rollout learns of it at once instead of by its deadlines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from arft_fast.tools.tool import InfraFault


class CircuitBreaker:
    """Opens after ``faults`` faults in a row; after ``cooldown_s`` one call may try, and its outcome decides.

    For one event loop or thread. A call that was cancelled says nothing about the service and counts as nothing.

    Args:
        name: of the service, for messages.
        clock: seconds, monotonic.
    """

    def __init__(
        self, name: str, *, faults: int = 5, cooldown_s: float = 30.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if faults < 1:
            raise ValueError(f"faults must be at least 1, got {faults}")
        if not cooldown_s > 0:
            raise ValueError(f"cooldown_s must be positive, got {cooldown_s}")
        self._name = name
        self._limit = faults
        self._cooldown_s = cooldown_s
        self._clock = clock
        self._in_a_row = 0
        self._opened_at = 0.0
        self._probing = False
        self._last = ""

    def check(self) -> None:
        """Whether a call may be made now.

        Raises:
            InfraFault: not now; the message holds the last fault.
        """
        if self._in_a_row < self._limit:
            return
        wait_s = self._opened_at + self._cooldown_s - self._clock()
        if wait_s > 0 or self._probing:
            when = f"for {wait_s:.0f} s more" if wait_s > 0 else "until the call that tries it is back"
            raise InfraFault(f"{self._name} failed {self._in_a_row} times in a row, left alone {when}: {self._last}")

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Around one call: its ``InfraFault`` is counted.

        Raises:
            InfraFault: see ``check``.
        """
        self.check()
        probe = self._in_a_row >= self._limit
        self._probing = self._probing or probe
        try:
            yield
        except InfraFault as fault:
            self._in_a_row += 1
            self._opened_at = self._clock()
            self._last = str(fault)
            raise
        else:
            self._in_a_row = 0
        finally:
            if probe:
                self._probing = False
