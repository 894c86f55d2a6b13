"""Seconds that a run may take, and keeps to: what is measured first, and what is left out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

LEFT_OUT = "left out: the time was up"
# Of what is left, the most that the timed rounds of one case may take.
SHARE = 0.1


class Budget:
    """Seconds from now on; None is no limit.

    A case is not begun with less left than it says it needs. What has begun asks before it makes or
    checks an implementation, and before a round, and leaves out the rest when the time is up: but
    whoever has been checked is timed once. So it ends late by one such step and a run of each.
    """

    def __init__(
        self, seconds: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if seconds is not None and not seconds > 0:
            raise ValueError(f"seconds: expected a number > 0, got {seconds!r}")
        self.seconds = seconds
        self._clock = clock
        self._began = clock()

    @property
    def left(self) -> float:
        """Seconds left; infinite without a limit."""
        return math.inf if self.seconds is None else self.seconds - (self._clock() - self._began)

    @property
    def spent(self) -> bool:
        return self.left <= 0

    def each(self, implementations: int, most: float) -> float:
        """Seconds after which an implementation of a case leaves its rounds, `most` at most."""
        return min(most, max(0.0, self.left) * SHARE / max(implementations, 1))
