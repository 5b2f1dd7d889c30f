"""Networks of static convolutions made dynamic: the same function at first, by any convolution with a bank."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedfmd.conv.attention import AttentionValues
from fedfmd.conv.factory import CONVS, is_dynamic, make_conv
from fedfmd.conv.layers import DynamicConv2d, dynamic_layers
from fedfmd.errors import nearest_of

SPREAD = 0.01
"""How far the kernels made from one lie apart: their standard deviation, relative to that of the kernel's weights."""

Skip = Collection[str] | Callable[[str, nn.Conv2d], bool]


def make_dynamic(
    model: nn.Module,
    conv: str,
    kernels: int = 4,
    *,
    skip: Skip | None = None,
    spread: float = SPREAD,
    **options: Any,
) -> nn.Module:
    """Return a copy of the model whose convolutions are dynamic and which computes what the model does.

    Every `nn.Conv2d`, grouped and depthwise ones too, becomes a convolution `conv` that starts neutral: all
    samples are treated alike. The mean of its kernels is the old kernel, divided by what the attentions scale it
    by at the start, so that the outputs agree to rounding. Attentions, and a bias bank where the published form
    has one, are new. The model itself stays as it is; device, type, mode and `requires_grad` are those of
    the old convolution.

    The kernels lie `spread` apart around the old one. This noise, drawn from PyTorch's generator, adds up to zero
    over the kernels, so it changes no output. Exact copies (`spread` = 0) would get equal gradients, and so
    would their attention: they would stay equal in all training, K kernels doing the work of one.

    Args:
        model: any network; one that is a single convolution, too.
        conv: the name of a dynamic convolution in `CONVS`, or a user's own ``module:Class`` that derives from
            `DynamicConv2d`.
        kernels: K, the kernels per bank.
        skip: which convolutions stay as they are: names of submodules, as in `named_modules`, or a function of a
            convolution's name and the convolution. By default the stem, that is the model's first convolution, and
            the 1 × 1 convolutions of shortcuts, `downsample` in the blocks of torchvision and timm: then a ResNet is
            that of `make_model` and of the paper. `()` leaves none.
        spread: standard deviation of the kernels, relative to that of the old kernel's weights.
        options: more options of `make_conv`, such as `temperature`.

    Raises:
        ValueError: an unknown or static convolution, an option that can't be used, a name in `skip` without a
            convolution, a convolution that has no dynamic counterpart, or none to replace.
    """
    if not is_dynamic(conv):
        names = ", ".join(name for name in CONVS if is_dynamic(name))
        raise ValueError(f"conv = {conv!r} has no bank of kernels; use one of {names}")
    found = {
        name: layer
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, nn.Conv2d)
    }
    stays = _chosen(skip, model, found)
    replaced = {name: layer for name, layer in found.items() if not stays(name, layer)}
    if not replaced:
        what = "all of its convolutions are in skip" if found else "it has no nn.Conv2d"
        raise ValueError(f"model = {type(model).__name__}: nothing to make dynamic, {what}")
    made: dict[nn.Module, nn.Module] = {}
    for name, layer in replaced.items():
        if layer not in made:
            made[layer] = _dynamic(name, layer, conv, kernels, spread, options)
    return copy.deepcopy(model, {id(layer): new for layer, new in made.items()})


def load_static_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], spread: float = SPREAD
) -> None:
    """Fill a dynamic network with the weights of the static one that it is made of, so that it computes the same.

    Banks are filled as by `make_dynamic`; attentions and bias banks without a bias stay as they are.

    Raises:
        ValueError: a layer doesn't start neutral.
        RuntimeError: names or shapes don't fit, as in `nn.Module.load_state_dict`.
    """
    state = dict(state_dict)
    for name, layer in dynamic_layers(model).items():
        prefix = f"{name}." if name else ""
        weight, wanted = state.pop(f"{prefix}weight", None), layer.bank.shape[1:]
        if weight is None or weight.shape != wanted:
            what = "is missing" if weight is None else f"has shape {tuple(weight.shape)}"
            raise RuntimeError(f"{prefix}weight {what}, and must have {tuple(wanted)}")
        bias = None if layer.bias_bank is None else state.pop(f"{prefix}bias", None)
        _fill(layer, weight, bias, spread)
        state |= {f"{prefix}{entry}": value for entry, value in layer.state_dict().items()}
    model.load_state_dict(state)


def _chosen(
    skip: Skip | None, model: nn.Module, found: Mapping[str, nn.Conv2d]
) -> Callable[[str, nn.Conv2d], bool]:
    """Whether a convolution stays, as a function of its name and itself."""
    if callable(skip):
        return skip
    if skip is None:
        kept = {next(iter(found.values()), None), *_shortcuts(model)}
        return lambda _name, layer: layer in kept
    names = (skip,) if isinstance(skip, str) else tuple(skip)
    for name in names:
        if not any(_within(other, name) for other in found):
            near = f"; did you mean {nearest_of(name, found)!r}?" if found else ""
            raise ValueError(f"skip: {name!r} has no convolution{near}")
    return lambda other, _layer: any(_within(other, name) for name in names)


def _within(name: str, of: str) -> bool:
    return name == of or name.startswith(f"{of}.")


def _shortcuts(model: nn.Module) -> Iterator[nn.Conv2d]:
    """Yield the 1 × 1 convolutions beside the main path of the blocks."""
    for block in model.modules():
        shortcut = getattr(block, "downsample", None)
        for layer in shortcut.modules() if isinstance(shortcut, nn.Module) else ():
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
                yield layer


def _dynamic(
    name: str, old: nn.Conv2d, conv: str, kernels: int, spread: float, options: Mapping[str, Any]
) -> nn.Module:
    """Return the dynamic convolution that computes what the old one does."""
    if why := _difference(old):
        raise ValueError(f"{name or 'model'} {why}, so it has no dynamic counterpart: name it in skip")
    layer = make_conv(
        conv,
        old.in_channels,
        old.out_channels,
        old.kernel_size,
        stride=old.stride,
        padding=old.padding,
        dilation=old.dilation,
        groups=old.groups,
        bias=None if old.bias is None else True,
        padding_mode=old.padding_mode,
        kernels=kernels,
        **options,
    )
    assert isinstance(layer, DynamicConv2d)
    _fill(layer, old.weight.detach(), None if old.bias is None else old.bias.detach(), spread)
    layer.to(old.weight).train(old.training)
    layer.bank.requires_grad_(old.weight.requires_grad)
    if layer.bias_bank is not None and old.bias is not None:
        layer.bias_bank.requires_grad_(old.bias.requires_grad)
    return layer


def _difference(conv: nn.Conv2d) -> str:
    """Return what it does that no dynamic convolution can; "" if there is nothing."""
    if type(conv) is not nn.Conv2d:
        return f"is a {type(conv).__name__}, which may compute something else than an nn.Conv2d"
    if not isinstance(conv.weight, nn.Parameter):
        return "computes its weight from others"
    return ""


@torch.no_grad()
def _fill(layer: DynamicConv2d, weight: Tensor, bias: Tensor | None, spread: float) -> None:
    """Set the bank so that the layer computes the convolution with weight O × C/groups × kh × kw and bias O.

    Raises:
        ValueError: its attentions don't treat all samples and channels alike.
    """
    scale, bias_scale = _scales(layer)
    weight = weight.to(layer.bank)
    noise = torch.randn_like(layer.bank)
    noise -= noise.mean(0)
    layer.bank.copy_((weight + spread * weight.std(correction=0) * noise) / scale)
    if layer.bias_bank is not None and bias is not None:
        layer.bias_bank.copy_((bias / bias_scale).expand_as(layer.bias_bank))


def _scales(layer: DynamicConv2d) -> tuple[float, float]:
    """Return what the attentions scale a convolution with the mean kernel by at the start, and its bias.

    See the equation in `fedfmd.conv.mixing.convolve`.
    """
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(8, layer.in_channels, 1, 1, generator=generator).to(layer.bank)
    attention, training = layer.attention, layer.training
    values: AttentionValues = attention.eval()(probe, layer.temperature)
    attention.train(training)
    factors = {
        name: value.sum(1) if name == "kernel" else value
        for name, value in values._asdict().items()
        if value is not None
    }
    if uneven := [name for name, factor in factors.items() if factor.min() != factor.max()]:
        raise ValueError(
            f"attention_init = {layer.attention_init!r}: the {uneven[0]} attention of {type(layer).__name__} does not "
            "treat all samples alike at the start; use neutral"
        )
    of = {name: factor.flatten()[0].item() for name, factor in factors.items()}
    bias = of.get("output", 1.0) * of.get("kernel", 1.0)
    return of.get("input", 1.0) * of.get("spatial", 1.0) * bias, bias
