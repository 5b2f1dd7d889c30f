"""What holds for any settings: they come back from flat keys and YAML, and a wrong one is an error that names it."""

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from fedfmd.conv import ATTENTIONS, CONVS
from fedfmd.data import PARTITIONS
from fedfmd.edge import POLICIES
from fedfmd.errors import SettingsError
from fedfmd.experiment import load_settings
from fedfmd.runs import RunFolder
from fedfmd.settings import Settings, read_yaml

DEFAULTS = Settings().flat()
TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)
RANGES = {
    bool: st.booleans(),
    int: st.integers(0, 2**62),
    float: st.floats(0, allow_infinity=False),
    str: TEXTS,
}
NAMES = {
    "kind": st.sampled_from(["federated", "centralised"]),
    "model.conv": st.sampled_from(sorted(CONVS)),
    "model.attentions": st.lists(st.sampled_from(ATTENTIONS), min_size=1, unique=True).map(",".join),
    "partition.scheme": st.sampled_from(sorted(PARTITIONS)),
    "budget.policy": st.sampled_from(sorted(POLICIES)),
}
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
VALUES = {key: NAMES.get(key, RANGES[type(default)]) for key, default in DEFAULTS.items()}


@st.composite
def changes(draw, of=None):
    """A few settings with values of their own types, or others."""
    keys = draw(st.lists(st.sampled_from(sorted(DEFAULTS)), max_size=4, unique=True))
    return {key: draw(VALUES[key] if of is None else of) for key in keys}


@settings(max_examples=60)
@given(values=changes())
def test_settings_come_back_from_flat_keys_and_from_yaml(values, tmp_path_factory):
    try:
        made = Settings.from_mapping(values)
    except SettingsError:
        assume(False)
    assert made.flat().keys() == DEFAULTS.keys()
    assert Settings.from_mapping(made.flat()) == made
    folder = RunFolder(tmp_path_factory.getbasetemp() / "settings")
    folder.write_settings(made.flat())
    assert Settings.from_mapping(read_yaml(folder.settings)) == made


@given(values=changes(of=SCALARS))
def test_any_scalar_is_a_setting_or_an_error_that_names_one_given(values):
    try:
        Settings.from_mapping(values)
    except SettingsError as error:
        assert any(key in str(error) for key in values)  # noqa: PT017 - some draws are no errors


@given(
    key=st.sampled_from(sorted(DEFAULTS)), place=st.integers(0, 30), letter=st.sampled_from(["", "x", "-"])
)
def test_a_misspelt_setting_is_an_error_that_names_it(key, place, letter):
    misspelt = key[:place] + letter + key[place + 1 :]
    assume(misspelt not in DEFAULTS)
    with pytest.raises(SettingsError, match=f"^unknown setting {misspelt} = 1; the nearest one is "):
        Settings.from_mapping({misspelt: 1})


YAML = st.text(st.sampled_from("0123456789-:.+eb_xoT !~[]{},&*#|>%@'\n"), max_size=12)


@given(key=st.sampled_from(sorted(DEFAULTS)), text=YAML | TEXTS)
@example(key="data.dir", text="2024-02-30")
@example(key="seed", text="0b_")
@example(key="seed", text="!!bool maybe")
@example(key="seed", text="!!timestamp now")
def test_any_override_is_a_setting_or_an_error_that_names_it(key, text):
    try:
        load_settings(None, [f"{key}={text}"])
    except SettingsError as error:
        assert key in str(error)  # noqa: PT017 - many draws are no errors
