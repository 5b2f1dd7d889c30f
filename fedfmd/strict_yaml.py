"""YAML as PyYAML reads it safely, but a key that is given twice is an error: the last one would win in silence."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
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
        yaml.YAMLError: it is no YAML, or a key is given twice; the error tells the line.
    """
    return yaml.load(text, _Loader)
