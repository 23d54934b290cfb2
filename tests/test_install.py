"""The package as it is shipped: what a user without a compiler reads, what the sdist holds, what info tells."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

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


def test_the_sdist_holds_what_a_build_needs(tmp_path):
    done = run("-c", f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})")
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames() if "/" in name}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout: an unpacked sdist has no list of files to compare with")
    wanted = [
        f for f in tracked if f.startswith(("csrc/", "flatops/", "benchmarks/", "tests/")) or f == "setup.py"
    ]
    assert [f for f in wanted if f not in names] == []


def test_info_tells_what_was_built():
    done = run("-m", "flatops", "info", "--json")
    report = json.loads(done.stdout)
    assert report["core"]["built"] and report["devices"]["cpu"]["backend"] == "cpp"
    assert report["core"]["simd"] in report["core"]["simd_levels"]


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
