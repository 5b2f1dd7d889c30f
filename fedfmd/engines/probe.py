"""Asks each machine of a Ray cluster what it has: ``python -m fedfmd.engines.probe REQUEST ANSWER``, two JSON files.

`fedfmd.engines.cluster` starts it, and judges the answer.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

LIBRARIES = ("fedfmd", "flwr", "torch", "torchvision", "numpy")
"""What must have the same version on all machines; Ray sees to its own and to Python's."""

POLL_S = 0.5
BUSY_S = 60.0
"""Seconds until Ray has taken notice that an earlier job is over."""

MACHINE_S = 240.0
"""Seconds until a machine has started a worker and read code and images of all runs."""


def probe(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cluster's address, what its machines tell, and how many of its cores and GPUs are taken."""
    ray: Any = import_module("ray")
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # As Flower's simulation starts it: with the same search path, and the same environment beside it.
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path), **request["environment"]}}
    try:
        ray.init(
            request["address"], log_to_driver=False, logging_level=logging.ERROR, runtime_env=environment
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        return {"error": " ".join(f"{error.__cause__ or error}".split())}
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a machine may have no fedfmd
    busy = _busy(ray)
    nodes = _nodes(ray)
    asked = {
        ray.remote(look)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote(request["runs"], request["marker"]): node
        for node in nodes
    }
    ray.wait(list(asked), num_returns=len(asked), timeout=MACHINE_S)
    left = {node["NodeID"] for node in _nodes(ray)}  # Ray takes seconds to see that a machine is gone
    machines = [_machine(node) | _told(ray, task) for task, node in asked.items() if node["NodeID"] in left]
    return {"address": ray.get_runtime_context().gcs_address, "machines": machines, "busy": busy}


def look(runs: list[dict[str, Any]], marker: str) -> dict[str, Any]:
    """Return what a worker tells of its machine, whatever is missing there."""
    told: dict[str, Any] = {"versions": versions()}
    try:
        from fedfmd.engines.cluster import report

        return told | report(runs, marker)
    except Exception as error:  # such as that of another fedfmd
        return told | {"fault": f"{type(error).__name__}: {error}"}


def versions() -> dict[str, str]:
    """Return the versions of `LIBRARIES` in this process; "none" of what it can't import."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = str(import_module(name).__version__)
        except ImportError:
            found[name] = "none"
    return found


def _busy(ray: Any) -> float:
    """Return how many cores and GPUs other jobs hold, once Ray has taken notice of those that are over."""
    deadline = time.monotonic() + BUSY_S
    while True:
        total, free = ray.cluster_resources(), ray.available_resources()
        busy = sum(total.get(kind, 0.0) - free.get(kind, 0.0) for kind in ("CPU", "GPU"))
        if not busy or time.monotonic() > deadline:
            return float(busy)
        time.sleep(POLL_S)


def _nodes(ray: Any) -> list[dict[str, Any]]:
    """Return the machines that have a core for a worker, as Ray describes them."""
    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]


def _machine(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return what Ray tells of a machine."""
    resources = node["Resources"]
    return {
        "name": f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})",
        "cpus": resources.get("CPU", 0.0),
        "gpus": resources.get("GPU", 0.0),
        "versions": {},
    }


def _told(ray: Any, task: Any) -> dict[str, Any]:
    """Return what its worker tells."""
    try:
        told: dict[str, Any] = ray.get(task, timeout=0)
        return told
    except ray.exceptions.GetTimeoutError:
        return {"fault": f"no worker there answers within {MACHINE_S:g} s"}
    except ray.exceptions.RayError as error:  # the machine is gone, or has no worker to give
        return {"fault": " ".join(f"{error}".split())}


if __name__ == "__main__":
    asked, told = map(Path, sys.argv[1:])
    told.write_text(json.dumps(probe(json.loads(asked.read_text()))))
