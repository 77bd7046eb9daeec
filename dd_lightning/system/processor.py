"""Settings of the processor for a whole process: what makes small float32 networks fast on a CPU."""

import ctypes
import logging
import platform
import re
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch.backends import mkldnn

from dd_lightning.system.words import counted

log = logging.getLogger(__name__)

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


@cache
def tune_cpu() -> None:
    """Keeps freed memory for the next step, and lets oneDNN multiply matrices where that costs no precision."""
    keep_freed_memory()
    use_onednn_for_matmul()


def keep_freed_memory() -> None:
    """Stops glibc from giving large freed buffers back, whose pages every step would have to fault in again."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # not every C library has it
        libc.mallopt(_M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def use_onednn_for_matmul() -> None:
    """Multiplies float32 matrices with oneDNN, unless it would lose precision.

    torch asks oneDNN only if bfloat16 is allowed inside, and MKL otherwise, which is several times slower for small
    batched products on processors that are not Intel's. Where oneDNN has no bfloat16 kernel for float32 matrices the
    result is float32 all the same; that is measured here.
    """
    settings = mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    # Rounding errors of a sum grow like the root of its length; bfloat16 inside would be a thousand times above.
    worst = max(_matmul_error(*shape) / shape[1] ** 0.5 for shape in ((16, 150, 1000), (120, 400, 10), (64, 1600, 640)))
    if worst > torch.finfo(torch.float32).eps:
        settings.fp32_precision = before
        log.debug(
            f"oneDNN's products have an error of {worst:.1e} times the root of their length; torch's choice is kept"
        )


def _matmul_error(rows: int, inner: int, columns: int) -> float:
    """Relative error of a batched float32 product."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, rows, inner, generator=generator)
    b = torch.randn(2, inner, columns, generator=generator)
    exact = torch.bmm(a.double(), b.double())
    return ((torch.bmm(a, b) - exact).norm() / exact.norm()).item()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def device_of(name: str | None) -> torch.device:
    """The device of that name; of none a GPU where there is one, else the CPU.

    Raises:
        ValueError: this machine has no such device.
    """
    try:
        device = torch.device(name if name else "cuda" if torch.cuda.is_available() else "cpu")
        torch.zeros(1, device=device)
    except Exception as error:  # of each kind of device another
        raise ValueError(f"device={name} cannot be used: {' '.join(str(error).split())[:160]}") from error
    return device


def hardware() -> str:
    """The device that did the work."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*:\s*(.+)", info.read_text(encoding="utf-8")) if info.exists() else []
    return f"{models[0] if models else platform.machine()} CPU, {counted(torch.get_num_threads(), 'thread')}"


def versions() -> dict[str, str]:
    """Of what computes; a checkout that is not installed has none."""
    found = {"python": platform.python_version()}
    for name in ("dd_lightning", "torch", "torchvision", "pytorch-lightning", "higher"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
