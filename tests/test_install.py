"""The package as shipped: errors without a compiler, contents of the sdist, output of info."""

import importlib.metadata
import json
import os
import re
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import flatops
from flatops.backend import _C

ROOT = Path(__file__).parent.parent


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_without_a_compiler_the_error_names_what_is_missing(tmp_path):
    done = run("setup.py", "build_ext", "--build-lib", str(tmp_path), CXX="/nowhere/g++")
    assert done.returncode != 0
    assert "no C++ compiler" in done.stderr and "apt-get install g++" in done.stderr


@pytest.fixture
def setup(monkeypatch):
    """The arguments that setup.py passes to setuptools for a command, and its functions."""

    def setup(command: str) -> tuple[dict, dict]:
        handed = {}
        monkeypatch.setattr("setuptools.setup", lambda **kwargs: handed.update(kwargs))
        monkeypatch.setattr(sys, "argv", ["setup.py", command])
        monkeypatch.chdir(ROOT)
        return handed, runpy.run_path("setup.py")

    return setup


@pytest.fixture
def find_cuda(setup, monkeypatch):
    """setup.py's find_cuda, on a machine without a toolkit."""
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    function = setup("--version")[1]["find_cuda"]
    monkeypatch.setitem(function.__globals__, "DEFAULT_CUDA", "/nowhere")
    return function


def toolkit(path: Path, version: str, header: bool = True) -> Path:
    """As much of a CUDA toolkit as is needed to find one."""
    (path / "bin").mkdir(parents=True)
    (path / "include").mkdir()
    if header:
        (path / "include/cuda_runtime.h").touch()
    (path / "bin/nvcc").write_text(f"#!/bin/sh\necho Cuda compilation tools, release {version}, V{version}.1\n")
    (path / "bin/nvcc").chmod(0o755)
    return path


def test_a_usable_nvcc_is_found(find_cuda, monkeypatch, tmp_path):
    """In CUDA_HOME, or through an nvcc on PATH that is a link, or a script next to the toolkit."""
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
        ("13.0", True, None, "this torch was built without CUDA"),
    ],
)
def test_without_a_usable_nvcc_only_the_cpu_is_built(
    find_cuda, monkeypatch, tmp_path, capsys, version, header, wanted, says
):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda", version, header)))
    assert find_cuda(wanted) is None
    assert says in capsys.readouterr().out


def test_each_torch_has_its_own_build(setup, monkeypatch):
    """After an upgrade of torch nothing compiled for the old one is found: ninja would consider it up to date."""
    monkeypatch.setenv("CUDA_HOME", os.environ.get("CUDA_HOME", ""))  # which the command sets, and TORCH_CUDA_ARCH_LIST
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    options, _ = setup("build_ext")
    assert options["options"]["build"]["build_base"] == f"build/torch-{torch.__version__}"
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    other, _ = setup("build_ext")
    assert other["options"]["build"]["build_base"] == "build/torch-2.99.0"


def test_a_torch_that_is_too_old_is_refused_before_anything_is_built(setup, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(SystemExit, match=r"this is torch 2\.9\.1\+cpu, and 2\.10 or later is needed"):
        setup("bdist_wheel")
    assert "ext_modules" not in setup("sdist")[0]  # which needs no torch


def test_the_oldest_torch_is_the_same_everywhere(setup):
    oldest = ".".join(map(str, setup("sdist")[1]["OLDEST"]))
    for file in ("pyproject.toml", "Makefile", "README.md"):
        found = re.findall(r"torch>=([\d.]+)|installed \(([\d.]+) or later\)", (ROOT / file).read_text())
        assert {"".join(each) for each in found} == {oldest}, file


def test_pips_isolation_does_not_hide_the_torch_that_is_installed(tmp_path):
    """Isolated as by pip: a PYTHONPATH whose sitecustomize removes the interpreter's own packages."""
    (tmp_path / "sitecustomize.py").write_text(
        "import site, sys\nsys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
    )
    program = (
        "import runpy, sys, types; setup = lambda **kwargs: print(kwargs['setup_requires']); "
        "sys.modules['setuptools'] = types.SimpleNamespace(setup=setup); "
        "assert not any('site-packages' in p for p in sys.path); runpy.run_path('setup.py')"
    )
    done = run("-c", program, PYTHONPATH=str(tmp_path), PYTHONNOUSERSITE="1")
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


@pytest.mark.parametrize(
    "core",
    ["raise ImportError('_C.so: undefined symbol: _ZN3c10')", "return types.SimpleNamespace(torch_version='2.1.0')"],
    ids=["another minor version", "an older one"],
)
def test_a_core_for_another_torch_says_how_to_build_it_for_this_one(core):
    """Without isolation, where uv would again build for the newest torch, and without pip's cache."""
    program = f"""
import importlib, torch, types
def other(name, real=importlib.import_module):
    if name == "flatops._C":
        {core}
    return real(name)
importlib.import_module = other
import flatops
flatops.ops.filter_norms([torch.ones(3, 3)])
"""
    done = run("-c", program)
    assert "reinstall flatops with --no-build-isolation --no-cache-dir --force-reinstall" in done.stderr
    assert ("slow reference" in done.stderr) == ("symbol" in core) == (done.returncode == 0)


def test_the_sdist_holds_what_a_build_needs(tmp_path):
    done = run("-c", f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})")
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout: an unpacked sdist has no list of files to compare with")
    assert set(tracked) - names <= {".gitignore", ".git-blame-ignore-revs"}


def test_the_import_adds_nothing_but_flatops_itself():
    """torch's own import takes a second; its compiler, DTensor and sympy, easily imported too, take as long again."""
    program = "import sys, torch; before = set(sys.modules); import flatops; print(*set(sys.modules) - before)"
    done = run("-c", program)
    assert done.returncode == 0, done.stderr
    assert {name.split(".")[0] for name in done.stdout.split()} == {"flatops"}


def test_the_version_is_defined_in_one_place():
    assert importlib.metadata.version("flatops") == flatops.__version__


def test_info_shows_what_was_built():
    done = run("-m", "flatops", "info", "--json")
    report = json.loads(done.stdout)
    assert report["core"]["built"] and report["devices"]["cpu"]["backend"] == "cpp"
    assert report["core"]["simd"] in report["core"]["simd_levels"]
    assert bool(report["core"]["cuda"]) == bool(report["core"]["cuda_archs"])


def test_info_shows_the_cuda_build():
    """Wherever a usable nvcc was found, with or without a GPU."""
    done = run("-m", "flatops", "info")
    assert done.returncode == 0
    expected = f"{_C.cuda_version} for {_C.cuda_archs[0]}" if _C.cuda_version else "no usable nvcc"
    assert expected in done.stdout


@pytest.mark.parametrize("level", _C.simd_levels())
def test_flatops_simd_forces_a_level(level):
    assert json.loads(run("-m", "flatops", "info", "--json", FLATOPS_SIMD=level).stdout)["core"]["simd"] == level


@pytest.mark.parametrize("variable, value", [("FLATOPS_SIMD", "mmx"), ("FLATOPS_BACKEND", "metal")])
def test_an_unknown_name_in_the_environment_is_an_error(variable, value):
    done = run("-m", "flatops", "info", **{variable: value})
    assert done.returncode != 0 and value in done.stderr


def test_flatops_backend_chooses():
    done = run("-m", "flatops", "info", "--json", FLATOPS_BACKEND="reference")
    assert json.loads(done.stdout)["devices"]["cpu"]["backend"] == "reference"
