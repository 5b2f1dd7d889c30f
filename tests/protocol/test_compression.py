"""Rounded uploads by hand, and error feedback."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfmd.protocol.compression import ROUNDINGS, UPLOADS, Upload, round_update, upload_bytes


def sent_from_zero(upload, values, residual=()):
    """The upload of a parameter w that was zero, what the server makes of it, and what is left over."""
    start = {"w": np.zeros(len(values), np.float32)}
    before = {"w": torch.tensor(residual)} if residual else {}
    sent, left = round_update({"w": torch.tensor(values)}, start, before, upload, {"w"})
    return sent, sent.restored(start)["w"], left["w"]


def test_int8_by_hand():
    sent, restored, left = sent_from_zero("int8", [2.54, -1.0, 0.009, 0.0])
    assert sent.arrays["w"].dtype == torch.int8
    assert sent.arrays["w"].tolist() == [127, -50, 0, 0]
    assert sent.scales == {"w": pytest.approx(0.02)}
    assert restored.tolist() == pytest.approx([2.54, -1.0, 0.0, 0.0])
    assert left.tolist() == pytest.approx([0, 0, 0.009, 0], abs=1e-6)


def test_fp16_by_hand():
    sent, restored, left = sent_from_zero("fp16", [1 + 2**-12, -3.0, 1e6])
    assert sent.arrays["w"].dtype == torch.float16
    assert sent.scales == {}
    assert restored.tolist() == [1.0, -3.0, 65504.0]  # the largest half
    assert left.tolist() == [2**-12, 0.0, 1e6 - 65504]


@pytest.mark.parametrize("upload", ROUNDINGS)
@pytest.mark.parametrize("values", [[0.0, 0.0], [1e-44, -1e-45], [3e38, -1.0]])
def test_updates_of_any_size_can_be_sent(upload, values):
    _, restored, left = sent_from_zero(upload, values)
    assert restored.isfinite().all()
    torch.testing.assert_close(restored + left, torch.tensor(values))


def test_what_was_left_over_is_sent_next_time():
    _, restored, left = sent_from_zero("int8", [1.27, 0.004], residual=[0.0, 0.004])
    assert restored.tolist() == pytest.approx([1.27, 0.01])
    assert left.tolist() == pytest.approx([0, -0.002], abs=1e-7)


@pytest.mark.parametrize("upload", ROUNDINGS)
def test_with_error_feedback_the_sent_updates_sum_up_to_the_true_ones(upload):
    generator = torch.Generator().manual_seed(0)
    start, residual = {"w": np.zeros(50, np.float32)}, {}
    true, fed_back, lossy = (torch.zeros(50) for _ in range(3))
    for _ in range(100):
        update = {"w": 1e-3 + torch.randn(50, generator=generator)}
        sent, residual = round_update(update, start, residual, upload, {"w"})
        careless, _ = round_update(update, start, {}, upload, {"w"})
        true += update["w"]
        fed_back += sent.restored(start)["w"]
        lossy += careless.restored(start)["w"]
    torch.testing.assert_close(fed_back + residual["w"], true, rtol=0, atol=1e-4)
    assert (fed_back - true).norm() < 0.3 * (lossy - true).norm()


# No smaller than the smallest scale that float32 holds in full.
UPDATES = st.lists(
    st.floats(-1e4, 1e4, width=32).map(lambda x: x if abs(x) > 1e-30 else 0.0), min_size=1, max_size=20
)


def rounding_error(upload, values):
    """What one rounding may lose of each value: half of a step."""
    if upload == "int8":
        return torch.full_like(values, float(values.abs().max()) / 127 / 2)
    half = torch.finfo(torch.float16)
    return (values.abs() * half.eps / 2).clamp(min=half.smallest_normal * half.eps / 2)


@pytest.mark.parametrize("upload", ROUNDINGS)
@given(update=UPDATES)
def test_a_rounding_loses_half_a_step_at_most_and_nothing_of_a_zero(upload, update):
    values = torch.tensor(update)
    _, restored, left = sent_from_zero(upload, update)
    assert ((restored - values).abs() <= rounding_error(upload, values) * (1 + 1e-4)).all()
    assert torch.equal(left, values - restored)
    assert not restored[values == 0].any()


@pytest.mark.parametrize("upload", ROUNDINGS)
@given(updates=st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3), max_size=6))
def test_what_was_sent_and_what_is_left_over_are_all_updates(upload, updates):
    start, residual, sent = {"w": np.zeros(3, np.float32)}, {"w": torch.zeros(3)}, torch.zeros(3).double()
    for update in updates:
        rounded, residual = round_update({"w": torch.tensor(update)}, start, residual, upload, {"w"})
        sent += rounded.restored(start)["w"]
    true = torch.tensor(updates, dtype=torch.double).reshape(-1, 3).sum(0)
    torch.testing.assert_close(sent + residual["w"], true, rtol=1e-6, atol=1e-2)


@pytest.mark.parametrize("exponent", [-149, -141, -137, -126, 0, 127])
def test_int8_keeps_the_sign_of_the_smallest_and_largest_numbers(exponent):
    """The smallest floats are so coarse that a scale of theirs is rounded by up to a third."""
    _, restored, _ = sent_from_zero("int8", [1.5 * 2.0**exponent, -(2.0**exponent)])
    assert restored[1] <= 0 <= restored[0]


@pytest.mark.parametrize("upload", ROUNDINGS)
def test_buffers_and_frozen_kernels_are_left_alone(upload):
    received = {
        "w": np.ones(2, np.float32),
        "bank.0": np.ones(2, np.float32),
        "running_var": np.ones(2, np.float32),
        "num_batches_tracked": np.array(3),
    }
    update = {
        "w": torch.tensor([2.0, 3.0]),
        "running_var": torch.tensor([0.001, 1.0]),
        "num_batches_tracked": torch.tensor(4),
    }
    sent, left = round_update(update, received, {"bank.0": torch.ones(2)}, upload, {"w", "bank.0"})
    restored = sent.restored(received)
    assert restored.keys() == update.keys()
    for name in ("running_var", "num_batches_tracked"):
        assert torch.equal(restored[name], update[name])
    assert left.keys() == {"w", "bank.0"}
    assert torch.equal(left["bank.0"], torch.ones(2))


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (Upload({"w": np.ones(2)}), "array w of type torch.float64 can't be added to torch.float32"),
        (Upload({"w": np.ones(2, np.int8)}), "array w of type torch.int8 can't be added"),
        (Upload({"n": np.ones((), np.int32)}), "array n of type torch.int32 can't be added to torch.int64"),
    ],
)
def test_foreign_types_are_refused(sent, message):
    with pytest.raises(ValueError, match=message):
        sent.restored({"w": np.ones(2, np.float32), "n": np.array(1)})


@pytest.mark.parametrize("upload", UPLOADS)
def test_bytes_are_those_of_what_is_sent(upload):
    arrays = {"w": np.ones((4, 5), np.float32), "b": np.ones(3, np.float32), "n": np.array(7)}
    assert (
        upload_bytes(arrays, upload, {"w", "b"})
        == {
            "fp32": 4 * 23 + 8,
            "fp16": 2 * 23 + 8,
            "int8": 23 + 2 * 8 + 8,  # a scale is a double
        }[upload]
    )
