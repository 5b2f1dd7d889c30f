"""The settings of a run: one typed model for YAML files, ``flwr run`` and Python.

A setting is named by a dotted key (``partition.alpha``). Values are scalars, because Flower's run
config holds nothing else; 0 and "" stand for "not set" where a setting may be left out.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from fedfmd.conv import (
    ATTENTION_INITS,
    ATTENTIONS,
    CONVS,
    MIXINGS,
    OPTIONS,
    has_kernel_attention,
    is_dynamic,
    options_of,
)
from fedfmd.conv.mixing import EARLIER_NAMES
from fedfmd.data import AUGMENT_CHOICES, DATASETS, PARTITIONS
from fedfmd.edge import ASSIGNMENTS, KERNEL_CHOICES, LINKS, POLICIES
from fedfmd.edge.devices import MAX_JITTER
from fedfmd.errors import SettingsError, nearest_of, not_one_of
from fedfmd.models import MODELS
from fedfmd.protocol.compression import UPLOADS
from fedfmd.strict_yaml import load_yaml

Scalar = bool | int | float | str

KINDS = ("federated", "centralised")

FEDERATED = (
    *("partition.", "server.", "fleet.", "budget.", "transport."),
    *("train.local-epochs", "train.proximal-mu"),
)
"""How the settings begin that are about clients and their server."""

CHECKPOINTS = frozenset({"server.checkpoint-every", "server.keep-checkpoints"})
"""Those of them that centralised training heeds too."""

PAIRS = frozenset({"fleet.devices", "model.conv-options"})
"""Settings whose text, `name:amount, …`, may also be given as a mapping."""


def _one_of(allowed: Iterable[str], earlier: Mapping[str, str] = MappingProxyType({})) -> BeforeValidator:
    """Accept only registered names, and `earlier` names for them; suggest the nearest one."""
    names = tuple(allowed)

    def check(value: object) -> object:
        if value in names:
            return value
        if isinstance(value, str) and value in earlier:
            return earlier[value]
        raise ValueError(not_one_of(value, names))

    return BeforeValidator(check)


def _split_list(value: object) -> object:
    """Read a list given as a YAML list, a JSON string or comma-separated words."""
    if isinstance(value, str):
        text = value.strip()
        try:
            return (
                json.loads(text)
                if text.startswith("[")
                else [w.strip() for w in text.split(",") if w.strip()]
            )
        except json.JSONDecodeError as error:
            raise ValueError(f"is not a JSON list ({error.msg})") from None
    return value


def _no_bool(value: object) -> object:
    """Refuse what Python takes for 0 and 1; texts stay, because YAML reads 5e-4 as one."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _share_or_number(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError("must be a share below 1, or a whole number of images; 0 is none")
    return value


def _kebab(name: str) -> str:
    return name.replace("_", "-")


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, alias_generator=_kebab, populate_by_name=True
    )


Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False, strict=False)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Attentions = Annotated[
    tuple[Annotated[str, _one_of(ATTENTIONS)], ...],
    BeforeValidator(_split_list),
    Field(strict=False, min_length=1),
]


class ModelSettings(_Section):
    """Which network is trained.

    `conv_options` are options that only some convolutions have, and no setting of their own: `name:value, …`.
    """

    arch: Annotated[str, _one_of(MODELS)] = "resnet8"
    conv: Annotated[str, _one_of(CONVS)] = "fmdconv"
    kernels: Count = 4
    attentions: Attentions = ATTENTIONS
    attention_init: Annotated[str, _one_of(ATTENTION_INITS)] = "neutral"
    stem: Literal["cifar", "imagenet"] = "cifar"
    norm: Literal["batch", "group"] = "group"
    width: Positive = 1.0
    reduction: Positive = 0.0625
    mixing: Annotated[str, _one_of(("auto", *MIXINGS), EARLIER_NAMES)] = "auto"
    conv_options: str = ""

    def options(self) -> dict[str, Any]:
        """Return the options of the convolution, by the names that `make_conv` has for them.

        Raises:
            SettingsError: `conv_options` has one that the convolution doesn't have, or a value of another type.
        """
        own = {name: getattr(self, name) for name in type(self).model_fields if name in OPTIONS}
        return own | dict(self._conv_options(own))

    def _conv_options(self, own: Collection[str]) -> Iterable[tuple[str, Scalar]]:
        free = {
            _kebab(name): (name, default)
            for name, default in options_of(self.conv).items()
            if name not in own and name != "temperature"
        }
        for part in filter(None, (part.strip() for part in self.conv_options.split(","))):
            key, _, text = (word.strip() for word in part.partition(":"))
            if key not in free:
                known = f"those of {self.conv} are {', '.join(free)}" if free else f"{self.conv} has none"
                raise SettingsError(f"model.conv-options = {self.conv_options!r}: no option {key!r}; {known}")
            name, default = free[key]
            value = load_yaml(text)
            if isinstance(default, float) and type(value) is int:
                value = float(value)
            if type(value) is not type(default):
                raise SettingsError(
                    f"model.conv-options = {self.conv_options!r}: {key} must be like its default, {default!r}"
                )
            yield name, value


class DataSettings(_Section):
    """Which images are used. `dir`, `train` and `test` are paths; `image_size` 0 keeps the source's own.

    `augment` is how training images are varied at random, "auto" being what suits the source.
    `validation` is the share (below 1) or the number of training images held out to choose by; 0 is none.
    `classes` is how many classes the labels of npz files stand for; 0: as many as there are labels.
    """

    dataset: Annotated[str, _one_of(DATASETS)] = "digits"
    dir: str = ""
    train: str = ""
    test: str = ""
    download: bool = False
    image_size: Annotated[int, Field(ge=0)] = 0
    augment: Annotated[str, _one_of(AUGMENT_CHOICES)] = "auto"
    validation: Annotated[NonNegative, AfterValidator(_share_or_number)] = 0.0
    classes: Annotated[int, Field(ge=0)] = 0


class PartitionSettings(_Section):
    """How the training images are split over the clients."""

    scheme: Annotated[str, _one_of(PARTITIONS)] = "dirichlet"
    alpha: Positive = 0.5
    clients: Count = 10
    classes_per_client: Count = 2
    min_images: Count = 1


class TrainSettings(_Section):
    """SGD on a client, or centralised for `epochs`; the learning rate follows `schedule` over rounds or epochs."""

    lr: Positive = 0.05
    batch_size: Count = 16
    epochs: Count = 100
    local_epochs: Count = 6
    momentum: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = True
    weight_decay: NonNegative = 5e-4
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    precision: Literal["float32", "bf16"] = "float32"
    proximal_mu: NonNegative = 0.0


class TemperatureSettings(_Section):
    """Temperature of the kernel attention, over the server's rounds; over epochs in centralised training.

    It goes from `initial` to `final` within `rounds` by equal steps (linear), by equal factors (geometric), by
    half a cosine, or stays at `initial` (constant).
    """

    initial: Positive = 30.0
    final: Positive = 1.0
    rounds: Annotated[int, Field(ge=0)] = 10
    shape: Literal["linear", "cosine", "geometric", "constant"] = "linear"


class ServerSettings(_Section):
    """The server's loop and algorithm; `clients_per_round` 0 asks every client, `lr` 0 is the strategy's own.

    Centralised training heeds the settings of checkpoints alone, an epoch counting as a round. The model is tested
    every `evaluate_every` rounds, and after the last.
    lr, momentum (β₁), beta_2 and tau are those of server optimisers; trim is the share cut off at either end
    by fedtrimmedavg, byzantine the number of bad clients that krum stands, buffer the number of updates that
    fedbuff waits for, which count (1 + rounds behind)^-staleness.
    max_update_norm is the L2 norm, and max_update_ratio how many times the median norm of a round's updates, beyond
    which a client's update is scaled down to it; 0 is no limit. With one, every client has a message of its own.
    """

    rounds: Count = 20
    clients_per_round: Annotated[int, Field(ge=0)] = 0
    strategy: str = "fedavg"
    evaluate_every: Count = 1
    checkpoint_every: Count = 1
    keep_checkpoints: Count = 2
    max_failed_share: Share = 0.5
    round_timeout_s: Positive = 3600.0
    node_timeout_s: Positive = 120.0
    lr: NonNegative = 0.0
    momentum: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    beta_2: Annotated[Number, Field(ge=0, lt=1)] = 0.99
    tau: Positive = 1e-3
    trim: Annotated[Number, Field(ge=0, lt=0.5)] = 0.2
    byzantine: Annotated[int, Field(ge=0)] = 1
    buffer: Count = 5
    staleness: NonNegative = 0.5
    max_update_norm: NonNegative = 0.0
    max_update_ratio: NonNegative = 0.0


class FleetSettings(_Section):
    """Devices (`name:count` or `name:share%`, comma-separated) and their network; a YAML file may add devices.

    `efficiency` says whether a device's rates are those that it reaches with the model's convolution and kernels
    ("measured": by the devices' factors), or those of static ones for all ("none": by MACs alone).
    `assignment` says whether images decide who has a fast device. `availability` and `jitter` replace those of
    all devices unless they are 0. `trace` is a CSV file of the windows of virtual time in which clients are there.
    """

    devices: str = "pi-4:40%, pi-5:30%, jetson-nano:30%"
    link: Annotated[str, _one_of(LINKS)] = "wifi"
    devices_file: str = ""
    efficiency: Literal["measured", "none"] = "measured"
    assignment: Annotated[str, _one_of(ASSIGNMENTS)] = "random"
    availability: Share = 0.0
    jitter: Annotated[Number, Field(ge=0, le=MAX_JITTER)] = 0.0
    trace: str = ""


class BudgetSettings(_Section):
    """What a client may spend in a round, a limit of 0 being none; see `fedfmd.edge.Budget`.

    By default nobody is cut short, so that variants of unequal cost do the same work.
    """

    deadline_s: NonNegative = 0.0
    energy_j: NonNegative = 0.0
    up_bytes: Annotated[int, Field(ge=0)] = 0
    policy: Annotated[str, _one_of(POLICIES)] = "wait"
    kernels: Annotated[int, Field(ge=0)] = 0
    kernel_choice: Annotated[str, _one_of(KERNEL_CHOICES)] = "rotation"
    over_select: Annotated[Number, Field(ge=1)] = 1.0
    min_reports: Share = 0.0


class TransportSettings(_Section):
    """What travels: `upload` is the type that clients round their updates to, with error feedback."""

    upload: Annotated[str, _one_of(UPLOADS)] = "fp32"


class Settings(_Section):
    """All settings of one run."""

    NEUTRAL: ClassVar = frozenset(
        {"run-dir", "resume", "threads", "server.node-timeout-s", "server.round-timeout-s"}
    )
    """Settings that a run's results don't depend on."""

    ADDED: ClassVar = frozenset({"server.max-update-norm", "server.max-update-ratio"})
    """Settings that earlier runs don't have; by their defaults they change nothing, the digest included."""

    kind: Annotated[str, _one_of(KINDS)] = "federated"
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    partition: PartitionSettings = PartitionSettings()
    train: TrainSettings = TrainSettings()
    temperature: TemperatureSettings = TemperatureSettings()
    server: ServerSettings = ServerSettings()
    fleet: FleetSettings = FleetSettings()
    budget: BudgetSettings = BudgetSettings()
    transport: TransportSettings = TransportSettings()
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: str = "cpu"
    threads: Annotated[int, Field(ge=0)] = 0
    run_dir: str = ""
    resume: bool = False

    @property
    def length(self) -> int:
        """How many rounds, or epochs of centralised training, there are to do."""
        return self.server.rounds if self.kind == "federated" else self.train.epochs

    @property
    def unused(self) -> frozenset[str]:
        """The settings that a run of this kind doesn't heed."""
        if self.kind == "federated":
            return frozenset({"train.epochs"})
        return frozenset(key for key in self.flat() if key.startswith(FEDERATED) and key not in CHECKPOINTS)

    @property
    def clients_per_round(self) -> int:
        """How many clients a round is to have: ``server.clients-per-round``, or all."""
        return self.server.clients_per_round or self.partition.clients

    @model_validator(mode="after")
    def _check_combinations(self) -> Settings:
        if self.train.nesterov and not self.train.momentum:
            raise SettingsError("train.nesterov = True needs train.momentum > 0: set train.nesterov=false")
        if self.server.clients_per_round > self.partition.clients:
            raise SettingsError(
                f"server.clients-per-round = {self.server.clients_per_round} but partition.clients = "
                f"{self.partition.clients}: ask for at most that many, or 0 for all"
            )
        self.model.options()
        self._check_budget()
        return self

    def _check_budget(self) -> None:
        model, budget = self.model, self.budget
        limits = {
            "deadline-s": budget.deadline_s,
            "energy-j": budget.energy_j,
            "up-bytes": budget.up_bytes,
        }
        limit = next((key for key, value in limits.items() if value), None)
        if limit and "policy" not in budget.model_fields_set:
            raise SettingsError(
                f"budget.{limit} = {limits[limit]:g} but no budget.policy: the default, {budget.policy!r}, heeds no "
                f"limit; set budget.policy to one of {', '.join(POLICIES)}"
            )
        if budget.over_select > 1 and not self.server.clients_per_round:
            raise SettingsError(
                f"budget.over-select = {budget.over_select:g} asks more than server.clients-per-round, which is 0, "
                "all: ask for fewer clients, or set budget.over-select=1"
            )
        if not POLICIES[budget.policy].fewer_kernels:
            return
        if not is_dynamic(model.conv):
            raise SettingsError(
                f"budget.policy = {budget.policy!r} trains some kernels of each bank, and model.conv = {model.conv!r} "
                "has no banks: take a dynamic convolution, or budget.policy=partial"
            )
        if budget.kernels > model.kernels:
            raise SettingsError(
                f"budget.kernels = {budget.kernels} but model.kernels = {model.kernels}: "
                "train at most that many, or 0 for as many as fit"
            )
        if (
            budget.kernel_choice == "attention"
            and model.kernels > 1
            and not has_kernel_attention(model.conv, **model.options())
        ):
            without = f"model.conv = {model.conv!r} has none: "
            if "attentions" in options_of(model.conv):
                without = f"model.attentions = {','.join(model.attentions)!r} has none: add kernel, or "
            raise SettingsError(
                f"budget.kernel-choice = 'attention' needs kernel attention, and {without}"
                "set budget.kernel-choice=rotation"
            )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Settings:
        """Build settings from nested or dotted keys; what is not named keeps its default.

        Raises:
            SettingsError: unknown key, wrong type or impossible value, in one line.
        """
        flat = flatten(values)
        known = cls().flat()
        for key, value in flat.items():
            if key not in known:
                raise SettingsError(
                    f"unknown setting {key} = {value!r}; the nearest one is {nearest_of(key, known)}"
                )
        try:
            return cls.model_validate(_nest(flat))
        except ValidationError as error:
            raise SettingsError("; ".join(_explain(e) for e in error.errors())) from None

    def flat(self) -> dict[str, Scalar]:
        """Dotted keys and scalar values, in a fixed order: what Flower's run config can carry."""
        nested = self.model_dump(by_alias=True)
        return {
            key: ",".join(value) if isinstance(value, tuple) else value for key, value in _walk(nested, "")
        }

    def kept(self) -> dict[str, Scalar]:
        """Return what a run's files keep: all settings that it heeds, as they were before `in_folder`."""
        flat, unused = self.model_copy(update={"run_dir": "", "resume": False}).flat(), self.unused
        return {key: value for key, value in flat.items() if key not in unused}

    def in_folder(self, run_dir: Path) -> Settings:
        """Return the same run in this folder, going on where it was stopped."""
        return self.model_copy(update={"run_dir": str(run_dir), "resume": True})

    def digest(self) -> str:
        """Short hash of every setting that a run's results depend on."""
        defaults = type(self)().flat()
        kept = {
            key: value
            for key, value in self.kept().items()
            if key not in self.NEUTRAL and not (key in self.ADDED and value == defaults[key])
        }
        return hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:8]


def read_yaml(path: Path) -> Mapping[str, Any]:
    """Read a YAML file that holds keys and values.

    Raises:
        SettingsError: no such file, no YAML, or something else in it.
    """
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, Mapping):
        raise SettingsError(f"{path} must hold `key: value` pairs, not {content!r}")
    return content


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn nested mappings into dotted keys; a key that is given twice is an error."""
    flat: dict[str, Any] = {}
    for key, value in _walk(values, ""):
        if key in flat:
            raise SettingsError(f"setting {key} is given twice")
        flat[key] = value
    return flat


def _walk(values: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if not isinstance(value, Mapping):
            yield key, value
        elif key in PAIRS:
            yield key, ", ".join(f"{left}:{right}" for left, right in value.items())
        else:
            yield from _walk(value, f"{key}.")


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return nested


def _explain(error: Mapping[str, Any]) -> str:
    """One clause of pydantic's findings: key, value, what is allowed."""
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, SettingsError):
        return str(cause)
    message = str(cause) if cause else error["msg"][0].lower() + error["msg"][1:]
    key = ".".join(str(part) for part in error["loc"] if not isinstance(part, int))
    value = error["input"]
    shown = "nan" if isinstance(value, float) and math.isnan(value) else repr(value)
    return f"{key} = {shown}: {message}"
