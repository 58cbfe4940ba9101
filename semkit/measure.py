"""What is measured, with its interval; rows are plain dicts."""

from collections.abc import Sequence

import numpy as np

LABEL = {"clean": "clean images", "em": "EM", "sem": "SEM", "rem": "REM"}


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high): the mean over seeds and its Student-t interval, mean -+ t * std / sqrt(n).

    With one value low and high are nan: one seed has no spread.
    """
    from scipy import stats  # half a second that importing semkit need not pay

    values = np.asarray(values, float)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, float("nan"), float("nan")
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * stats.sem(values)
    return mean, mean - float(half), mean + float(half)
