"""Kernel mixing by code compiled for this machine's processor: `native_source`, called through ctypes.

`compile_native` makes it, once for a machine, with the C compiler found there; nothing else does. Without it, all
other ways of mixing work as ever.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fedfmd.cache import cache_dir
from fedfmd.conv.fused import Mixture, MixtureGradient
from fedfmd.conv.native_source import SOURCE
from fedfmd.conv.plain import Geometry
from fedfmd.errors import FedfmdError

MISSING = (
    "mixing = 'native' needs code compiled for this machine: run `fedfmd compile`, or use mixing = 'auto'"
)
PRECISIONS = {torch.float64: "double", torch.float32: "float"}
"""In the order in which they are compiled: `is_compiled` looks at the last one."""
COMPILERS = ("cc", "gcc", "clang")
FLAGS = (
    *("-std=gnu11", "-O3", "-ffp-contract=fast", "-w", "-shared", "-fPIC"),
    "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native",
)


class _Shape(ctypes.Structure):
    """`Shape` of the source."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("batch", "channels", "height", "width", "kernels", "out_channels", "tap_rows", "tap_columns"),
            *("row_stride", "column_stride", "row_dilation", "column_dilation", "out_height", "out_width"),
        )
    ]


def compile_native() -> list[Path]:
    """Compile the source for this processor, in each precision, and return the files: a few seconds.

    The compiler is that of the environment variable CC, or the first of `COMPILERS` that is installed.

    Raises:
        FedfmdError: there is no compiler, or it can't compile this; the text says what it said.
    """
    names = [os.environ["CC"]] if os.environ.get("CC") else COMPILERS
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        raise FedfmdError(
            f"no C compiler found (looked for {', '.join(names)}): install one, such as gcc, or set CC"
        )
    made = [_compile(compiler, precision, library_path(precision)) for precision in PRECISIONS.values()]
    _library.cache_clear()
    return made


def library_path(precision: str) -> Path:
    """Return where the compiled code lies for this source and processor, "float" or "double"."""
    about = f"{SOURCE}\n{' '.join(FLAGS)}\n{_processor_features()}"
    digest = hashlib.blake2b(about.encode(), digest_size=8).hexdigest()
    return cache_dir() / "native" / f"{precision}-{digest}.so"


def is_compiled() -> bool:
    """Whether there is compiled code for this processor."""
    return _library(torch.float32) is not None


def takes(x: Tensor, bank: Tensor, geometry: Geometry) -> bool:
    """Whether the compiled code, where there is some, can do this layer: on the CPU, in one group, in one precision."""
    return x.device.type == "cpu" and x.dtype == bank.dtype and x.dtype in PRECISIONS and geometry.groups == 1


@dataclass(frozen=True)
class Native:
    """Mix a tile of the bank in the cache and multiply it at once with the sample's columns, in compiled code."""

    geometry: Geometry
    kernel: tuple[int, ...]  # O × C × kh × kw

    def block(self, image: tuple[int, ...]) -> int:
        """Return more samples than any batch has: the bank is read once for all of them."""
        return 1 << 30

    def forward(self, x: Tensor, mixture: Mixture, samples: slice, spatial: Tensor | None) -> Tensor:
        """Compute the outputs of a batch."""
        library, shape, image = self._prepared(x, mixture)
        positions = shape.out_height * shape.out_width
        y = x.new_empty(len(x), self.kernel[0], _rounded_up(positions, library.lanes()))
        operands = _dense(image, mixture.bank, mixture.pi, spatial)

        def part(_number: int, start: int, end: int) -> int:
            return int(library.forward(ctypes.byref(shape), *_addresses(*operands, y), start, end))

        _in_threads(part, self.kernel[0])
        return torch.unflatten(y[:, :, :positions], 2, (shape.out_height, shape.out_width))

    def backward(
        self, x: Tensor, grad: Tensor, mixture: MixtureGradient, samples: slice, spatial: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the gradients of x and spatial; that of the kernels goes to the mixture."""
        library, shape, image = self._prepared(x, mixture)
        positions = shape.out_height * shape.out_width
        grad = F.pad(grad.flatten(2), (0, _rounded_up(positions, library.lanes()) - positions))
        operands = _dense(image, mixture.bank, mixture.pi, spatial, grad)
        dimage, parts = torch.empty_like(image), torch.get_num_threads()
        dpi, drows = x.new_zeros(parts, *mixture.pi.shape), x.new_zeros(parts, len(x), self.kernel[0])
        dspatial = None if spatial is None else x.new_zeros(parts, *spatial.shape)

        def part(number: int, start: int, end: int) -> int:
            own = (t if t is None else t[number] for t in (dpi, drows, dspatial))
            gradients = _addresses(dimage, mixture.of_bank, *own)
            return int(library.backward(ctypes.byref(shape), *_addresses(*operands), *gradients, start, end))

        _in_threads(part, x.shape[1])
        mixture.of_pi.copy_(dpi.sum(0))
        mixture.of_scaled_rows.copy_(drows.sum(0))
        (top, left), (height, width) = self.geometry.padding, x.shape[2:]
        dx = dimage[:, :, top : top + height, left : left + width]
        return dx, None if dspatial is None else dspatial.sum(0)

    def _prepared(self, x: Tensor, mixture: Mixture) -> tuple[ctypes.CDLL, _Shape, Tensor]:
        """Return the library, the sizes and the padded images."""
        library = _library(x.dtype)
        if library is None:
            raise RuntimeError(MISSING)
        (rows, columns), taps = self.geometry.padding, self.kernel[2:]
        image = F.pad(x, (columns, columns, rows, rows)).contiguous()
        shape = _Shape(
            *image.shape, len(mixture.bank), self.kernel[0], *taps, *self.geometry.stride, *self.geometry.dilation,
            *self.geometry.output_size(tuple(x.shape[2:]), taps),
        )  # fmt: skip
        return library, shape, image


def _compile(compiler: str, precision: str, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [compiler, *FLAGS, f"-DREAL={precision}", "-xc", "-", "-o", str(made)]
        done = subprocess.run(command, input=SOURCE, capture_output=True, encoding="utf-8", check=False)
        if done.returncode:
            raise FedfmdError(f"{compiler} can't compile the mixing of kernels: {done.stderr.strip()}")
        made.replace(path)  # at once: no other process loads half a file
    return path


@lru_cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """Load the compiled code of a precision; none where there is none."""
    path = library_path(PRECISIONS[dtype])
    if not path.exists():
        return None
    library = ctypes.CDLL(str(path))
    library.lanes.restype = ctypes.c_int64
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.forward.argtypes = [pointer] * 6 + [number] * 2
    library.backward.argtypes = [pointer] * 11 + [number] * 2
    return library


def _processor_features() -> str:
    """Return what tells processors apart whose code differs, where the system says it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()} {features}"


def _in_threads(part: Callable[[int, int, int], int], items: int) -> None:
    """Call part(number, start, end) for as many ranges of the items as PyTorch has threads, side by side.

    Raises:
        MemoryError: a part returned other than 0.
    """
    threads = torch.get_num_threads()
    step = -(-items // threads)
    ranges = [(n, start, min(start + step, items)) for n, start in enumerate(range(0, items, step))]
    if len(ranges) == 1:
        failed: Sequence[int] = [part(*ranges[0])]
    else:
        with ThreadPoolExecutor(len(ranges)) as pool:
            failed = list(pool.map(lambda one: part(*one), ranges))
    if any(failed):
        raise MemoryError("too little memory for a mixed convolution: use smaller batches")


def _rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None else t.contiguous() for t in tensors]


def _addresses(*tensors: Tensor | None) -> list[int | None]:
    return [t if t is None else t.data_ptr() for t in tensors]
