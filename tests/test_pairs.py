import pytest

from fedfmd.pairs import join_pairs, read_value, split_pairs
from fedfmd.settings import Settings


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"depth": 3, "wide": True, "name": "tall"}, "depth:3, wide:True, name:tall"),
        ({"rate": 1e-05, "none": None}, "rate:1e-05, none:null"),
        ({"widths": [16, 32], "last": 1}, "widths:[16, 32], last:1"),
        ({"names": ["a", "b"]}, 'names:["a", "b"]'),
        ({"stages": {"first": 1, "second": 2}}, 'stages:{"first": 1, "second": 2}'),
        ({"channels": [[16, 32], [64, 128]], "last": 1}, "channels:[[16, 32], [64, 128]], last:1"),
        ({"names": ["a]b", 'c", {d'], "last": 1}, 'names:["a]b", "c\\", {d"], last:1'),
        ({"five": "5", "yes": "yes"}, 'five:"5", yes:"yes"'),
        ({"words": "one, two: it's", "after": 0.5}, 'words:"one, two: it\'s", after:0.5'),
    ],
    ids=str,
)
def test_values_are_written_as_a_text_that_says_the_same(values, text):
    assert join_pairs(values) == text
    assert {name: read_value(value) for name, value in split_pairs(text)} == values


def test_people_write_them_with_or_without_spaces():
    assert list(split_pairs(" a: 1,b:[2, 3] ,, c : 'x, y'")) == [("a", "1"), ("b", "[2, 3]"), ("c", "'x, y'")]


def test_a_networks_options_reach_it_through_flowers_config():
    options = {"widths": [16, 32], "drop-rate": 1e-05, "name": "5", "gate": None}
    settings = Settings.from_mapping({"model.arch": "mine:make", "model.options": options})
    again = Settings.from_mapping(settings.flat())
    assert again.model.arguments() == {"widths": [16, 32], "drop_rate": 1e-05, "name": "5", "gate": None}
