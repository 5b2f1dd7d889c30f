"""Pictures of finished runs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from matplotlib.figure import Figure

from fedfmd.tracking import RoundRow


def plot_curves(runs: Sequence[tuple[str, Sequence[RoundRow]]]) -> Figure:
    """Test accuracy against rounds and against virtual time: each seed thin, the mean of a label thick."""
    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    by_round, by_time = figure.subplots(1, 2, sharey=True)
    labels = dict.fromkeys(label for label, _ in runs)
    for number, label in enumerate(labels):
        seeds = [rows for other, rows in runs if other == label]
        colour = f"C{number}"
        for axes, column in ((by_round, "round"), (by_time, "virtual_s")):
            for rows in seeds:
                axes.plot(
                    [getattr(row, column) for row in rows],
                    [100 * row.accuracy for row in rows],
                    color=colour,
                    alpha=0.35,
                    linewidth=1,
                )
            together = list(zip(*seeds, strict=False))
            axes.plot(
                [fmean(getattr(row, column) for row in rows) for rows in together],
                [100 * fmean(row.accuracy for row in rows) for rows in together],
                color=colour,
                linewidth=2.2,
                label=f"{label} ({len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'})",
            )
    by_round.set(xlabel="round", ylabel="test accuracy (%)", ylim=(0, 100))
    by_time.set(xlabel="virtual time (s)")
    by_round.legend(loc="lower right", frameon=False)
    for axes in (by_round, by_time):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
