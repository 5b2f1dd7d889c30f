"""Nested state as named leaves, for a checkpoint: arrays to its arrays, plain values to its JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

Leaves = Mapping[str, Any]
"""By path: arrays, bool, int, float, str, None, and empty dicts and lists."""


def flatten(tree: object, path: str = "") -> dict[str, Any]:
    """Name all leaves of nested dicts and lists: `m_t/fc.bias`, `momentum_vector/#3`, `seen/=7` of a key that is int.

    NumPy's scalars become arrays of shape (), tuples come back as lists.

    Raises:
        TypeError: something of another type, which a checkpoint can't keep.
    """
    if isinstance(tree, np.ndarray | np.generic):
        if tree.dtype.hasobject:
            raise TypeError("an array of Python objects")
        return {path: np.asarray(tree)}
    if tree is None or isinstance(tree, bool | int | float | str):
        return {path: tree}
    if type(tree) is dict:
        entries: dict[str, Any] = {_step(key): value for key, value in tree.items()}
    elif type(tree) is list or type(tree) is tuple:
        entries = {f"#{place}": value for place, value in enumerate(tree)}
    else:
        raise TypeError(type(tree).__name__)
    if not entries:
        return {path: {} if isinstance(tree, dict) else []} if path else {}
    leaves: dict[str, Any] = {}
    for step, value in entries.items():
        leaves |= flatten(value, f"{path}/{step}" if path else step)
    return leaves


def unflatten(leaves: Leaves) -> Any:
    """Return the tree that `flatten` made these leaves of; no leaves are an empty dict."""
    if "" in leaves:
        leaf = leaves[""]
        return leaf[()] if isinstance(leaf, np.ndarray) and not leaf.ndim else leaf
    branches: dict[str, dict[str, Any]] = {}
    for path, leaf in leaves.items():
        step, _, rest = path.partition("/")
        branches.setdefault(step, {})[rest] = leaf
    tree = {_key(step): unflatten(branch) for step, branch in branches.items()}
    if tree and all(step.startswith("#") for step in branches):
        return [tree[place] for place in sorted(tree)]
    return tree


def _step(key: object) -> str:
    """Return a dict's key as part of a path."""
    if type(key) is int:
        return f"={key}"
    if isinstance(key, str) and key and key[0] not in "#=" and "/" not in key:
        return key
    raise TypeError(f"a dict with the key {key!r}")


def _key(step: str) -> Any:
    return int(step[1:]) if step[0] in "#=" else step
