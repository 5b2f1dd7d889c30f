"""The modelled edge: device profiles, links, fleets, and what a budget lets each client do in a round."""

from fedfmd.edge.devices import DEVICES, LINKS, Bandwidth, Device, Link, load_devices
from fedfmd.edge.fleet import ASSIGNMENTS, Client, Fleet, make_fleet, parse_fleet
from fedfmd.edge.plan import (
    KERNEL_CHOICES,
    POLICIES,
    PROBE_IMAGES,
    Budget,
    Policy,
    Workload,
    WorkPlan,
    deal_out,
    keep_first,
    plan_work,
    round_seconds,
)
from fedfmd.edge.trace import Trace, load_trace

__all__ = [
    "ASSIGNMENTS",
    "DEVICES",
    "KERNEL_CHOICES",
    "LINKS",
    "POLICIES",
    "PROBE_IMAGES",
    "Bandwidth",
    "Budget",
    "Client",
    "Device",
    "Fleet",
    "Link",
    "Policy",
    "Trace",
    "WorkPlan",
    "Workload",
    "deal_out",
    "keep_first",
    "load_devices",
    "load_trace",
    "make_fleet",
    "parse_fleet",
    "plan_work",
    "round_seconds",
]
