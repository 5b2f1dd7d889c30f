"""What holds for each split of any labels over any number of clients."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfmd.data import PARTITIONS, make_partition

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=60).map(np.array)
WANTED = st.fixed_dictionaries(
    {
        "clients": st.integers(1, 9),
        "alpha": st.floats(0.01, 100),
        "classes_per_client": st.integers(1, 5),
        "min_images": st.integers(1, 4),
        "seed": st.integers(0, 2**32),
    }
)


@pytest.mark.parametrize("scheme", PARTITIONS)
@settings(max_examples=25)
@given(labels=LABELS, wanted=WANTED)
def test_a_split_is_whole_and_repeatable_or_refused(scheme, labels, wanted):
    try:
        partition = make_partition(labels, scheme, **wanted)
    except ValueError as error:
        assert str(error).startswith("partition.")
        assert "\n" not in str(error)
        # Equal and drawn sizes can be met wherever there are images enough.
        if scheme in ("iid", "quantity"):
            assert wanted["clients"] * wanted["min_images"] > len(labels)
        with pytest.raises(ValueError, match=r"^partition\."):
            make_partition(labels, scheme, **wanted)
        return
    assert len(partition.indices) == wanted["clients"]
    assert np.array_equal(np.sort(np.concatenate(partition.indices)), np.arange(len(labels)))
    assert partition.sizes.min() >= wanted["min_images"]
    again = make_partition(labels, scheme, **wanted)
    assert all(map(np.array_equal, partition.indices, again.indices))
