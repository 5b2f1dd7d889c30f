"""Speed and accuracy in one number, and the models that no other beats in both.

The scores say little where many answers are wrong (Bruyer & Brysbaert 2011): show accuracy and time beside
them, and say which time stands for the response time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def ies(seconds: float, accuracy: float) -> float:
    """Inverse efficiency score (Townsend & Ashby 1978): response time / proportion correct, in seconds.

    Lower is better. Infinite at accuracy 0.

    Raises:
        ValueError: `accuracy` outside [0, 1] or `seconds` negative.
    """
    _check(seconds, accuracy)
    return seconds / accuracy if accuracy > 0 else math.inf


def rcs(accuracy: float, seconds: float) -> float:
    """Rate-correct score (Woltz & Was 2006): correct answers per second of response time.

    Higher is better. Infinite for correct answers in no time.

    Raises:
        ValueError: `accuracy` outside [0, 1] or `seconds` negative.
    """
    _check(seconds, accuracy)
    if accuracy == 0:
        return 0.0
    return accuracy / seconds if seconds > 0 else math.inf


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the (accuracy, cost) points that no other point beats, by rising cost.

    A point beats another if it is at least as accurate and as cheap, and better in one of the two.
    """
    front = [
        index
        for index, (accuracy, cost) in enumerate(points)
        if not any(a >= accuracy and c <= cost and (a, c) != (accuracy, cost) for a, c in points)
    ]
    return sorted(front, key=lambda index: points[index][1])


def _check(seconds: float, accuracy: float) -> None:
    if not 0 <= accuracy <= 1:
        raise ValueError(f"accuracy = {accuracy} must be a proportion from 0 to 1")
    if not seconds >= 0:
        raise ValueError(f"seconds = {seconds} must not be negative")
