"""Kernels compiled side by side into CuPy's cache."""

import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from qmamba_cli.kernels import _cache, _compile

INSTANCES = [(source, names[0]) for source, names in _compile.entries("sm_90").values()]


def test_what_does_not_compile_here_is_left_to_its_first_launch(monkeypatch):
    # A stand-in for CuPy, so that no GPU is needed.
    class CompileError(Exception):
        pass

    compiler = SimpleNamespace(CompileException=CompileError)
    cuda = SimpleNamespace(Device=lambda _index: nullcontext(), compiler=compiler)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    failures = iter([RuntimeError("no GPU"), CompileError("no such instruction"), None])

    def instance(source, entry):
        failure = next(failures)
        if failure is not None:
            raise failure

    monkeypatch.setattr(_cache, "instance", instance)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    counted = []
    assert _cache.fill(INSTANCES[:3], 0, counted.append) == 1
    assert counted == [1, 1, 1]


def test_the_longest_instance_comes_first(monkeypatch):
    seen = []
    monkeypatch.setattr(_cache, "_compile", lambda pair, _device: seen.append(pair[0]) or True)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert _cache.fill(INSTANCES, 0, lambda _done: None) == len(INSTANCES)
    assert sorted(seen) == sorted(source for source, _ in INSTANCES)
    # One of the first two, which start together.
    assert "linear/linear_wide.cu" in seen[:2]


def test_one_processor_compiles_when_it_launches(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert _cache.fill(INSTANCES, 0, lambda _done: pytest.fail("nothing is compiled")) == 0


@pytest.mark.gpu
def test_threads_fill_the_cache_that_launches_read(tmp_path):
    code = (
        "from qmamba_cli.kernels import _cache, _compile\n"
        "work = [(source, names[0]) for source, names in _compile.entries('sm_90').values()]\n"
        "if __name__ == '__main__':\n"
        "    print(_cache.fill(work, 0, lambda _done: None))\n"
        "    import cupy\n"
        "    from qmamba_cli.kernels import _launch\n"
        "    cupy.zeros(1)\n"
        "    for pair in work:\n"
        "        _launch._kernel(*pair, 0)\n"
        "    print(len(_launch._TOLD))\n"
    )
    script = tmp_path / "fill.py"
    script.write_text(code)
    env = {**os.environ, "CUPY_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, check=True)
    # Every instance was filled, and none of the launches' own compilations took long enough to be told of.
    assert done.stdout.split() == [str(len(INSTANCES)), "0"], done.stderr


@pytest.mark.parametrize("writable", [True, False])
def test_a_special_target_s_machine_code_is_compiled_once(tmp_path, monkeypatch, writable):
    compiled = []

    def machine_code(source, names, target):
        compiled.append((source, tuple(names), target))
        return b"\x7fELF", {name: "mangled" for name in names}

    monkeypatch.setattr(_cache, "machine_code", machine_code)
    monkeypatch.setattr(_cache, "require_nvrtc", lambda: SimpleNamespace(getVersion=lambda: (13, 0)))
    source, entry = "linear/linear_wide.cu", "linear_wide<256, false>"
    # Below a file there is no folder, for root neither.
    (tmp_path / "file").touch()
    folder = tmp_path / ("cache" if writable else "file") / "deep"
    found = [_cache._special(folder, source, entry, "sm_90a") for _ in range(2)]
    assert [(path.read_bytes(), name) for path, name in found] == [(b"\x7fELF", "mangled")] * 2
    assert compiled == [(source, (entry,), "sm_90a")] * (1 if writable else 2)
    assert found[0][0].is_relative_to(folder) == writable
