"""YAML as PyYAML reads it safely, but all its errors are YAML's, and a key that is given twice is one of them.

PyYAML lets the last one win in silence, and what looks like a date or a number and is none ends in Python's errors.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (AttributeError, LookupError, ValueError):
            kind = node.tag.rpartition(":")[2]
            raise yaml.MarkedYAMLError(
                problem=f"{node.value!r} is no {kind}", problem_mark=node.start_mark
            ) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys: set[Hashable] = set()
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode) and name.tag != "tag:yaml.org,2002:merge":
                key = self.construct_object(name)
                if key in keys:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key!r} is given twice", problem_mark=name.start_mark
                    )
                keys.add(key)
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """Return what the text holds: mappings, lists and scalars.

    Raises:
        yaml.YAMLError: it is no YAML, a value can't be what it looks like (2024-02-30), or a key is given twice; the
            error tells the line.
    """
    return yaml.load(text, _Loader)
