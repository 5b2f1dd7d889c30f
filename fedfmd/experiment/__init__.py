"""Experiments: from YAML files to finished runs."""

from fedfmd.experiment.files import Cell, Experiment, load_experiment
from fedfmd.experiment.run import run_experiment

__all__ = ["Cell", "Experiment", "load_experiment", "run_experiment"]
