"""The weights that a run starts from, where they are not drawn: a checkpoint's, or torchvision's on disk."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fedfmd.conv import dynamic_layers, is_dynamic, load_static_state_dict
from fedfmd.errors import SettingsError, one_line
from fedfmd.protocol.state import check_weights
from fedfmd.runs import Header, load_model
from fedfmd.seeds import derive_seed
from fedfmd.settings import ModelSettings, Settings

SAME_NETWORK = frozenset({"arch", "stem", "norm", "width", "options"})
"""Settings of a network that a static and a dynamic one must have in common."""

NO_WEIGHTS = frozenset({"init", "pretrained", "attention-init", "mixing"})
"""Settings of a network that its weights don't depend on."""


def start_file(settings: Settings) -> Path | None:
    """Return the file of the weights that the run starts from; None if they are drawn."""
    name = settings.model.init or settings.model.pretrained
    return Path(name).expanduser() if name else None


def load_start(model: nn.Module, settings: Settings, classes: int) -> str:
    """Fill a run's fresh model with the weights that it starts from; returns what was done, "" if nothing.

    Static weights fill a dynamic network as in `make_dynamic`; that draws numbers, which depend on the seed alone.

    Raises:
        SettingsError: the file can't be read, or its weights are those of another network.
    """
    path = start_file(settings)
    if path is None:
        return ""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(settings.seed, "start"))
        if settings.model.init:
            return _load_checkpoint(model, settings.model, classes, path)
        return _load_pretrained(model, settings.model, classes, path)


def settings_in(path: Path, header: Header) -> Settings:
    """Return the settings that a model's file holds.

    Raises:
        SettingsError: they can't be used; the text names the file.
    """
    try:
        return Settings.from_mapping(header.settings)
    except SettingsError as error:
        raise SettingsError(f"{path} holds settings that can't be used: {error}") from None


def _load_checkpoint(model: nn.Module, wanted: ModelSettings, classes: int, path: Path) -> str:
    name = f"model.init = {wanted.init!r}"
    try:
        arrays, header = load_model(path)
    except (OSError, ValueError) as error:
        raise SettingsError(f"{name} can't be read ({one_line(error)}): give a checkpoint of a run") from None
    if not header.settings:
        raise SettingsError(
            f"{name} holds no model of a run: give a checkpoint, checkpoints/round-….safetensors"
        )
    found = settings_in(path, header).model
    now, before = wanted.model_dump(by_alias=True), found.model_dump(by_alias=True)
    converted = not is_dynamic(found.conv) and is_dynamic(wanted.conv)
    if converted:
        compared = SAME_NETWORK
    elif found.conv == wanted.conv and is_dynamic(found.conv):
        compared = frozenset(now) - NO_WEIGHTS
    else:
        compared = SAME_NETWORK | {"conv"}
    if differing := [key for key in now if key in compared and now[key] != before[key]]:
        how = ", ".join(f"model.{key} is {before[key]!r} there, {now[key]!r} here" for key in differing)
        raise SettingsError(
            f"{name} holds another network ({how}): set what is there, or take another checkpoint; one of a static "
            "network fits all convolutions"
        )
    if header.class_names and len(header.class_names) != classes:
        raise SettingsError(
            f"{name} tells {len(header.class_names)} classes apart, and this run has {classes}: take a checkpoint of "
            "a run with as many"
        )
    _load(model, arrays, name, converted)
    return f"weights of {path}{', its convolutions made dynamic' if converted else ''}"


def _load_pretrained(model: nn.Module, wanted: ModelSettings, classes: int, path: Path) -> str:
    name = f"model.pretrained = {wanted.pretrained!r}"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = one_line(error).partition(". ")[0]
        raise SettingsError(f"{name} can't be read ({reason}): give a state dict of torchvision's") from None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise SettingsError(f"{name} holds no state dict: give one of torchvision's for {wanted.arch}")
    state = dict(state)
    own = model.state_dict()
    *_, classifier = (layer for layer, module in model.named_modules() if isinstance(module, nn.Linear))
    weight = state.get(f"{classifier}.weight")
    fresh = weight is not None and len(weight) != classes
    if fresh:
        state |= {key: own[key] for key in (f"{classifier}.weight", f"{classifier}.bias")}
    _load(model, state, name, bool(dynamic_layers(model)))
    return f"torchvision's weights of {path}" + (
        f", but a fresh classifier of {classes} classes" if fresh else ""
    )


def _load(model: nn.Module, state: Mapping[str, Tensor], name: str, convert: bool) -> None:
    try:
        check_weights(state, model)
        if convert:
            load_static_state_dict(model, state)
        else:
            model.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())
        shown = f"{text[:300]}…" if len(text) > 300 else text
        raise SettingsError(f"{name} doesn't fit this run's network: {shown}") from None
