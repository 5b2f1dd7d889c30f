"""Networks over any convolution: ``make_model("resnet18", "fmdconv", classes=10)``."""

from fedfmd.models.factory import MODELS, TORCHVISION, make_model
from fedfmd.models.resnet import NORMS, Architecture, feature_layers, resnet

__all__ = ["MODELS", "NORMS", "TORCHVISION", "Architecture", "feature_layers", "make_model", "resnet"]
