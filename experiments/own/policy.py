"""A budget policy of one's own: who would miss the deadline does half of the steps, with half of the kernels."""

from collections.abc import Callable

from fedfmd.edge import Budget, WorkPlan


def halve(full: WorkPlan, plan: Callable[..., WorkPlan], budget: Budget) -> WorkPlan:
    """Return the plan of a client: `full` is that of all its work, `plan(steps, kernels)` makes others.

    A plan tells total_s, energy_j and up_bytes; one that still breaks a limit comes late. Arguments named client and
    workload get those.
    """
    if full.total_s <= (budget.deadline_s or float("inf")):
        return full
    return plan(max(1, full.steps // 2), max(1, full.kernels // 2))
