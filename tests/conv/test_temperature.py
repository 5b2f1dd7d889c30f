"""Temperature schedules and how they reach the layers."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedfmd.conv import TemperatureSchedule, has_temperature, make_conv, set_temperature
from fedfmd.conv.temperature import SHAPES


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear", {0: 30.0, 5: 15.5, 10: 1.0, 50: 1.0}),
        ("cosine", {0: 30.0, 5: 15.5, 10: 1.0, 50: 1.0, 2.5: 15.5 + 14.5 * math.cos(math.pi / 4)}),
        ("geometric", {0: 30.0, 5: math.sqrt(30), 10: 1.0, 50: 1.0, 2.5: 30**0.75}),
        ("constant", {0: 30.0, 5: 30.0, 50: 30.0}),
    ],
)
def test_schedules(shape, expected):
    schedule = TemperatureSchedule(initial=30.0, final=1.0, steps=10, shape=shape)
    assert {step: schedule.at(step) for step in expected} == pytest.approx(expected)


def test_a_geometric_temperature_changes_by_the_same_factor_each_step_and_may_rise():
    falling = TemperatureSchedule(initial=80.0, final=10.0, steps=3, shape="geometric")
    rising = TemperatureSchedule(initial=1.0, final=100.0, steps=2, shape="geometric")
    assert [falling.at(step) for step in range(5)] == pytest.approx([80.0, 40.0, 20.0, 10.0, 10.0])
    assert [rising.at(step) for step in range(3)] == pytest.approx([1.0, 10.0, 100.0])


def test_without_steps_the_final_temperature_holds_from_the_start():
    assert TemperatureSchedule(initial=30.0, steps=0).at(0) == 1.0


@pytest.mark.parametrize("shape", SHAPES)
@given(ends=st.tuples(*[st.floats(1e-30, 1e30)] * 2), steps=st.integers(0, 40))
def test_a_temperature_falls_from_the_initial_one_to_the_final_one(shape, ends, steps):
    initial, final = max(ends), min(ends)
    schedule = TemperatureSchedule(initial, final, steps, shape)
    course = [schedule.at(step) for step in range(steps + 3)]
    assert course[0] == (initial if steps or shape == "constant" else final)
    assert course[-3:] == [initial if shape == "constant" else final] * 3
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(course))
    assert min(course) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial": math.nan}, "temperature = nan must be a positive finite number"),
        ({"final": 0.0}, "temperature = 0.0 must be"),
        ({"steps": -1}, "steps = -1 must not be negative"),
        ({"shape": "stairs"}, "shape = 'stairs' is unknown; use one of linear, cosine, geometric, constant"),
    ],
)
def test_bad_schedules_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TemperatureSchedule(**options)


@pytest.mark.parametrize(("name", "has"), [("static", False), ("condconv", False), ("fmdconv", True)])
def test_some_convolutions_have_a_temperature(name, has):
    assert has_temperature(nn.Sequential(make_conv(name, 4, 4, 1))) is has


def test_set_temperature_reaches_every_layer_that_has_one():
    model = nn.Sequential(
        *(make_conv(name, 4, 4, 1) for name in ("static", "condconv", "dyconv", "odconv", "fmdconv"))
    )
    set_temperature(model, 2.5)
    found = {name: float(value) for name, value in model.state_dict().items() if name.endswith("temperature")}
    assert found == {"2.temperature": 2.5, "3.temperature": 2.5, "4.temperature": 2.5}
    for bad in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="must be a positive finite number"):
            set_temperature(model, bad)
