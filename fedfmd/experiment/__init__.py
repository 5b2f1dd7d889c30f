"""Experiments: from YAML files to finished runs."""

from fedfmd.experiment.files import Cell, Experiment, load_experiment
from fedfmd.experiment.run import available_cores, run_experiment

__all__ = ["Cell", "Experiment", "available_cores", "load_experiment", "run_experiment"]
