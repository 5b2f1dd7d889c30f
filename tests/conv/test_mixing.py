"""Every way of mixing gives the numbers of one convolution per sample, and so do its gradients."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from fedfmd.conv import MIXINGS as PYTHON_MIXINGS
from fedfmd.conv import native
from fedfmd.conv.attention import AttentionValues
from fedfmd.conv.mixing import NATIVE, choose_mixing, convolve
from fedfmd.conv.plain import Geometry

MIXINGS = (*PYTHON_MIXINGS, NATIVE)
GEOMETRIES = {
    "3x3": (8, 12, (3, 3), Geometry((1, 1), (1, 1), (1, 1), 1)),
    "strided": (8, 12, (3, 3), Geometry((2, 2), (1, 1), (1, 1), 1)),
    "1x1": (8, 12, (1, 1), Geometry((1, 1), (0, 0), (1, 1), 1)),
    "5x3 uneven": (4, 6, (5, 3), Geometry((2, 1), (2, 0), (1, 2), 1)),
    "dilated": (4, 6, (3, 3), Geometry((1, 1), (2, 2), (2, 2), 1)),
    "grouped": (8, 12, (3, 3), Geometry((1, 1), (1, 1), (1, 1), 4)),
    "depthwise": (6, 6, (3, 3), Geometry((1, 1), (1, 1), (1, 1), 6)),
    "large kernel": (16, 40, (3, 3), Geometry((2, 2), (1, 1), (1, 1), 1)),
}


def operands(
    channels, out_channels, kernel, geometry, *, batch=5, kernels=3, spatial=True, scales=True, bias=True
):
    torch.manual_seed(0)
    positive = torch.sigmoid
    x = torch.randn(batch, channels, 7, 6, dtype=torch.double)
    bank = torch.randn(kernels, out_channels, channels // geometry.groups, *kernel, dtype=torch.double)
    bias_bank = torch.randn(kernels, out_channels, dtype=torch.double) if bias else None
    attention = AttentionValues(
        input=positive(torch.randn(batch, channels, dtype=torch.double)) if scales else None,
        output=positive(torch.randn(batch, out_channels, dtype=torch.double)) if scales else None,
        spatial=positive(torch.randn(batch, kernel[0] * kernel[1], dtype=torch.double)) if spatial else None,
        kernel=torch.softmax(torch.randn(batch, kernels, dtype=torch.double), 1),
    )
    for tensor in (x, bank, bias_bank, *attention):
        if tensor is not None:
            tensor.requires_grad_()
    return x, bank, bias_bank, attention


def one_by_one(x, bank, bias_bank, attention, geometry):
    samples = []
    for b in range(len(x)):
        kernel = torch.einsum("k,koihw->oihw", attention.kernel[b], bank)
        if attention.spatial is not None:
            kernel = kernel * attention.spatial[b].view(bank.shape[3:])
        image = x[b] if attention.input is None else x[b] * attention.input[b, :, None, None]
        y = F.conv2d(image, kernel, None, *geometry.movement, geometry.groups)
        if bias_bank is not None:
            y = y + (attention.kernel[b] @ bias_bank)[:, None, None]
        samples.append(y if attention.output is None else y * attention.output[b, :, None, None])
    return torch.stack(samples)


def gradients(y, tensors):
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return torch.autograd.grad((y * weights).sum(), [t for t in tensors if t is not None])


@pytest.fixture(autouse=True)
def all_ways(request):
    """Compiles what the native way needs; without a compiler its tests are skipped."""
    if "native" in request.node.name:
        request.getfixturevalue("compiled_native")
        if not native.is_compiled():
            pytest.skip("there is no C compiler")


@pytest.fixture
def small_caches(monkeypatch):
    """Caches so small that even these layers need several blocks and tiles."""
    monkeypatch.setattr("fedfmd.conv.fused.BLOCK_NUMEL", 4000)
    monkeypatch.setattr("fedfmd.conv.fused.TILE_NUMEL", 1)
    monkeypatch.setattr("fedfmd.conv.fused.TILE_SAMPLES", 2)


@pytest.mark.usefixtures("small_caches")
@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("shape", GEOMETRIES)
@pytest.mark.parametrize("mixing", MIXINGS)
def test_ways_agree_with_one_convolution_per_sample(mixing, shape, spatial):
    *sizes, geometry = GEOMETRIES[shape]
    x, bank, bias_bank, attention = operands(*sizes, geometry, spatial=spatial)
    expected = one_by_one(x, bank, bias_bank, attention, geometry)
    y = convolve(x, bank, bias_bank, attention, geometry, mixing)
    torch.testing.assert_close(y, expected)
    tensors = (x, bank, bias_bank, *attention)
    torch.testing.assert_close(gradients(y, tensors), gradients(expected, tensors))


@pytest.mark.usefixtures("small_caches")
@pytest.mark.parametrize(("scales", "bias"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("mixing", MIXINGS)
def test_ways_without_scales_or_bias(mixing, scales, bias):
    *sizes, geometry = GEOMETRIES["strided"]
    x, bank, bias_bank, attention = operands(*sizes, geometry, spatial=False, scales=scales, bias=bias)
    expected = one_by_one(x, bank, bias_bank, attention, geometry)
    y = convolve(x, bank, bias_bank, attention, geometry, mixing)
    tensors = (x, bank, bias_bank, *attention)
    torch.testing.assert_close((y, *gradients(y, tensors)), (expected, *gradients(expected, tensors)))


@pytest.mark.parametrize("mixing", MIXINGS)
def test_second_derivatives(mixing):
    geometry = Geometry((1, 1), (1, 1), (1, 1), 1)
    x, bank, bias_bank, attention = operands(2, 2, (3, 3), geometry, batch=2, kernels=2)
    small = x[:, :, :3, :3].detach().requires_grad_()

    def through_shared_input(image, bank, logits):  # π depends on the image, as in a layer
        pi = torch.softmax(logits + image.mean((2, 3)), 1)
        return convolve(image, bank, bias_bank, attention._replace(kernel=pi), geometry, mixing)

    logits = torch.randn(2, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(through_shared_input, (small, bank, logits), fast_mode=True)
    assert torch.autograd.gradgradcheck(through_shared_input, (small, bank, logits), fast_mode=True)


@pytest.mark.parametrize("mixing", MIXINGS)
def test_gradients_only_where_they_are_wanted(mixing):
    *sizes, geometry = GEOMETRIES["3x3"]
    x, bank, _, attention = operands(*sizes, geometry)
    values = AttentionValues(*(t.detach() for t in attention))
    convolve(x.detach(), bank, None, values, geometry, mixing).sum().backward()
    assert bank.grad is not None
    assert x.grad is None


@pytest.mark.parametrize(
    ("channels", "out_channels", "size", "stride", "batch", "expected"),
    [
        (64, 64, 32, 1, 1, "grouped"),  # one sample: a plain convolution
        (16, 16, 32, 1, 32, "grouped"),  # ResNet-8 and 20: all kernels and images fit the cache
        (64, 64, 8, 1, 32, "grouped"),
        (64, 64, 32, 1, 32, "blocked"),  # ResNet-18
        (128, 128, 16, 1, 32, "blocked"),
        (128, 256, 16, 2, 32, "im2col"),
        (512, 512, 4, 1, 32, "im2col"),
        (512, 512, 4, 1, 2, "im2col"),
    ],
)
def test_auto_follows_shape_and_batch(channels, out_channels, size, stride, batch, expected):
    geometry = Geometry((stride, stride), (1, 1), (1, 1), 1)
    x, bank = torch.empty(batch, channels, size, size), torch.empty(4, out_channels, channels, 3, 3)
    assert choose_mixing(x, bank, geometry) == expected
    if batch > 1:
        assert choose_mixing(x.to("meta"), bank.to("meta"), geometry) == "outputs"
