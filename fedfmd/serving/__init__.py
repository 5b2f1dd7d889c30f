"""Trained models at work: classifiers, exports, Grad-CAM++; no Flower."""
