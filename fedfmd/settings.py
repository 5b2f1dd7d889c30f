"""The settings of a run: one typed model for YAML files, ``flwr run`` and Python.

A setting is named by a dotted key (``partition.alpha``). Values are scalars, because Flower's run
config holds nothing else; 0 and "" stand for "not set" where a setting may be left out. The text below
a field is its meaning, which ``fedfmd settings`` shows.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Mapping
from inspect import Parameter
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
from fedfmd.conv.mixing import AUTO, EARLIER_NAMES, NATIVE
from fedfmd.data import AUGMENT_CHOICES, DATASETS, MEMORY_GB, PARTITIONS, STREAMING
from fedfmd.edge import ASSIGNMENTS, KERNEL_CHOICES, LINKS, POLICIES
from fedfmd.edge.devices import MAX_JITTER
from fedfmd.errors import SettingsError, nearest_of, not_one_of
from fedfmd.models import MODELS, TORCHVISION
from fedfmd.own_code import is_own
from fedfmd.pairs import join_pairs, read_value, split_pairs
from fedfmd.protocol.compression import UPLOADS
from fedfmd.runs import parse_stop
from fedfmd.strict_yaml import load_yaml
from fedfmd.training import LOSSES, OPTIMISERS

Scalar = bool | int | float | str

KINDS = ("federated", "centralised")

FEDERATED = (
    *("partition.", "server.", "fleet.", "budget.", "transport.", "privacy."),
    *("train.local-epochs", "train.proximal-mu"),
)
"""How the settings begin that are about clients and their server."""

HEEDED_BY_ALL = frozenset({"server.checkpoint-every", "server.keep-checkpoints", "server.stop-at"})
"""Those of them that centralised training heeds too."""

PAIRS = frozenset({"fleet.devices", "model.conv-options", "model.options"})
"""Settings whose text, `name:amount, …`, may also be given as a mapping."""


def _one_of(allowed: Iterable[str], earlier: Mapping[str, str] = MappingProxyType({})) -> BeforeValidator:
    """Accept only registered names, and `earlier` names for them; suggest the nearest one.

    The names are an enumeration in the model's JSON schema.
    """
    names = tuple(allowed)

    def check(value: object) -> object:
        if value in names:
            return value
        if isinstance(value, str) and value in earlier:
            return earlier[value]
        raise ValueError(not_one_of(value, names))

    return BeforeValidator(check, json_schema_input_type=Literal.__getitem__(names))


def _one_of_or_own(allowed: Iterable[str], form: str = "module:function") -> BeforeValidator:
    """Accept registered names, and a user's own code, whose names have this form; nothing is imported."""
    names = tuple(allowed)

    def check(value: object) -> object:
        if isinstance(value, str) and (value in names or is_own(value)):
            return value
        raise ValueError(not_one_of(value, names, form))

    return BeforeValidator(check, json_schema_input_type=Literal.__getitem__((*names, form)))


def _stop(value: object) -> str:
    """Accept what `parse_stop` reads; a bare number, which YAML makes of 0.5, gets its answer as well."""
    parse_stop(text := str(value))
    return text


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
        extra="forbid",
        frozen=True,
        strict=True,
        alias_generator=_kebab,
        populate_by_name=True,
        use_attribute_docstrings=True,
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
    """Which network is trained."""

    arch: Annotated[str, _one_of_or_own(MODELS)] = "resnet8"
    """Network. The depths 8 and 20 are for images of 32×32 pixels, the others are ImageNet's. module:function is one
    of your own, called with classes, image_size, conv, norm and model.options.
    """
    conv: Annotated[str, _one_of_or_own(CONVS, "module:Class")] = "fmdconv"
    """Convolution of the residual blocks; the first layer and the 1×1 shortcuts are static. module:Class is one of
    your own, made as PyTorch's Conv2d is.
    """
    kernels: Count = 4
    """Kernels per layer that a dynamic convolution mixes, K."""
    attentions: Attentions = ATTENTIONS
    """Attentions of fmdconv: one or several."""
    attention_init: Annotated[str, _one_of(ATTENTION_INITS)] = "neutral"
    """Start of the attentions: neutral treats all samples alike until training has a reason not to; kaiming
    is random, as published.
    """
    stem: Literal["cifar", "imagenet"] = "cifar"
    """First layers: cifar for small images (3×3), imagenet for large ones (7×7, stride 2, then pooling)."""
    norm: Literal["batch", "group"] = "group"
    """Normalisation. Batch statistics differ between clients whose images do; group has none."""
    width: Positive = 1.0
    """Factor on every number of channels."""
    reduction: Positive = 0.0625
    """Hidden channels of fmdconv's and odconv's attention, as a share of the layer's input channels."""
    mixing: Annotated[str, _one_of((AUTO, *MIXINGS, NATIVE), EARLIER_NAMES)] = "auto"
    """How each sample is convolved with its own mixture of kernels. All ways give the same numbers; auto
    chooses a fast one per layer, native among them once the command compile has made it.
    """
    conv_options: str = ""
    """Options that only some convolutions have, such as kernel-reduction and annealed of fmdconv: name:value, …"""
    arch_options: Annotated[str, Field(alias="options")] = ""
    """Options of a network of your own: name:value, …"""
    init: str = ""
    """Checkpoint whose weights the run starts from; one of a static network fits dynamic ones."""
    pretrained: str = ""
    """File of torchvision's weights that the run starts from."""

    def arguments(self) -> dict[str, Any]:
        """Return the options of the user's own network, by the names of its function's arguments."""
        return {name.replace("-", "_"): read_value(text) for name, text in split_pairs(self.arch_options)}

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
        for key, text in split_pairs(self.conv_options):
            if key not in free:
                known = f"those of {self.conv} are {', '.join(free)}" if free else f"{self.conv} has none"
                raise SettingsError(f"model.conv-options = {self.conv_options!r}: no option {key!r}; {known}")
            name, default = free[key]
            value = read_value(text)
            if isinstance(default, float) and type(value) is int:
                value = float(value)
            if default not in (None, Parameter.empty) and type(value) is not type(default):
                raise SettingsError(
                    f"model.conv-options = {self.conv_options!r}: {key} must be like its default, {default!r}"
                )
            yield name, value


class DataSettings(_Section):
    """Which images are used."""

    dataset: Annotated[str, _one_of_or_own(DATASETS)] = "digits"
    """Source of the images: digits come with scikit-learn; cifar10 and cifar100 are in data.dir, npz in
    data.train and data.test, imagefolder in either; module:function of your own returns the training and the test
    set, each as images and labels or as a dataset of torch's.
    """
    dir: str = ""
    """Folder of the data set: the files of CIFAR, or train/ and val/ (or test/) of imagefolder."""
    train: str = ""
    """Training images: an npz file of arrays images (N×H×W×3, uint8) and labels, or an image folder."""
    test: str = ""
    """Test images, like data.train."""
    download: bool = False
    """Download cifar10 or cifar100 into data.dir if it isn't there."""
    image_size: Annotated[int, Field(ge=0)] = 0
    """Height and width in pixels; 0: 16 for digits, 64 for imagefolder, else the images' own."""
    augment: Annotated[str, _one_of(AUGMENT_CHOICES)] = "auto"
    """How training images are varied at random: crop shifts by up to an eighth, resized-crop enlarges a random part,
    flip mirrors. auto suits the source: digits are shifted, all others mirrored too; images that are decoded on the way
    have resized crops.
    """
    validation: Annotated[NonNegative, AfterValidator(_share_or_number)] = 0.0
    """Training images that are held out to choose by: a share below 1, or their number; 0 is none."""
    classes: Annotated[int, Field(ge=0)] = 0
    """Classes that the labels of npz files, or of a source of your own, stand for; 0: as many as there are labels."""
    streaming: Annotated[str, _one_of(STREAMING)] = "auto"
    """Whether images of imagefolder, or of a dataset of torch's, are decoded on the way into training (always), or once
    into memory (never); auto: on the way where they would need more than data.memory-gb.
    """
    memory_gb: Positive = MEMORY_GB
    """Memory in GB, 10⁹ bytes, up to which data.streaming=auto decodes images into it."""
    workers: Annotated[int, Field(ge=0)] = 8
    """Processes, at most, that decode streamed images ahead of centralised training, on cores that it leaves free;
    0: its own process decodes between steps, as those of clients do.
    """


class PartitionSettings(_Section):
    """How the training images are split over the clients."""

    scheme: Annotated[str, _one_of_or_own(PARTITIONS)] = "dirichlet"
    """Split: iid, all alike; dirichlet, by unequal shares of each class; pathological, a few classes each;
    quantity, by unequal amounts; module:function of your own, called with labels, clients and rng.
    """
    alpha: Positive = 0.5
    """Evenness of dirichlet and quantity: the smaller, the more unequal."""
    clients: Count = 10
    """Clients that share the training images."""
    classes_per_client: Count = 2
    """Classes that each client has in the pathological split."""
    min_images: Count = 1
    """Images that every client has at least."""
    test_share: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Share of each client's images that it does not train on: whenever the server tests the model, so does each
    client of the round on these; 0 is none.
    """


class TrainSettings(_Section):
    """What learns, on a client or centralised, and from which loss."""

    lr: Positive = 0.05
    """Learning rate at the start."""
    batch_size: Count = 16
    """Images per step."""
    epochs: Count = 100
    """Epochs of centralised training."""
    local_epochs: Count = 6
    """Epochs of a client over its own images in a round."""
    momentum: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD; β₁ of adam and adamw."""
    nesterov: bool = True
    """Whether the momentum of SGD is Nesterov's."""
    weight_decay: NonNegative = 5e-4
    """Weight decay of SGD and the others; adamw's is apart from the gradient."""
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    """How the learning rate falls over the rounds or epochs: cosine to 0; step divides it by 10 after 30, 60
    and 90 %.
    """
    precision: Literal["float32", "bf16"] = "float32"
    """Numbers that forward and backward passes compute with; weights stay float32."""
    memory_format: Literal["contiguous", "channels-last"] = "contiguous"
    """How a batch of images to train on lies in memory. Pooling, and static convolutions in large batches, are often
    faster with channels-last; dynamic ones are slower.
    """
    cuda_graphs: bool = False
    """Whether a GPU replays the passes of a training step from a CUDA graph, in place of hundreds of launches. For
    networks whose passes do the same whatever the images are. Off, as it has been tried without a GPU only.
    """
    torch_compile: bool = False
    """Whether whole batches are trained on by code that torch.compile makes of the network: faster for static networks
    and FMDConv, after a minute or two of compiling in each process, and other in the last digits. Needs a C++ compiler,
    such as g++; on a GPU Triton.
    """
    proximal_mu: NonNegative = 0.0
    """Weight μ of FedProx's term, which holds a client near the global model; 0 is none."""
    optimiser: Annotated[str, _one_of_or_own(OPTIMISERS, "module:Class")] = "sgd"
    """What takes the steps: sgd, adam, adamw, or module:Class, an optimiser of PyTorch's or your own, which gets
    train.lr and what it has of weight_decay, momentum and nesterov. A client's begins anew in each round.
    """
    loss: Annotated[str, _one_of_or_own(LOSSES)] = "cross-entropy"
    """What training minimises: cross-entropy, or module:function of your own, from logits and labels to the mean
    loss. Tests always tell the cross entropy.
    """
    label_smoothing: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Share of each label that the cross entropy spreads over all classes; 0 is none."""
    clip_norm: NonNegative = 0.0
    """L2 norm beyond which the gradient of a step is scaled down to it; 0 is no limit."""
    lr_warmup: Annotated[int, Field(ge=0)] = 0
    """First rounds, or epochs, over which the learning rate rises to train.lr in equal steps, before it falls by
    train.schedule; 0 is none.
    """
    checkpoint_s: NonNegative = 0.0
    """Seconds from one checkpoint within an epoch of centralised training to the next; 0: only ends of epochs have
    any.
    """

    def steadier(self) -> str:
        """Say what keeps training from diverging: smaller steps, a limit to them, or a loss that is a number."""
        own_loss = f", or see what train.loss = {self.loss} returns" if is_own(self.loss) else ""
        return f"train.lr below {self.lr:g}" + ("" if self.clip_norm else " or train.clip-norm=1") + own_loss


class TemperatureSettings(_Section):
    """Temperature of the kernel attention, over the server's rounds; over epochs in centralised training."""

    initial: Positive = 30.0
    """Temperature in the first round: the higher, the more alike the kernels' weights."""
    final: Positive = 1.0
    """Temperature after temperature.rounds."""
    rounds: Annotated[int, Field(ge=0)] = 10
    """Rounds, or epochs, from the first temperature to the last."""
    shape: Literal["linear", "cosine", "geometric", "constant"] = "linear"
    """How it gets there: by equal steps (linear), half a cosine, equal factors (geometric), or not at all
    (constant).
    """


class ServerSettings(_Section):
    """The server's loop and algorithm.

    Centralised training heeds the settings of checkpoints alone, an epoch counting as a round.
    """

    rounds: Count = 20
    """Rounds of federated training."""
    clients_per_round: Annotated[int, Field(ge=0)] = 0
    """Clients that are drawn for a round; 0 is all."""
    strategy: str = "fedavg"
    """Algorithm by which clients train and their updates combine, or module:Class, a Flower strategy of your
    own.
    """
    evaluate_every: Count = 1
    """Rounds from one test of the model to the next; the last round is always tested."""
    checkpoint_every: Count = 1
    """Rounds, or epochs, from one checkpoint to the next; a run goes on from the newest one."""
    keep_checkpoints: Count = 2
    """Newest checkpoints that are kept."""
    max_failed_share: Share = 0.5
    """Share of a round's clients that may fail before the run ends."""
    round_timeout_s: Positive = 3600.0
    """Seconds that the server waits for a round's replies; whoever is late has failed."""
    node_timeout_s: Positive = 120.0
    """Seconds to wait for the nodes at the start."""
    lr: NonNegative = 0.0
    """Learning rate of the server's optimiser (fedavgm, fedadagrad, fedadam, fedyogi); 0 is the strategy's
    own.
    """
    momentum: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    """Momentum of the server's optimiser, β₁."""
    beta_2: Annotated[Number, Field(ge=0, lt=1)] = 0.99
    """Decay of the squared updates in fedadam and fedyogi, β₂."""
    tau: Positive = 1e-3
    """Adaptivity of fedadagrad, fedadam and fedyogi: what is added to the root of the squares."""
    trim: Annotated[Number, Field(ge=0, lt=0.5)] = 0.2
    """Share of values that fedtrimmedavg cuts off at either end."""
    byzantine: Annotated[int, Field(ge=0)] = 1
    """Bad clients that krum and multikrum stand."""
    buffer: Count = 5
    """Updates that fedbuff waits for before a step."""
    staleness: NonNegative = 0.5
    """Exponent s by which fedbuff discounts old updates: (1 + rounds behind)^-s."""
    max_update_norm: NonNegative = 0.0
    """L2 norm beyond which a client's update is scaled down to it; 0 is no limit. Every client then has a message of
    its own.
    """
    max_update_ratio: NonNegative = 0.0
    """The same as a multiple of the median norm of a round's updates; 0 is no limit."""
    stop_at: Annotated[str, BeforeValidator(_stop)] = ""
    """What ends the run early, the first that is met: accuracy=0.95 (on validation images, on test images without
    any), seconds=600 (virtual ones; of training if centralised), mb=100 (up and down), joules=5000; one or several.
    """
    csv_rows: Annotated[int, Field(ge=0)] = 100_000
    """Rows of clients (rounds × clients of a round) up to which a run writes them to clients.csv; more go to
    clients.parquet, a folder with a file for each round.
    """


class FleetSettings(_Section):
    """Devices of the clients and their network."""

    devices: str = "pi-4:40%, pi-5:30%, jetson-nano:30%"
    """Devices as name:count or name:share%, comma-separated. Those that are known stand in
    fedfmd/edge/devices.yaml.
    """
    link: Annotated[str, _one_of(LINKS)] = "wifi"
    """Network that the clients' bandwidths are drawn from."""
    devices_file: str = ""
    """YAML file that adds devices, such as fedfmd calibrate writes."""
    efficiency: Literal["measured", "none"] = "measured"
    """Rate of computing: measured is what a device reaches with the convolution and its kernels; none is that
    of static ones for all.
    """
    assignment: Annotated[str, _one_of(ASSIGNMENTS)] = "random"
    """Who has a fast device: anybody (random), clients with the most images (size), or with the fewest
    (inverse).
    """
    availability: Share = 0.0
    """Probability that a client is there in a round; 0: its device's own."""
    jitter: Annotated[Number, Field(ge=0, le=MAX_JITTER)] = 0.0
    """Spread of a device's speed from round to round, the standard deviation of its logarithm; 0: the
    device's own.
    """
    trace: str = ""
    """CSV file client,start_s,end_s of the windows of virtual time in which clients are there."""


class BudgetSettings(_Section):
    """What a client may spend in a round; see `fedfmd.edge.Budget`.

    By default nobody is cut short, so that variants of unequal cost do the same work.
    """

    deadline_s: NonNegative = 0.0
    """Virtual seconds for a round, transfers included; 0 is no limit."""
    energy_j: NonNegative = 0.0
    """Joules of a client in a round; 0 is no limit."""
    up_bytes: Annotated[int, Field(ge=0)] = 0
    """Bytes of a client's update; 0 is no limit."""
    policy: Annotated[str, _one_of_or_own(POLICIES)] = "wait"
    """What becomes of clients that can't do all the work in time: wait for them, drop their update, let them
    do a part (partial), train fewer kernels (kernels), or both; module:function of your own chooses each client's
    plan.
    """
    kernels: Annotated[int, Field(ge=0)] = 0
    """Kernels of each bank that every client trains, with kernels and partial+kernels; 0: as many as fit."""
    kernel_choice: Annotated[str, _one_of(KERNEL_CHOICES)] = "rotation"
    """Which kernels those are: in rotation, or those that the client's images use most (attention)."""
    over_select: Annotated[Number, Field(ge=1)] = 1.0
    """Times as many clients are asked as are wanted; the first updates count."""
    min_reports: Share = 0.0
    """Share of the wanted clients below which a round is discarded."""


class TransportSettings(_Section):
    """What travels."""

    upload: Annotated[str, _one_of(UPLOADS)] = "fp32"
    """Type that clients round their updates to, with error feedback."""


class PrivacySettings(_Section):
    """Differential privacy of the clients; see docs/privacy.md."""

    clip_norm: NonNegative = 0.0
    """L2 norm to which every client's update is scaled down before all count alike in the mean; 0 is no differential
    privacy.
    """
    noise_multiplier: NonNegative = 0.0
    """Standard deviation of the Gaussian noise, as a multiple of privacy.clip-norm."""
    mode: Literal["central", "local"] = "central"
    """Who clips and adds noise: central is the server, to the clients' sum; local is each client, before it sends."""
    delta: Annotated[Number, Field(gt=0, lt=1)] = 1e-5
    """Probability δ at which ε is told; it should be well below 1 / clients."""


class TrackingSettings(_Section):
    """Who is told of a run while it goes."""

    loggers: Annotated[tuple[str, ...], BeforeValidator(_split_list), Field(strict=False)] = ()
    """Callbacks: tensorboard, wandb, mlflow, or module:Class of your own; one or several."""
    project: Annotated[str, Field(min_length=1)] = "fedfmd"
    """Name of W&B's project and of MLflow's experiment."""


class Settings(_Section):
    """All settings of one run."""

    NEUTRAL: ClassVar = frozenset(
        {
            *("run-dir", "resume", "threads", "server.node-timeout-s", "server.round-timeout-s"),
            *(
                "tracking.loggers",
                "tracking.project",
                "data.workers",
                "train.checkpoint-s",
                "server.csv-rows",
            ),
        }
    )
    """Settings that a run's results don't depend on."""

    OPTIONAL: ClassVar = frozenset(
        {
            *("model.options", "model.init", "model.pretrained"),
            *("server.max-update-norm", "server.max-update-ratio", "server.stop-at", "partition.test-share"),
            "server.csv-rows",
            *("train.optimiser", "train.loss", "train.label-smoothing", "train.clip-norm", "train.lr-warmup"),
            *("train.memory-format", "train.cuda-graphs", "train.torch-compile"),
            *("privacy.clip-norm", "privacy.noise-multiplier", "privacy.mode", "privacy.delta"),
            *("data.streaming", "data.memory-gb", "data.workers", "train.checkpoint-s"),
        }
    )
    """Settings that are kept only where they are set, so that runs from before there were any keep their names."""

    OWN: ClassVar = (
        *("model.arch", "model.conv", "data.dataset", "partition.scheme", "train.optimiser", "train.loss"),
        *("server.strategy", "budget.policy"),
    )
    """Settings that may name a user's own code, on which results depend."""

    kind: Annotated[str, _one_of(KINDS)] = "federated"
    """Federated training, or centralised training of the same network on all images."""
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    partition: PartitionSettings = PartitionSettings()
    train: TrainSettings = TrainSettings()
    temperature: TemperatureSettings = TemperatureSettings()
    server: ServerSettings = ServerSettings()
    fleet: FleetSettings = FleetSettings()
    budget: BudgetSettings = BudgetSettings()
    transport: TransportSettings = TransportSettings()
    privacy: PrivacySettings = PrivacySettings()
    tracking: TrackingSettings = TrackingSettings()
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of all randomness: equal settings give equal results."""
    device: str = "cpu"
    """What to compute on: cpu, cuda, cuda:N, or auto, a GPU where there is one."""
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """PyTorch's threads per node; 0: one, but as many as there are cores for centralised training on its own."""
    run_dir: str = ""
    """Folder of the run; by default a new one below runs/."""
    resume: bool = False
    """Go on with the run in run-dir. fedfmd run always does."""

    @property
    def length(self) -> int:
        """How many rounds, or epochs of centralised training, there are to do."""
        return self.server.rounds if self.kind == "federated" else self.train.epochs

    @property
    def unused(self) -> frozenset[str]:
        """The settings that a run of this kind doesn't heed."""
        if self.kind == "federated":
            return frozenset({"train.epochs", "train.checkpoint-s", "data.workers"})
        return frozenset(key for key in self.flat() if key.startswith(FEDERATED) and key not in HEEDED_BY_ALL)

    @property
    def own_code(self) -> dict[str, str]:
        """The user's own code that the run's results depend on, as ``module:name``, by the settings that name it."""
        kept = self.kept()
        return {key: str(kept[key]) for key in self.OWN if is_own(str(kept.get(key, "")))}

    @property
    def stop_limits(self) -> dict[str, float]:
        """What ends the run early, by name."""
        return parse_stop(self.server.stop_at)

    @property
    def clients_per_round(self) -> int:
        """How many clients a round is to have: ``server.clients-per-round``, or all."""
        return self.server.clients_per_round or self.partition.clients

    @property
    def clients_in_columns(self) -> bool:
        """Whether there will be more rows of clients than ``server.csv-rows``."""
        asked = self.server.rounds * self.clients_per_round * self.budget.over_select
        return asked > self.server.csv_rows

    @model_validator(mode="after")
    def _check_combinations(self) -> Settings:
        self._check_training()
        if self.server.clients_per_round > self.partition.clients:
            raise SettingsError(
                f"server.clients-per-round = {self.server.clients_per_round} but partition.clients = "
                f"{self.partition.clients}: ask for at most that many, or 0 for all"
            )
        if not is_own(self.model.conv):  # what isn't fedfmd's is looked at when it is used
            self.model.options()
        self._check_network()
        self._check_budget()
        self._check_privacy()
        return self

    def _check_training(self) -> None:
        train = self.train
        if train.optimiser == "sgd" and train.nesterov and not train.momentum:
            raise SettingsError("train.nesterov = True needs train.momentum > 0: set train.nesterov=false")
        if train.label_smoothing and is_own(train.loss):
            raise SettingsError(
                f"train.label-smoothing = {train.label_smoothing:g} has no effect with train.loss = {train.loss!r}: "
                "leave it out, or smooth the labels there"
            )
        if train.lr_warmup >= self.length:
            what = "server.rounds" if self.kind == "federated" else "train.epochs"
            raise SettingsError(
                f"train.lr-warmup = {train.lr_warmup} but {what} = {self.length}: the rate must reach train.lr before "
                "the last one"
            )
        if train.cuda_graphs and self.device == "cpu":
            raise SettingsError(
                "train.cuda-graphs = true replays steps on a GPU, and device = 'cpu': set device=cuda or auto, or "
                "leave it out"
            )
        if train.cuda_graphs and train.torch_compile:
            raise SettingsError(
                "train.torch-compile = true and train.cuda-graphs = true: a step is compiled or replayed, leave one out"
            )
        if self.kind == "centralised" and (odd := self.stop_limits.keys() & {"mb", "joules"}):
            raise SettingsError(
                f"server.stop-at = {self.server.stop_at!r}: centralised training knows no {min(odd)}: use accuracy "
                "or seconds"
            )

    def _check_network(self) -> None:
        model, default = self.model, ModelSettings()
        if is_own(model.arch):
            for key, value, usual in (
                ("stem", model.stem, default.stem),
                ("width", model.width, default.width),
            ):
                if value != usual:
                    raise SettingsError(
                        f"model.{key} = {value!r} has no effect with model.arch = {model.arch!r}: leave it out, or "
                        "hand the function a value by model.options"
                    )
        elif model.arch_options:
            raise SettingsError(
                f"model.options = {model.arch_options!r}: model.arch = {model.arch!r} has none; they are for a "
                "function of your own, module:function"
            )
        if model.init and model.pretrained:
            raise SettingsError(
                f"model.init = {model.init!r} and model.pretrained = {model.pretrained!r}: a run starts from "
                "one of them"
            )
        if not model.pretrained:
            return
        needed = {"stem": "imagenet", "norm": "batch", "width": 1.0}
        if model.arch not in TORCHVISION:
            raise SettingsError(
                f"model.pretrained = {model.pretrained!r} needs a network of torchvision's, and model.arch = "
                f"{model.arch!r}: use one of {', '.join(TORCHVISION)}"
            )
        for name, wanted in needed.items():
            if getattr(model, name) != wanted:
                raise SettingsError(
                    f"model.pretrained = {model.pretrained!r} needs torchvision's network, and model.{name} = "
                    f"{getattr(model, name)!r}: set model.{name}={wanted}"
                )

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
        if is_own(budget.policy):
            return
        if not POLICIES[budget.policy].fewer_kernels:
            able = ", ".join(name for name, rules in POLICIES.items() if rules.fewer_kernels)
            for name in ("kernels", "kernel_choice"):
                if (value := getattr(budget, name)) != getattr(BudgetSettings(), name):
                    raise SettingsError(
                        f"budget.{_kebab(name)} = {value!r} has no effect with budget.policy = {budget.policy!r}: it "
                        f"belongs to {able}"
                    )
            return
        if is_own(model.conv):
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

    def _check_privacy(self) -> None:
        privacy, policy = self.privacy, self.budget.policy
        if not privacy.clip_norm:
            if privacy.noise_multiplier:
                raise SettingsError(
                    f"privacy.noise-multiplier = {privacy.noise_multiplier:g} is a multiple of privacy.clip-norm, "
                    "which is 0: set it to a usual norm of the updates, such as 1"
                )
            if privacy.mode != PrivacySettings().mode:
                raise SettingsError(
                    f"privacy.mode = {privacy.mode!r} has no effect without privacy.clip-norm, which is 0: set it to a "
                    "usual norm of the updates, such as 1"
                )
            return
        name = f"privacy.clip-norm = {privacy.clip_norm:g}"
        if is_own(policy) or POLICIES[policy].fewer_kernels:
            raise SettingsError(
                f"{name} and budget.policy = {policy!r}: which kernels a client trains would tell of it; set "
                "budget.policy=wait, drop or partial"
            )
        if self.transport.upload != "fp32":
            raise SettingsError(
                f"{name} and transport.upload = {self.transport.upload!r}: what rounding leaves over comes with later "
                "updates, beyond their norm; set transport.upload=fp32"
            )
        for key, limit in (("norm", self.server.max_update_norm), ("ratio", self.server.max_update_ratio)):
            if limit:
                raise SettingsError(
                    f"{name} and server.max-update-{key} = {limit:g} both limit updates: set server.max-update-{key}=0"
                )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str = "") -> Settings:
        """Build settings from nested or dotted keys; what is not named keeps its default.

        Raises:
            SettingsError: unknown key, wrong type or impossible value, in one line; it names the `source`, if given.
        """
        if source:
            try:
                return cls.from_mapping(values)
            except SettingsError as error:
                raise SettingsError(f"{source}: {error}") from None
        flat = flatten(values)
        known = cls().flat()
        for key, value in flat.items():
            if group := [name for name in known if name.startswith(f"{key}.")]:
                raise SettingsError(f"{key} = {value!r}: {key} is a group of settings: {', '.join(group)}")
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
        usual = Settings().flat()
        return {
            key: value
            for key, value in flat.items()
            if key not in unused and not (key in self.OPTIONAL and value == usual[key])
        }

    def in_folder(self, run_dir: Path) -> Settings:
        """Return the same run in this folder, going on where it was stopped."""
        return self.model_copy(update={"run_dir": str(run_dir), "resume": True})

    def digest(self) -> str:
        """Short hash of every setting that a run's results depend on."""
        kept = {key: value for key, value in self.kept().items() if key not in self.NEUTRAL}
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


def read_settings(path: Path) -> Settings:
    """Read the settings.yaml of a run's folder.

    Raises:
        SettingsError: as in `read_yaml`, or they are no settings; it names the file.
    """
    return Settings.from_mapping(read_yaml(path), str(path))


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
            yield key, join_pairs(value)
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
