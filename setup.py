"""Builds flatops' compiled core against the torch that is already installed, or against the newest one where there is none."""

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

# Under build isolation the environment's own packages are out of sight. Building against a second torch would give a
# binary that the first cannot load, so look for the one that is there before asking for another.
if importlib.util.find_spec("torch") is None:
    sys.path.append(sysconfig.get_paths()["purelib"])
HAS_TORCH = importlib.util.find_spec("torch") is not None

SOURCES = ["csrc/bindings.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))]
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.h"))


def compiled_core() -> dict:
    """The extension module and how to build it."""
    from torch.utils import cpp_extension

    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        sys.exit(
            f"flatops: no C++ compiler: '{compiler}' is not on PATH. Install one that knows C++20 "
            "(Debian: apt-get install g++; macOS: xcode-select --install) or point the variable CXX at it."
        )
    # Contraction would change the noise's bits; the rest only lets loops vectorise. at::parallel_for needs OpenMP
    # in the extension itself, or it runs on one thread without a word; torch's own pool is the one it then joins.
    flags = [
        "-O3",
        "-g0",
        "-std=c++20",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fvisibility=hidden",
    ]
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    return {
        "ext_modules": [
            cpp_extension.CppExtension(
                "flatops._C",
                SOURCES,
                include_dirs=[str(Path("csrc").absolute())],
                depends=HEADERS,
                extra_compile_args=flags + openmp,
                extra_link_args=openmp,
            )
        ],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension},
    }


wants_core = any(
    command in sys.argv for command in ("bdist_wheel", "build_ext", "develop", "editable_wheel", "install")
)
setup(
    packages=["flatops", "flatops.optim", "flatops.train", "flatops.benchmarks", "flatops.kernels"],
    package_dir={"flatops": "flatops", "flatops.benchmarks": "benchmarks", "flatops.kernels": "kernels"},
    setup_requires=[] if HAS_TORCH else ["torch>=2.10"],
    **(compiled_core() if HAS_TORCH and wants_core else {}),
)
