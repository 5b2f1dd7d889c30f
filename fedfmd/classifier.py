"""Trained models that classify images: the short name of `fedfmd.serving.classifier`."""

from fedfmd.serving.classifier import Classifier, load_classifier

__all__ = ["Classifier", "load_classifier"]
