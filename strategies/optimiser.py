"""The state of Flower's server optimisers, momentum for instance, as named arrays for a checkpoint."""

from __future__ import annotations

import numpy as np
from flwr.serverapp.strategy import FedAvg

from fedfmd.flower_compat import kept_between_rounds
from fedfmd.protocol.state import Arrays


def optimiser_arrays(inner: FedAvg) -> Arrays:
    """What `inner` keeps between rounds: its attributes that are mappings or lists of arrays.

    `m_t/fc.bias` is an entry of a mapping, `momentum_vector/#3` of a list.
    """
    arrays = {}
    for attribute, value in kept_between_rounds(inner).items():
        if isinstance(value, dict):
            entries = value.items()
        elif isinstance(value, list):
            entries = ((f"#{place}", entry) for place, entry in enumerate(value))
        else:
            continue
        arrays |= {f"{attribute}/{key}": entry for key, entry in entries if isinstance(entry, np.ndarray)}
    return arrays


def restore_optimiser(inner: FedAvg, arrays: Arrays) -> None:
    """Give `inner` back what `optimiser_arrays` found."""
    kept: dict[str, Arrays] = {}
    for name, array in arrays.items():
        attribute, _, key = name.partition("/")
        kept.setdefault(attribute, {})[key] = array
    for attribute, entries in kept.items():
        in_order = all(key.startswith("#") for key in entries)
        places = sorted(entries, key=lambda key: int(key[1:])) if in_order else ()
        setattr(inner, attribute, [entries[key] for key in places] if in_order else entries)
