import pytest
from flwr.clientapp import ClientApp

from fedfmd.algorithms import Update
from fedfmd.engines.inline import InlineGrid
from fedfmd.protocol.messages import ClientResult


@pytest.fixture
def identity():
    """What Flower's messages need of the process; a grid gives it."""
    with InlineGrid(ClientApp(), {}, []):
        yield


@pytest.fixture
def update():
    """Makes an update of one client that says `arrays`."""

    def make(arrays, images=20, steps=1, **more):
        result = ClientResult(3, images, steps, images, 1.0, 0.5, 0.1)
        return Update(
            **{"arrays": arrays, "weights": dict.fromkeys(arrays, images), "results": (result,)}
            | {"start": arrays}
            | more
        )

    return make
