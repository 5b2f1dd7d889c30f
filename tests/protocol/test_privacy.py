import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from flwr.supercore.differential_privacy import compute_clip_model_update
from hypothesis import given
from hypothesis import strategies as st

from fedfmd.protocol.privacy import clipped_ways, epsilon, noised_update, noisy_mean

START = {"w": np.full((3, 4), 0.5, np.float32), "b": np.zeros(2, np.float32), "n": np.array(7)}
PARAMETERS = {"w", "b"}


def moved(way):
    """The arrays after a way of this length in every number."""
    return {name: array + np.asarray(way, array.dtype) for name, array in START.items()}


def length(ways):
    return math.sqrt(sum(float(np.square(way).sum()) for way in ways.values()))


def no_noise():
    return np.random.default_rng(0)


@given(way=st.floats(-1e6, 1e6), norm=st.floats(1e-6, 1e6))
def test_no_update_is_longer_than_the_norm(way, norm):
    ways = clipped_ways(moved(way), START, PARAMETERS, norm)
    assert ways.keys() == PARAMETERS
    assert length(ways) <= norm * (1 + 1e-12)


def test_a_long_update_keeps_its_direction_and_a_short_one_all():
    ways = clipped_ways(moved(3), START, PARAMETERS, norm=2)
    assert length(ways) == pytest.approx(2)
    np.testing.assert_allclose(np.concatenate([way.ravel() for way in ways.values()]), 2 / math.sqrt(14))
    for norm in (20, math.inf):
        kept = clipped_ways(moved(3), START, PARAMETERS, norm)
        assert all((way == 3).all() for way in kept.values())
    assert length(clipped_ways(START, START, PARAMETERS, norm=1)) == 0


def test_clipping_is_flowers():
    theirs = [moved(3)[name] for name in ("w", "b")]
    compute_clip_model_update(theirs, [START[name] for name in ("w", "b")], 2.0)
    ours = noisy_mean([clipped_ways(moved(3), START, PARAMETERS, 2)], START, 0, no_noise())
    for name, array in zip(("w", "b"), theirs, strict=True):
        np.testing.assert_allclose(ours[name], array, rtol=1e-6)


def test_without_noise_all_clients_count_alike():
    ways = [clipped_ways(moved(way), START, PARAMETERS, 100) for way in (1, 2, 6)]
    mean = noisy_mean(ways, START, 0, no_noise())
    assert mean.keys() == PARAMETERS
    assert mean["w"].dtype == np.float32
    assert (mean["w"] == 3.5).all()
    assert (mean["b"] == 3).all()


@pytest.mark.parametrize("clients", [1, 4])
def test_the_noise_on_the_sum_has_the_standard_deviation(clients):
    start = {"w": np.zeros((200, 200), np.float32), "b": np.zeros(10_000, np.float32)}
    ways = [{name: np.zeros(array.shape) for name, array in start.items()}] * clients
    mean = noisy_mean(ways, start, 0.3, np.random.default_rng(1))
    for array in mean.values():
        assert array.std() * clients == pytest.approx(0.3, rel=0.03)
        assert array.mean() * clients == pytest.approx(0, abs=0.01)
    assert abs(np.corrcoef(mean["w"].ravel()[:10_000], mean["b"])[0, 1]) < 0.05


def test_a_local_update_is_clipped_then_noised_and_its_buffers_stay():
    start = {"w": np.zeros((300, 300), np.float32), "n": np.array(7)}
    update = {"w": torch.full((300, 300), 5.0), "n": torch.tensor(7)}
    sent = noised_update(
        update, start, {"w"}, norm=3.0, noise_multiplier=0.2, generator=np.random.default_rng(2)
    )
    assert sent["n"] is update["n"]
    assert sent["w"].dtype == torch.float32
    assert float(sent["w"].std()) == pytest.approx(0.6, rel=0.02)
    assert float(sent["w"].mean()) == pytest.approx(3 / 300, abs=0.01)
    assert float(update["w"].min()) == 5


@pytest.mark.parametrize(("noise", "rate", "releases"), [(1.1, 0.1, 50), (0.7, 1.0, 3), (4.0, 0.01, 200)])
def test_epsilon_is_the_accountants_own(noise, rate, releases):
    accountants = pytest.importorskip("opacus.accountants")
    accountant = accountants.RDPAccountant()
    for _ in range(releases):
        accountant.step(noise_multiplier=noise, sample_rate=rate)
    assert epsilon(noise, rate, releases, 1e-5) == accountant.get_epsilon(1e-5)


def test_epsilon_of_a_single_gaussian_is_close_to_the_exact_one():
    """With σ = 1 and δ = 1e-5 the analytic Gaussian mechanism (Balle & Wang, ICML 2018) has ε = 4.377."""
    pytest.importorskip("opacus.accountants")
    assert 4.377 < epsilon(1.0, 1.0, 1, 1e-5) < 4.9


def test_nothing_released_is_nothing_told_and_no_noise_tells_all():
    assert epsilon(1.0, 0.1, 0, 1e-5) == 0
    assert epsilon(0.0, 0.1, 1, 1e-5) == math.inf


def test_the_accountant_leaves_the_log_as_it_is():
    code = (
        "import logging; from fedfmd.protocol.privacy import epsilon\n"
        "epsilon(1, 1, 1, 1e-5); print(logging.getLogger().handlers)"
    )
    pytest.importorskip("opacus")
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
