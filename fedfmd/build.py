"""From settings to the things that a run works with: data, partition, model, fleet, costs."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from fedfmd.cache import cache_dir
from fedfmd.conv import TemperatureSchedule, dynamic_layers, is_dynamic, make_conv
from fedfmd.cost import Cost, count
from fedfmd.data import (
    Dataset,
    ImageSet,
    Partition,
    StreamedImages,
    Streaming,
    cached_partition,
    hold_out,
    load_dataset,
    own_test_size,
)
from fedfmd.edge import (
    LINKS,
    Budget,
    Device,
    Fleet,
    Trace,
    Workload,
    load_devices,
    load_trace,
    make_fleet,
    plan_work,
)
from fedfmd.errors import SettingsError, need, one_line
from fedfmd.models import NORMS, make_model
from fedfmd.own_code import call, files_of, find, is_own
from fedfmd.protocol.compression import upload_bytes
from fedfmd.protocol.state import (
    Arrays,
    bank_of,
    false_kernels,
    fixed_names,
    parameter_names,
    payload_bytes,
    shared_arrays,
)
from fedfmd.seeds import derive_seed
from fedfmd.settings import DataSettings, Settings
from fedfmd.start import load_start
from fedfmd.training import (
    LOSSES,
    MEMORY_FORMATS,
    OPTIMISERS,
    Compute,
    LocalSGD,
    Loss,
    compute_gradients,
    scheduled_rate,
)
from fedfmd.training.compiled import Compiled
from fedfmd.training.graphs import Graphs, capture_on_gpu

GPU_SHARE = 0.25
"""Share of a GPU's free memory that images may take."""


@dataclass(frozen=True)
class Federation:
    """Everything that is fixed during a run, on the server's side; `sizes` counts what each client has to train on.

    `payload_bytes` are those of the whole model, `upload_bytes` those that a client sends which trained 1, 2, …
    kernels of each bank. `start` tells of the weights that the model starts from, "" if they are drawn.
    `optimiser_states` counts the numbers that a client's optimiser keeps for each parameter.
    """

    settings: Settings
    dataset: Dataset
    partition: Partition
    sizes: tuple[int, ...]
    fleet: Fleet
    model: nn.Module
    cost: Cost
    budget: Budget
    temperature: TemperatureSchedule
    device: torch.device
    payload_bytes: int
    upload_bytes: tuple[int, ...]
    optimiser_states: int = 1
    start: str = ""

    def workload(self, client: int) -> Workload:
        """Full work of a round for a client."""
        train = self.settings.train
        return Workload(
            images=self.sizes[client],
            batch_size=train.batch_size,
            epochs=train.local_epochs,
            cost=self.cost,
            payload_bytes=self.payload_bytes,
            upload_bytes=self.upload_bytes,
            states=self.optimiser_states,
        )

    @cached_property
    def mean_latency_s(self) -> float:
        """Modelled seconds of inference for one image, mean over the fleet's clients."""
        return fmean(self.cost.flops / (c.device.infer_gflops * 1e9) for c in self.fleet.clients)


def build_federation(settings: Settings) -> Federation:
    """Assemble a run before any work is done.

    Raises:
        SettingsError: anything that cannot be built, in one line.
    """
    device = torch_device(settings)
    dataset = build_dataset(settings)
    partition = build_partition(settings, dataset)
    share = settings.partition.test_share
    sizes = tuple(images - own_test_size(images, share) for images in partition.sizes.tolist())
    fleet = build_fleet(settings, sizes)
    model = build_model(settings, dataset.classes, dataset.image_size)
    start = load_start(model, settings, dataset.classes)
    model = model.to(device)
    cost = count(model, dataset.image_size)
    arrays = shared_arrays(model)
    _check_privacy(settings, model)
    states = check_training(settings, model, dataset.classes)
    federation = Federation(
        settings=settings,
        dataset=dataset,
        partition=partition,
        sizes=sizes,
        fleet=fleet,
        model=model,
        cost=cost,
        budget=build_budget(settings),
        temperature=build_temperature(settings),
        device=device,
        payload_bytes=payload_bytes(arrays),
        upload_bytes=_upload_bytes(arrays, parameter_names(model), settings.transport.upload, cost.kernels),
        optimiser_states=states,
        start=start,
    )
    _check_policy(federation)
    check_last_batches(settings, model, _batches(federation), dataset)
    return federation


def _batches(federation: Federation) -> list[tuple[int, int]]:
    """Return each client's images and batch size, which its device's memory may limit; 0: it can't train."""
    kernels = federation.cost.kernels
    return [
        (work.images, work.largest_batch(client.device.memory_gb * 1e9, kernels))
        for client in federation.fleet.clients
        for work in [federation.workload(client.id)]
    ]


def _check_privacy(settings: Settings, model: nn.Module) -> None:
    privacy = settings.privacy
    if not privacy.clip_norm:
        return
    told = shared_arrays(model).keys() - parameter_names(model) - fixed_names(model)
    if told:
        raise SettingsError(
            f"privacy.clip-norm = {privacy.clip_norm:g} and a model with statistics of its images ({min(told)}), which "
            "are not clipped: set model.norm=group"
        )
    if privacy.noise_multiplier:
        need(f"privacy.noise-multiplier = {privacy.noise_multiplier:g}", "opacus")


def build_dataset(settings: Settings) -> Dataset:
    """Load the data set that the settings name; all who need it in this process share it.

    Its validation images, if any, are drawn by the run's seed from its training set. Where edge devices train
    on images of their own, that is the server's training set, which no device trains on: the validation images
    are then unseen as long as the server's files hold no device's images.
    """
    data = settings.data
    with _bad_input():
        if not data.validation:
            return _load(data)
        return _with_validation(data, settings.seed)


@lru_cache(maxsize=1)
def _with_validation(data: DataSettings, seed: int) -> Dataset:
    whole = _load(data.model_copy(update={"validation": 0.0}))
    return hold_out(whole, data.validation, derive_seed(seed, "validation"))


@lru_cache(maxsize=1)
def _load(data: DataSettings) -> Dataset:
    return load_dataset(
        data.dataset,
        dir=_path(data.dir),
        train=_path(data.train),
        test=_path(data.test),
        download=data.download,
        image_size=data.image_size or None,
        augment=data.augment,
        classes=data.classes or None,
        streaming=data.streaming,
        memory_gb=data.memory_gb,
    )


def build_streaming(settings: Settings) -> Streaming:
    """Return which images are decoded on the way."""
    return Streaming(settings.data.streaming, settings.data.memory_gb)


def build_partition(settings: Settings, dataset: Dataset) -> Partition:
    """Split the training images; the split is computed once and cached for all processes."""
    partition = settings.partition
    held = len(dataset.validation or ())
    needed = partition.clients * partition.min_images
    if len(dataset.train) < needed <= len(dataset.train) + held:
        raise SettingsError(
            f"data.validation = {settings.data.validation:g} leaves {len(dataset.train):,} training images, and "
            f"partition.clients = {partition.clients} with partition.min-images = {partition.min_images} need "
            f"{needed:,}: hold out at most {len(dataset.train) + held - needed:,}"
        )
    with _bad_input():
        return cached_partition(
            dataset,
            partition.scheme,
            partition.clients,
            alpha=partition.alpha,
            classes_per_client=partition.classes_per_client,
            min_images=partition.min_images,
            seed=settings.seed,
            cache_dir=cache_dir(),
        )


def build_fleet(settings: Settings, sizes: Sequence[int]) -> Fleet:
    """Assign devices and links to the clients; `sizes` counts each client's images."""
    fleet, clients = settings.fleet, settings.partition.clients
    with _bad_input():
        trace = _path(fleet.trace)
        return make_fleet(
            fleet.devices,
            clients,
            LINKS[fleet.link],
            settings.seed,
            known_devices(settings),
            assignment=fleet.assignment,
            sizes=sizes,
            trace=load_trace(trace, clients) if trace else Trace(),
        )


def known_devices(settings: Settings) -> dict[str, Device]:
    """Return the devices that a client may have, by name, as they are for this run's model."""
    devices = load_devices(_path(settings.fleet.devices_file))
    return {name: device_in_run(settings, device) for name, device in devices.items()}


def device_in_run(settings: Settings, device: Device) -> Device:
    """Return the device as it is for this run's model, with what the settings say of all devices."""
    fleet, model = settings.fleet, settings.model
    if fleet.efficiency == "none":
        device = replace(device, efficiency={})
    set_for_all = {"availability": fleet.availability, "jitter": fleet.jitter}
    changes: dict[str, Any] = {name: value for name, value in set_for_all.items() if value}
    return replace(device.running(model.arch, model.conv, model.kernels), **changes)


def build_budget(settings: Settings) -> Budget:
    """Return what a client may spend in a round."""
    budget, choose = settings.budget, None
    if is_own(budget.policy):
        find("budget.policy", budget.policy)
        choose = partial(call, "budget.policy", budget.policy, {})
    return Budget(
        deadline_s=budget.deadline_s or None,
        energy_j=budget.energy_j or None,
        up_bytes=budget.up_bytes or None,
        policy=budget.policy,
        kernels=budget.kernels,
        kernel_choice=budget.kernel_choice,
        over_select=budget.over_select,
        min_reports=budget.min_reports,
        choose=choose,
    )


def _check_policy(federation: Federation) -> None:
    """See that a policy of the user's own has a plan for every client, and kernels to choose from where it needs them.

    Raises:
        SettingsError: it hasn't; what of this fedfmd's own parts could show, the settings checked.
    """
    settings, budget = federation.settings, federation.budget
    layers = dynamic_layers(federation.model).values()
    if budget.rules.fewer_kernels and not layers:
        raise SettingsError(
            f"budget.policy = {budget.policy!r} trains some kernels of each bank, and the network has no banks: "
            "take a dynamic convolution, or budget.policy=partial"
        )
    chooses = budget.rules.fewer_kernels or budget.choose
    unweighed = any(not layer.has_kernel_attention for layer in layers) and settings.model.kernels > 1
    if chooses and budget.kernel_choice == "attention" and unweighed:
        raise SettingsError(
            f"budget.kernel-choice = 'attention' needs kernel attention, and model.conv = {settings.model.conv!r} "
            "has none: set budget.kernel-choice=rotation"
        )
    if budget.choose:
        with _bad_input():
            for client in federation.fleet.clients:
                plan_work(client, federation.workload(client.id), budget)


def build_model(settings: Settings, classes: int, image_size: int = 0) -> nn.Module:
    """Make the model; its initial weights depend on the seed alone.

    `image_size` is for a user's own network or convolution; 0: that of the run's data set.
    """
    model = settings.model

    def size() -> int:
        return image_size or settings.data.image_size or build_dataset(settings).image_size

    with _bad_input(RuntimeError), torch.random.fork_rng(devices=[]):  # PyTorch's, for lack of memory
        torch.manual_seed(derive_seed(settings.seed, "model"))
        if is_own(model.arch):
            network = _own_network(settings, classes, size())
        else:
            network = make_model(
                model.arch,
                model.conv,
                classes,
                stem=model.stem,
                width=model.width,
                temperature=settings.temperature.initial,
                **model.options(),
            )
        key, name = ("model.arch", model.arch) if is_own(model.arch) else ("model.conv", model.conv)
        if is_own(name):
            _check_state(f"{key} = {name!r}", network)
            _check_logits(f"{key} = {name!r}", network, classes, size())
    return network


def _own_network(settings: Settings, classes: int, image_size: int) -> nn.Module:
    """Call the user's function."""
    model = settings.model
    conv = partial(make_conv, model.conv, temperature=settings.temperature.initial, **model.options())
    given = {"classes": classes, "image_size": image_size, "conv": conv, "norm": NORMS[model.norm]}
    hint = "; model.options sets the last ones" if model.arguments() else ""
    network = call("model.arch", model.arch, given | model.arguments(), hint=hint)
    if not isinstance(network, nn.Module):
        raise SettingsError(
            f"model.arch = {model.arch!r} must return an nn.Module, and returned a {type(network).__name__}"
        )
    return network


def _check_state(name: str, network: nn.Module) -> None:
    """See that the network, which `name` has a part in, can be trained, and its state sent."""
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise SettingsError(f"{name} has no parameters to train")
    for key, value in network.state_dict().items():
        if is_lazy(value):
            raise SettingsError(f"{name} has {key}, whose shape is still open: tell its layer all sizes")
        if not isinstance(value, torch.Tensor) or value.is_complex():
            kind = "complex" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
            raise SettingsError(
                f"{name} has {key} in its state, which is {kind}: only real tensors can be sent"
            )
    if false := false_kernels(network):
        raise SettingsError(
            f"{name} has {false[0]} in its state, which reads as a kernel of a dynamic convolution: no other part may "
            "be called bank or bias_bank"
        )


def _check_logits(name: str, network: nn.Module, classes: int, image_size: int) -> None:
    """See that the network, which `name` has a part in, maps images to logits, in training too."""
    _check_batch(name, network.eval(), 1, classes, image_size)
    _check_batch(name, network.train(), 2, classes, image_size)


def _check_batch(
    name: str, network: nn.Module, images: int, classes: int, image_size: int, hint: str = ""
) -> None:
    """See that the network, in the mode it is in, maps so many images to logits; it stays as it is."""
    mode = "training" if network.training else "evaluation"
    try:
        tried = copy.deepcopy(network)  # training changes the statistics of normalisation
        with torch.no_grad():
            device = next(network.parameters()).device
            logits = tried(torch.zeros(images, 3, image_size, image_size, device=device))
    except Exception as error:  # whatever it is, it is the user's to mend
        raise SettingsError(
            f"{name} fails in {mode} on a batch of {images}×3×{image_size}×{image_size}: {one_line(error)}{hint}"
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.shape != (images, classes):
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
        raise SettingsError(
            f"{name} must map images B×3×{image_size}×{image_size} to logits B×{classes}; in {mode} a batch "
            f"of {images} gave {got}{hint}"
        )


def check_last_batches(
    settings: Settings, model: nn.Module, batches: Sequence[tuple[int, int]], dataset: Dataset
) -> None:
    """See that the model can train on a single image, if a pass over the images leaves that for its last batch.

    BatchNorm can't where a model's maps are 1×1.

    Args:
        settings: the run's.
        model: what is to be trained.
        batches: images and batch size of each client, or of an epoch.
        dataset: tells classes and size of the images.

    Raises:
        SettingsError: it can't.
    """
    alone = [(images, batch) for images, batch in batches if batch and (images - 1) % batch == 0]
    if alone:
        whose = f"{len(alone)} of {len(batches)} clients" if settings.kind == "federated" else "each epoch"
        wanted = settings.train.batch_size
        cut = [batch for images, batch in alone if batch < min(images, wanted)]
        limited = f", cut to {min(cut)} by the memory of a device," if cut else ""
        _check_batch(
            f"train.batch-size = {wanted}{limited} leaves {whose} a last batch of one image: the network",
            model.train(),
            1,
            dataset.classes,
            dataset.image_size,
            hint="; take another batch size, or model.norm=group",
        )


def own_sources(settings: Settings) -> tuple[Path, ...]:
    """Return the files of the user's own code that the run's results depend on.

    Raises:
        SettingsError: the settings name some that can't be imported.
    """
    files = [file for key, name in settings.own_code.items() for file in files_of(key, name)]
    return tuple(dict.fromkeys(files))


def describe_network(settings: Settings, cost: Cost, dataset: Dataset) -> str:
    """Network, its size, data set and augmentation in a line for the log."""
    model = settings.model
    kernels = f" (K={model.kernels})" if is_dynamic(model.conv) else ""
    macs = f"{cost.macs / 1e6:.1f} M" if cost.macs >= 1e6 else f"{cost.macs / 1e3:.1f} k"
    streamed = ", decoded on the way" if isinstance(dataset.train, StreamedImages) else ""
    return (
        f"{model.arch} with {model.conv}{kernels}, {cost.params:,} parameters, {macs} MACs per image, "
        f"on {dataset.name} at {dataset.image_size}×{dataset.image_size}{streamed}, augmentation {dataset.augment}"
    )


def build_temperature(settings: Settings) -> TemperatureSchedule:
    """Return the temperature of the kernel attention over rounds or epochs."""
    schedule = settings.temperature
    return TemperatureSchedule(schedule.initial, schedule.final, schedule.rounds, schedule.shape)


def build_sgd(settings: Settings) -> LocalSGD:
    """Build the optimiser at the start of a run, with the whole batch, and the loss; μ is a client's alone."""
    train = settings.train
    loss: Loss = find("train.loss", train.loss) if is_own(train.loss) else LOSSES[train.loss]
    if train.label_smoothing:  # the settings give an own loss none
        loss = partial(F.cross_entropy, label_smoothing=train.label_smoothing)
    return LocalSGD(
        lr=train.lr,
        momentum=train.momentum,
        nesterov=train.nesterov,
        weight_decay=train.weight_decay,
        batch_size=train.batch_size,
        precision=train.precision,
        memory_format=MEMORY_FORMATS[train.memory_format],
        clip_norm=train.clip_norm,
        loss=loss,
        make=partial(_own_optimiser, train.optimiser)
        if is_own(train.optimiser)
        else OPTIMISERS[train.optimiser],
    )


def build_compute(settings: Settings, device: torch.device) -> Compute:
    """Return what computes gradients on the device, of one model that stays where it is."""
    if settings.train.torch_compile:
        return Compiled()
    if settings.train.cuda_graphs and device.type == "cuda":
        return Graphs(capture_on_gpu(device))
    return compute_gradients


def build_rate(settings: Settings, done: int) -> float:
    """Return the learning rate after so many rounds or epochs."""
    train = settings.train
    return scheduled_rate(train.lr, train.schedule, done, settings.length, train.lr_warmup)


def _own_optimiser(name: str, parameters: Iterable[Any], how: LocalSGD) -> torch.optim.Optimizer:
    """Make the optimiser of that name, of PyTorch or of the user's own, for these parameters."""
    offered = {name: getattr(how, name) for name in ("weight_decay", "momentum", "nesterov")}
    made = call("train.optimiser", name, {"lr": how.lr}, offered, {"parameters": list(parameters)})
    if not isinstance(made, torch.optim.Optimizer):
        raise SettingsError(
            f"train.optimiser = {name!r} must make a torch.optim.Optimizer, and made a {type(made).__name__}"
        )
    return made


def check_training(settings: Settings, model: nn.Module, classes: int) -> int:
    """See that a user's own loss and optimiser work; returns how many numbers that keeps for each parameter.

    The optimiser takes a step on a copy of the model's parameters.

    Raises:
        SettingsError: they don't.
    """
    train, sgd = settings.train, build_sgd(settings)
    if is_own(train.loss):
        drawn = torch.randn(4, classes, generator=torch.Generator().manual_seed(0))
        logits = drawn.requires_grad_().clone()  # no leaf, as those of a network are none
        labels = torch.arange(4) % classes
        loss = call("train.loss", train.loss, first={"logits": logits, "labels": labels})
        if not (isinstance(loss, torch.Tensor) and loss.shape == () and loss.requires_grad):
            got = (
                f"one of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            )
            raise SettingsError(
                f"train.loss = {train.loss!r} must return the mean loss, a tensor without dimensions that follows "
                f"from the logits, and returned {got}"
            )
    try:
        if is_own(train.optimiser):
            copies = [nn.Parameter(parameter.detach().clone()) for parameter in model.parameters()]
            for parameter in copies:
                parameter.grad = torch.zeros_like(parameter)
            sgd.optimiser(copies).step()
        return sgd.states()
    except SettingsError:
        raise
    except Exception as error:  # such as one whose step wants a closure
        raise SettingsError(
            f"train.optimiser = {train.optimiser!r} can't take a step: {one_line(error)}"
        ) from error


def _upload_bytes(arrays: Arrays, parameters: Collection[str], upload: str, kernels: int) -> tuple[int, ...]:
    """Bytes that a client sends which trained 1, 2, … `kernels` kernels of each bank."""

    def sent(trained: int) -> Arrays:
        return {
            name: array
            for name, array in arrays.items()
            if (kernel := bank_of(name)) is None or kernel[1] < trained
        }

    return tuple(upload_bytes(sent(trained + 1), upload, parameters) for trained in range(kernels))


def torch_device(settings: Settings, backend: str = "") -> torch.device:
    """Return what to compute on, the SuperNode's own `backend` or the run's; "auto" takes a GPU where there is one."""
    key, name = ("device-backend", backend) if backend else ("device", settings.device)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise SettingsError(f"{key} = {name!r}: must be auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(
            f"{key} = {name!r} but PyTorch sees {torch.cuda.device_count()} GPUs here: use {key}=cpu or auto"
        )
    return device


def placed(dataset: Dataset, device: torch.device) -> Dataset:
    """Return the dataset with its images on the GPU, if they are in memory and the GPU has room for them."""
    if device.type == "cpu":
        return dataset
    train, test, validation = dataset.train, dataset.test, dataset.validation
    if not (isinstance(train, ImageSet) and isinstance(test, ImageSet)):  # streamed
        return dataset
    held_out = validation.in_memory() if validation else None
    free, _ = torch.cuda.mem_get_info(device)
    if sum(images.nbytes for images in (train, test, held_out) if images) > GPU_SHARE * free:
        return dataset
    return replace(
        dataset,
        train=train.to(device),
        test=test.to(device),
        validation=held_out.to(device) if held_out else None,
    )


def _path(value: str) -> Path | None:
    return Path(value).expanduser() if value else None


@contextmanager
def _bad_input(*others: type[Exception]) -> Iterator[None]:
    """Turn what a room says of bad input, as ValueError, OSError or `others`, into a settings error."""
    kinds: tuple[type[Exception], ...] = (ValueError, OSError, *others)
    try:
        yield
    except kinds as error:
        raise SettingsError(" ".join(str(error).split())) from error
