import json

import numpy as np
import pytest

from fedfmd.algorithms.tree import flatten, unflatten


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"rounds": 3, "best": 0.5, "name": "a", "on": True, "off": None},
        {"nested": {"deep": {"er": [1, [2, []], {}]}}},
        {"by_node": {7: 0.5, -3: {1: "x"}}},
        {"twelve": list(range(12))},
        {"scalar": np.float32(0.1), "count": np.int64(3)},
    ],
    ids=str,
)
def test_a_tree_comes_back_from_arrays_and_json(tree):
    leaves = flatten(tree)
    plain = {path: leaf for path, leaf in leaves.items() if not isinstance(leaf, np.ndarray)}
    arrays = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, np.ndarray)}
    back = unflatten(json.loads(json.dumps(plain)) | arrays)
    assert back == tree
    assert [type(value) for value in back.values()] == [type(value) for value in tree.values()]


def test_paths_are_what_earlier_checkpoints_have():
    tree = {"m_t": {"fc.bias": np.ones(2)}, "momentum_vector": [np.zeros(1), np.ones(1)], "alone": np.ones(3)}
    leaves = flatten(tree)
    assert list(leaves) == ["m_t/fc.bias", "momentum_vector/#0", "momentum_vector/#1", "alone"]
    assert all(
        leaf is array
        for leaf, array in zip(
            leaves.values(), [tree["m_t"]["fc.bias"], *tree["momentum_vector"], tree["alone"]], strict=True
        )
    )
    back = unflatten(leaves)
    assert back["momentum_vector"][1] is tree["momentum_vector"][1]
    assert back["m_t"]["fc.bias"] is tree["m_t"]["fc.bias"]


@pytest.mark.parametrize(
    ("tree", "what"),
    [
        ({"a": {"b": object()}}, "object"),
        ({"a": {1, 2}}, "set"),
        ({"a": np.array([None])}, "Python objects"),
        ({"a": {"b/c": 1}}, "the key 'b/c'"),
        ({"a": {"#1": 1}}, "the key '#1'"),
        ({"a": {"": 1}}, "the key ''"),
        ({"a": {True: 1}}, "the key True"),
        ({"a": {(1, 2): 1}}, r"the key \(1, 2\)"),
    ],
)
def test_what_cannot_be_kept_is_told(tree, what):
    with pytest.raises(TypeError, match=what):
        flatten(tree)
