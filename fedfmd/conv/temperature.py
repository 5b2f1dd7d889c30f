"""The temperature τ of the attentions as a function of progress."""

from __future__ import annotations

import math
from dataclasses import dataclass

SHAPES = ("linear", "cosine", "geometric", "constant")


def check_temperature(temperature: float) -> float:
    """Return the temperature as a float; raise an error unless it is positive and finite."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature = {temperature} must be a positive finite number")
    return float(temperature)


@dataclass(frozen=True)
class TemperatureSchedule:
    """τ as a function of progress: from `initial` at step 0 to `final` at step `steps` and after.

    A step is a round or an epoch. "linear" is the published schedule; "cosine" starts and ends slowly;
    "geometric" changes by the same factor in each step, so that 1/τ, by which logits are scaled, doubles in
    equal times, where "linear" leaves most of that to its last step; "constant" stays at `initial`.
    """

    initial: float = 30.0
    final: float = 1.0
    steps: int = 10
    shape: str = "linear"

    def __post_init__(self) -> None:
        check_temperature(self.initial)
        check_temperature(self.final)
        if self.steps < 0:
            raise ValueError(f"steps = {self.steps} must not be negative")
        if self.shape not in SHAPES:
            raise ValueError(f"shape = {self.shape!r} is unknown; use one of {', '.join(SHAPES)}")

    def at(self, step: float) -> float:
        """τ at a step from 0."""
        if self.shape == "constant":
            return self.initial
        if step >= self.steps:
            return self.final
        progress = max(step / self.steps, 0.0)
        if self.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        if self.shape == "geometric":
            return self.initial * math.pow(self.final / self.initial, progress)
        return self.initial + (self.final - self.initial) * progress
