import pytest
from torch import nn

from fedfmd.algorithms.fedbn import norm_views
from fedfmd.conv import CONVS
from fedfmd.models import make_model


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("conv", CONVS)
def test_normalisation_layers_are_found_wherever_they_are(conv, norm):
    """A layer's parts are named as its weight, which all have; only BatchNorm has statistics."""
    model = make_model("resnet8", conv, 3, kernels=2, width=0.25, norm=norm)
    views, names = norm_views(model), model.state_dict().keys()
    layers = {name.removesuffix(".running_var") for name in names if name.endswith(".running_var")}
    if norm == "group":
        assert not layers
        layers = {name.removesuffix(".weight") for name in views if name.endswith(".weight")}
        assert "bn1" in layers
        assert any(".attention." in layer for layer in layers) == (conv in ("odconv", "fmdconv"))
    assert views.keys() == {name for name in names if name.rpartition(".")[0] in layers}
    views["bn1.weight"].fill_(3.0)
    assert model.state_dict()["bn1.weight"].eq(3).all()


def test_a_model_without_normalisation_has_nothing_to_keep():
    with pytest.raises(ValueError, match="this model has none"):
        norm_views(nn.Linear(2, 2))
