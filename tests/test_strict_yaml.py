import pytest
import yaml

from fedfmd.strict_yaml import load_yaml


def test_what_is_read_is_what_yaml_says():
    text = "a: [1, 0.5, on]\nb: &x {c: null}\nd: {<<: *x, c: 2}\n"
    assert load_yaml(text) == {"a": [1, 0.5, True], "b": {"c": None}, "d": {"c": 2}}


@pytest.mark.parametrize("text", ["lr: 1\nlr: 2\n", "train:\n  lr: 1\n  lr: 1\n", "- {lr: 1, lr: 2}\n"])
def test_a_key_that_is_given_twice_is_an_error(text):
    with pytest.raises(yaml.YAMLError, match=r"the key 'lr' is given twice[\s\S]*line \d"):
        load_yaml(text)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("2024-02-30", "'2024-02-30' is no timestamp"),
        ("0b_", "'0b_' is no int"),
        ("!!bool maybe", "'maybe' is no bool"),
        ("!!timestamp now", "'now' is no timestamp"),
    ],
)
def test_what_only_looks_like_a_value_is_an_error_with_its_line(value, problem):
    with pytest.raises(yaml.YAMLError, match=rf"{problem}[\s\S]*line 2"):
        load_yaml(f"seed: 1\nrun: {value}")
