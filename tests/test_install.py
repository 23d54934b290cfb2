"""The package as it is shipped: what a user without a compiler reads, what the sdist holds, what info tells."""

import importlib.metadata
import json
import os
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import flatops
from flatops.backend import _C

ROOT = Path(__file__).parent.parent


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_without_a_compiler_the_error_says_what_is_missing(tmp_path):
    done = run("setup.py", "build_ext", "--build-lib", str(tmp_path), CXX="/nowhere/g++")
    assert done.returncode != 0
    assert "no C++ compiler" in done.stderr and "apt-get install g++" in done.stderr


@pytest.fixture
def find_cuda(monkeypatch):
    """setup.py's, on a machine without a toolkit of its own."""
    monkeypatch.setattr("setuptools.setup", lambda **kwargs: None)
    monkeypatch.setattr(sys, "argv", ["setup.py", "--version"])
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    function = runpy.run_path(str(ROOT / "setup.py"))["find_cuda"]
    monkeypatch.setitem(function.__globals__, "DEFAULT_CUDA", "/nowhere")
    return function


def toolkit(path: Path, version: str, header: bool = True) -> Path:
    """A CUDA toolkit as far as finding one goes."""
    (path / "bin").mkdir(parents=True)
    (path / "include").mkdir()
    if header:
        (path / "include/cuda_runtime.h").touch()
    (path / "bin/nvcc").write_text(
        f"#!/bin/sh\necho Cuda compilation tools, release {version}, V{version}.1\n"
    )
    (path / "bin/nvcc").chmod(0o755)
    return path


def test_a_usable_nvcc_is_found(find_cuda, monkeypatch, tmp_path):
    """In CUDA_HOME; or behind an nvcc on PATH that is a link, or a script beside the toolkit."""
    home = toolkit(tmp_path / "cuda", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert find_cuda("13.2") == home
    monkeypatch.delenv("CUDA_HOME")
    assert find_cuda("13.2") is None
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").touch()
    monkeypatch.setattr("shutil.which", lambda name: str(tmp_path / "bin/nvcc"))
    assert find_cuda("13.2") == home


@pytest.mark.parametrize(
    "version, header, wanted, says",
    [
        ("12.4", True, "13.0", "is CUDA 12.4 and torch was built with 13.0"),
        ("13.0", False, "13.0", "no usable nvcc"),
        ("13.0", True, None, "this torch knows no CUDA"),
    ],
)
def test_an_nvcc_that_cannot_be_used_leaves_the_cpu(
    find_cuda, monkeypatch, tmp_path, capsys, version, header, wanted, says
):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda", version, header)))
    assert find_cuda(wanted) is None
    assert says in capsys.readouterr().out


def test_the_sdist_holds_what_a_build_needs(tmp_path):
    done = run("-c", f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})")
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout: an unpacked sdist has no list of files to compare with")
    assert set(tracked) - names <= {".gitignore"}


def test_the_import_brings_in_nothing_but_flatops_itself():
    """torch's own import takes a second; its compiler, DTensor and sympy, which come along easily, take as long again."""
    program = "import sys, torch; before = set(sys.modules); import flatops; print(*set(sys.modules) - before)"
    done = run("-c", program)
    assert done.returncode == 0, done.stderr
    assert {name.split(".")[0] for name in done.stdout.split()} == {"flatops"}


def test_the_version_stands_in_one_place():
    assert importlib.metadata.version("flatops") == flatops.__version__


def test_info_tells_what_was_built():
    done = run("-m", "flatops", "info", "--json")
    report = json.loads(done.stdout)
    assert report["core"]["built"] and report["devices"]["cpu"]["backend"] == "cpp"
    assert report["core"]["simd"] in report["core"]["simd_levels"]
    assert bool(report["core"]["cuda"]) == bool(report["core"]["cuda_archs"])


def test_info_shows_the_cuda_build():
    """Wherever a usable nvcc was, with or without a GPU."""
    done = run("-m", "flatops", "info")
    assert done.returncode == 0
    expected = f"{_C.cuda_version} for {_C.cuda_archs[0]}" if _C.cuda_version else "no usable nvcc"
    assert expected in done.stdout


@pytest.mark.parametrize("level", _C.simd_levels())
def test_flatops_simd_forces_a_level(level):
    assert (
        json.loads(run("-m", "flatops", "info", "--json", FLATOPS_SIMD=level).stdout)["core"]["simd"] == level
    )


@pytest.mark.parametrize("variable, value", [("FLATOPS_SIMD", "mmx"), ("FLATOPS_BACKEND", "metal")])
def test_an_unknown_name_in_the_environment_is_an_error(variable, value):
    done = run("-m", "flatops", "info", **{variable: value})
    assert done.returncode != 0 and value in done.stderr


def test_flatops_backend_chooses():
    done = run("-m", "flatops", "info", "--json", FLATOPS_BACKEND="reference")
    assert json.loads(done.stdout)["devices"]["cpu"]["backend"] == "reference"
