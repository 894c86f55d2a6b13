"""What runs of several seeds say together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error over seeds; of one seed the error is NaN."""
    return fmean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
