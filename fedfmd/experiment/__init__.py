"""Experiments: from YAML files to finished runs."""

from fedfmd.experiment.files import Experiment, PlannedRun, load_experiment, load_settings
from fedfmd.experiment.run import available_cores, run_experiment
from fedfmd.serving.checkpoints import export_checkpoint, trained_model

__all__ = [
    "Experiment",
    "PlannedRun",
    "available_cores",
    "export_checkpoint",
    "load_experiment",
    "load_settings",
    "run_experiment",
    "trained_model",
]
