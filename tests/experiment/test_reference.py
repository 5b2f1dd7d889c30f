"""The list of settings: complete, and right about what is allowed."""

import pytest

from fedfmd.algorithms import ALGORITHMS
from fedfmd.conv import CONVS
from fedfmd.errors import SettingsError
from fedfmd.experiment.reference import all_settings, find_settings
from fedfmd.settings import Settings

SETTINGS = {setting.key: setting for setting in all_settings()}


def test_every_setting_is_listed_with_its_default():
    assert {key: setting.default for key, setting in SETTINGS.items()} == Settings().flat()


@pytest.mark.parametrize("key", SETTINGS)
def test_every_setting_has_a_meaning_that_is_a_sentence(key):
    meaning = SETTINGS[key].meaning
    assert len(meaning.split()) >= 3
    assert meaning[0].isupper()
    assert "`" not in meaning  # read in a terminal


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        ("model.conv", f"{', '.join(CONVS)}, module:Class"),
        ("model.attentions", "one or more of input, kernel, output"),
        ("model.kernels", "whole number at least 1"),
        ("train.momentum", "number at least 0 and below 1"),
        ("train.lr", "number above 0"),
        ("data.download", "true or false"),
        ("data.dir", "text"),
        ("server.strategy", f"{', '.join(ALGORITHMS)}, module:Class"),
    ],
)
def test_what_is_allowed_is_told_in_words(key, allowed):
    assert SETTINGS[key].allowed == allowed


GO_WITH = {
    "train.cuda-graphs": {"device": "auto"},
    "budget.kernel-choice": {"budget.policy": "kernels"},
    "privacy.mode": {"privacy.clip-norm": 1},
}
"""Other values that a setting is of no use without."""


@pytest.mark.parametrize("key", [key for key, setting in SETTINGS.items() if setting.choices])
def test_every_choice_of_the_typed_model_can_be_set(key):
    elsewhere = GO_WITH.get(key, {})
    for choice in SETTINGS[key].choices:
        values = elsewhere | {key: choice == "true" if choice in ("true", "false") else choice}
        value = Settings.from_mapping(values).flat()[key]
        assert (str(value).lower() if isinstance(value, bool) else str(value)) == choice


def test_settings_are_found_by_name_meaning_or_value():
    assert {"temperature.initial", "temperature.rounds"} <= {s.key for s in find_settings("temperature")}
    assert "train.weight-decay" in {s.key for s in find_settings("Weight Decay of SGD")}
    assert {s.key for s in find_settings("krum")} == {"server.strategy", "server.byzantine"}
    assert len(find_settings("")) == len(SETTINGS)


def test_a_word_that_nothing_tells_of_suggests_the_nearest():
    with pytest.raises(
        SettingsError, match=r"no setting tells of 'temprature'; the nearest word is 'temperature'"
    ):
        find_settings("temprature")
