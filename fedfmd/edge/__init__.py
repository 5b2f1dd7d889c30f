"""The modelled edge: device profiles, links, fleets, and what a budget lets each client do in a round."""

from fedfmd.edge.devices import DEVICES, LINKS, Bandwidth, Device, Link, load_devices
from fedfmd.edge.fleet import Client, Fleet, make_fleet, parse_fleet
from fedfmd.edge.plan import (
    POLICIES,
    PROBE_IMAGES,
    Budget,
    Workload,
    WorkPlan,
    deal_out,
    plan_work,
    round_seconds,
)

__all__ = [
    "DEVICES",
    "LINKS",
    "POLICIES",
    "PROBE_IMAGES",
    "Bandwidth",
    "Budget",
    "Client",
    "Device",
    "Fleet",
    "Link",
    "WorkPlan",
    "Workload",
    "deal_out",
    "load_devices",
    "make_fleet",
    "parse_fleet",
    "plan_work",
    "round_seconds",
]
