"""What surrounds a launch, as far as it shows without a GPU."""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qmamba_cli.errors import QmambaError, ShapeError
from qmamba_cli.kernels import _launch


def test_the_limit_of_shared_memory_is_raised_and_never_lowered():
    # Launches of one instance with different sizes share the function and its limit.
    kernel = SimpleNamespace(max_dynamic_shared_size_bytes=48 * 1024)
    limits = []
    for size in (0, 20_000, 130_000, 60_000, 49_153, 200_000):
        _launch._allow_shared(kernel, size)
        limits.append(kernel.max_dynamic_shared_size_bytes)
    assert limits == [49_152, 49_152, 130_000, 130_000, 130_000, 200_000]


def test_bare_numbers_are_refused_as_arguments():
    for value in (1, 1.0, np.float64(1.0), np.int8(1)):
        with pytest.raises(TypeError, match="sized numpy scalar"):
            _launch._value(value)
    assert _launch._value(None) == 0
    tensor = torch.zeros(3)
    assert _launch._value(tensor) == tensor.data_ptr()


@pytest.mark.parametrize("grid", [(0, 1, 1), (1, 65536, 1), (1, 1, 65536), (2**31, 1, 1)])
def test_a_grid_out_of_range_is_refused(grid):
    with pytest.raises(ShapeError, match="out of range"):
        _launch.launch("x.cu", "x", grid=grid, block=(1, 1, 1), args=(), device=torch.device("cuda", 0))


def test_tensors_of_the_cpu_are_refused():
    with pytest.raises(ShapeError, match=r"`x` is on cpu, expected a CUDA tensor"):
        _launch.contiguous("x", torch.zeros(3))


def test_the_driver_s_structures_have_its_layout():
    # cuda.h: CUlaunchConfig and CUlaunchAttribute, whose union is 64 bytes wide.
    config, attribute = _launch._LaunchConfig, _launch._LaunchAttribute
    offsets = [
        getattr(config, name).offset
        for name in ("grid", "block", "shared_bytes", "stream", "attributes", "attribute_count")
    ]
    assert offsets == [0, 12, 24, 32, 40, 48] and ctypes.sizeof(config) == 56
    assert attribute.value.offset == 8 and ctypes.sizeof(attribute) == 72


def test_parameters_lie_where_their_addresses_say():
    struct = bytes(range(20))
    values = [np.uint64(2**63 + 5), np.int32(-3), struct, np.float32(0.5), np.int64(-(2**40))]
    slots, addresses = _launch._parameters(values)
    read = []
    for i, value in enumerate(values):
        size = len(value) if isinstance(value, bytes) else value.nbytes
        raw = ctypes.string_at(addresses[i], size)
        read.append(raw if isinstance(value, bytes) else np.frombuffer(raw, dtype=value.dtype)[0])
    assert read == values
    # 20 bytes take three slots of 8.
    assert [address - addresses[0] for address in addresses] == [0, 8, 16, 40, 48]
    assert ctypes.sizeof(slots) == 56


def launched(monkeypatch, status: int):
    """What the driver is handed in an overlapping launch."""
    seen = {}

    def launch_kernel(config, function, addresses, extra):
        config = config._obj
        seen["config"] = [*config.grid, *config.block, config.shared_bytes, config.stream]
        attribute = config.attributes[0]
        flag = ctypes.cast(attribute.value, ctypes.POINTER(ctypes.c_int))[0]
        seen["attribute"] = (config.attribute_count, attribute.id, flag)
        seen["function"], seen["extra"] = function.value, extra
        seen["first"] = ctypes.cast(addresses[0], ctypes.POINTER(ctypes.c_int))[0]
        return status

    monkeypatch.setattr(_launch, "_driver", lambda: SimpleNamespace(cuLaunchKernelEx=launch_kernel))
    _launch._launch_driver(77, (128, 2, 1), (320, 1, 1), [np.int32(9)], 4096, 5, "entry", overlap=True)
    return seen


def test_an_overlapping_launch_asks_for_programmatic_serialization(monkeypatch):
    assert launched(monkeypatch, 0) == {
        "config": [128, 2, 1, 320, 1, 1, 4096, 5],
        "attribute": (1, 6, 1),
        "function": 77,
        "extra": None,
        "first": 9,
    }


def test_a_refused_launch_is_an_error(monkeypatch):
    with pytest.raises(QmambaError, match="entry: the GPU refuses the launch, CUDA driver error 701"):
        launched(monkeypatch, 701)


def test_a_slow_first_use_is_told_once(monkeypatch):
    heard = []
    monkeypatch.setattr("qmamba_cli.progress._LISTENERS", [heard.append])
    monkeypatch.setattr(_launch, "_TOLD", [])
    for seconds in (0.001, 1.0, 2.0):
        _launch._tell_of_compiling(seconds)
    assert len(heard) == 1 and "compiling CUDA kernels" in heard[0]
