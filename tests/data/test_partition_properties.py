"""What holds for each split of any labels over any number of clients."""

from itertools import chain

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


def split(labels, scheme, wanted):
    """The clients' images, or why there is no such split."""
    try:
        return [own.tolist() for own in make_partition(labels, scheme, **wanted).indices]
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("scheme", PARTITIONS)
@settings(max_examples=25)
@given(labels=LABELS, wanted=WANTED)
def test_a_split_is_whole_or_refused_and_repeatable(scheme, labels, wanted):
    shares = split(labels, scheme, wanted)
    assert split(labels, scheme, wanted) == shares
    if isinstance(shares, str):
        assert shares.startswith("partition.")
        assert "\n" not in shares
        # Equal and drawn sizes can be met wherever there are images enough.
        if scheme in ("iid", "quantity"):
            assert wanted["clients"] * wanted["min_images"] > len(labels)
    else:
        assert len(shares) == wanted["clients"]
        assert sorted(chain.from_iterable(shares)) == list(range(len(labels)))
        assert min(map(len, shares)) >= wanted["min_images"]
