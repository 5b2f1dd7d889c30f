"""Compiled mixing: it is made on request, for this processor, and called by as many threads as PyTorch has."""

import shutil

import pytest
import torch

from fedfmd.conv import FMDConv2d, native
from fedfmd.conv.mixing import choose_mixing
from fedfmd.conv.plain import Geometry
from fedfmd.errors import FedfmdError

NEEDS_COMPILER = pytest.mark.skipif(
    not any(map(shutil.which, native.COMPILERS)), reason="there is no C compiler"
)
SQUARE = Geometry((1, 1), (1, 1), (1, 1), 1)


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    """A user who has compiled nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._library.cache_clear()
    yield tmp_path
    native._library.cache_clear()


def test_nothing_is_compiled_by_itself(empty_cache):
    with pytest.raises(
        ValueError, match=r"mixing = 'native' needs code compiled .*: run `fedfmd compile`, or use"
    ):
        FMDConv2d(8, 8, 3, mixing="native")
    FMDConv2d(8, 8, 3, padding=1)(torch.randn(4, 8, 6, 6)).sum().backward()
    assert list(empty_cache.rglob("*.so")) == []


def test_without_a_compiler_it_says_what_to_install(empty_cache, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(FedfmdError, match=r"no C compiler found .*: install one, such as gcc, or set CC"):
        native.compile_native()


@NEEDS_COMPILER
def test_what_the_compiler_says_is_told(empty_cache, monkeypatch):
    monkeypatch.setattr(native, "SOURCE", "int forward( {")
    with pytest.raises(FedfmdError, match=r"can't compile the mixing of kernels: [^:]*:1"):
        native.compile_native()
    assert list(empty_cache.rglob("*.so")) == []


@NEEDS_COMPILER
def test_auto_takes_it_where_it_is_fast(compiled_native):
    bank = torch.empty(4, 512, 512, 3, 3)
    assert choose_mixing(torch.empty(32, 512, 4, 4), bank, SQUARE) == "native"
    assert choose_mixing(torch.empty(1, 512, 4, 4), bank, SQUARE) == "grouped"  # a plain convolution
    small = torch.empty(4, 64, 64, 3, 3)
    assert choose_mixing(torch.empty(32, 64, 8, 8), small, SQUARE) == "grouped"  # all of it fits the cache
    assert choose_mixing(torch.empty(32, 512, 4, 4, dtype=torch.bfloat16), bank, SQUARE) == "im2col"
    in_groups = Geometry((1, 1), (1, 1), (1, 1), 2)
    assert choose_mixing(torch.empty(32, 1024, 4, 4), bank, in_groups) != "native"


@NEEDS_COMPILER
def test_threads_share_a_layer(compiled_native):
    """40 channels between three threads: 14, 14 and 12."""
    x, grads = torch.randn(3, 40, 7, 5), {}
    layer = FMDConv2d(40, 33, 3, padding=1, mixing="native")
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            layer.zero_grad()
            image = x.clone().requires_grad_()
            layer(image).square().sum().backward()
            grads[threads] = [image.grad, *(p.grad for p in layer.parameters())]
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(grads[1], grads[3], rtol=1e-4, atol=1e-4)
