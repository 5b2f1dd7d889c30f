"""Networks over any convolution: ``make_model("resnet18", "fmdconv", classes=10)``."""

from fedfmd.models.factory import MODELS, make_model
from fedfmd.models.resnet import Architecture, feature_layers, resnet

__all__ = ["MODELS", "Architecture", "feature_layers", "make_model", "resnet"]
