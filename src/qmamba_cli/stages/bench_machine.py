"""What a measurement was made on."""

import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

# Where Linux's driver says its version; torch knows only the version of CUDA that it supports.
_DRIVER = Path("/proc/driver/nvidia/version")
_PROCESSOR = Path("/proc/cpuinfo")
_CUPY = ("cupy-cuda13x", "cupy-cuda12x", "cupy")


def machine(device: torch.device) -> dict[str, str]:
    """Device, driver and versions, as far as they are known."""
    known = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "driver": driver() if device.type == "cuda" else None,
        "CUDA": torch.version.cuda if device.type == "cuda" else None,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cupy": _installed(*_CUPY),
        "triton": _installed("triton"),
        "mamba_ssm": _installed("mamba-ssm"),
    }
    return {name: value for name, value in known.items() if value is not None}


def processor() -> str:
    """The processor's name."""
    try:
        for line in _PROCESSOR.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def driver() -> str | None:
    """Version of the NVIDIA driver, or None where it does not say."""
    try:
        found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", _DRIVER.read_text(encoding="utf-8"))
    except OSError:
        return None
    return found[1] if found else None


def peak_host_bytes() -> int | None:
    """Largest resident memory of this process so far, bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in units of 1024 bytes, macOS in bytes.
    return largest if sys.platform == "darwin" else 1024 * largest


def _installed(*distributions: str) -> str | None:
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None
