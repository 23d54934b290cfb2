"""Builds flatops' compiled core against the installed torch, or the newest one if none is installed."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

# A binary built against another torch cannot be loaded. pip's build isolation hides this interpreter's packages by
# environment variables: without these it tells where its torch is. (uv's build isolation uses another interpreter.)
if importlib.util.find_spec("torch") is None:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    find = "import importlib.util as util; torch = util.find_spec('torch'); print(torch.origin if torch else '')"
    found = subprocess.run(
        [sys.executable, "-c", find], cwd="/", env=environment, capture_output=True, text=True, check=True
    )
    if found.stdout.strip():
        sys.path.append(str(Path(found.stdout.strip()).parent.parent))
HAS_TORCH = importlib.util.find_spec("torch") is not None
OLDEST = (2, 10)  # as in pyproject.toml

SOURCES = ["csrc/bindings.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))]
CUDA_SOURCES = sorted(str(path) for path in Path("csrc/cuda").glob("*.cu"))
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.h"))
DEFAULT_CUDA = "/usr/local/cuda"
ARCHITECTURES = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]  # one binary runs on later minor versions too


def find_cuda(wanted: str | None) -> Path | None:
    """A CUDA toolkit that can compile for a torch built with CUDA `wanted`; None, and a message, if there is none."""
    if wanted is None:
        print("flatops: this torch was built without CUDA: building for the CPU only")
        return None
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), DEFAULT_CUDA]
    if nvcc:  # /usr/local/bin/nvcc may be a link, or a script that calls /usr/local/cuda/bin/nvcc
        homes += [Path(nvcc).resolve().parent.parent, Path(nvcc).parent.parent, Path(nvcc).parent.parent / "cuda"]
    for home in map(Path, filter(None, homes)):
        if not ((home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists()):
            continue
        version = nvcc_says(home, "--version", r"release (\d+\.\d+)")[0]
        if version.split(".")[0] == wanted.split(".")[0]:
            return home
        print(f"flatops: {home} is CUDA {version} and torch was built with {wanted}: not used")
    print("flatops: no usable nvcc: building for the CPU only")
    return None


def nvcc_says(home: Path, option: str, pattern: str) -> list[str]:
    """The matches of a pattern in nvcc's output."""
    done = subprocess.run([home / "bin/nvcc", option], capture_output=True, text=True, check=True)
    return re.findall(pattern, done.stdout)


def compiled_core() -> dict:
    """The extension module and how to build it, as arguments of setup()."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        sys.exit(
            f"flatops: no C++ compiler: '{compiler}' is not on PATH. Install one with C++20 "
            "(Debian: apt-get install g++; macOS: xcode-select --install) or set the variable CXX to it."
        )
    import torch

    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < OLDEST:
        needed = ".".join(map(str, OLDEST))
        sys.exit(
            f"flatops: this is torch {torch.__version__}, and {needed} or later is needed: run pip install --upgrade "
            f"'torch>={needed}', then install flatops again"
        )
    cuda = find_cuda(torch.version.cuda)
    if cuda:  # set before cpp_extension is imported, which otherwise guesses
        os.environ["CUDA_HOME"] = str(cuda)
        known = nvcc_says(cuda, "--list-gpu-code", r"sm_(\d+)")
        ours = [a for a in ARCHITECTURES if a.replace(".", "") in known]
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(ours) + "+PTX")
    from torch.utils import cpp_extension

    # Contraction would change the noise's bits; the math flags only let loops vectorise. Without OpenMP in the
    # extension, at::parallel_for silently runs on one thread; with it, it uses torch's thread pool.
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    exact = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    flags = {
        "cxx": ["-O3", "-g0", "-std=c++20", *exact, "-fvisibility=hidden", *openmp],
        "nvcc": ["-O3", "-std=c++20", "-fmad=false", "-Xfatbin=-compress-all", "-Xcompiler=-fvisibility=hidden"],
    }
    how = {"sources": SOURCES, "include_dirs": [str(Path("csrc").absolute())], "extra_link_args": openmp}
    if cuda:
        codes = sorted(re.search(r",code=(\w+)", flag)[1] for flag in cpp_extension._get_cuda_arch_flags())
        version = nvcc_says(cuda, "--version", r"release (\d+\.\d+)")[0]
        names = ",".join(f'"{code}"' for code in codes)
        flags["cxx"] += [f'-DFLATOPS_CUDA="{version}"', f"-DFLATOPS_CUDA_ARCHS={names}"]
        how["sources"] = SOURCES + CUDA_SOURCES
        how["include_dirs"] += [str(cuda / "include")]
        how["library_dirs"] = [str(cuda / "lib64"), str(cuda / "lib")]
        # CUDA's runtime is linked statically: it need not be the version in torch, since both only share the driver.
        how["libraries"] = ["c10_cuda"]
        how["extra_link_args"] = [*openmp, "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    extension = cpp_extension.CppExtension("flatops._C", depends=HEADERS, extra_compile_args=flags, **how)
    # Objects compiled against another torch must not be reused, even if no source or option has changed.
    options = {"build": {"build_base": f"build/torch-{torch.__version__}"}, "build_ext": {"force": True}}
    return {"ext_modules": [extension], "cmdclass": {"build_ext": cpp_extension.BuildExtension}, "options": options}


wants_core = any(
    command in sys.argv for command in ("bdist_wheel", "build_ext", "develop", "editable_wheel", "install")
)
setup(
    packages=[
        *("flatops", "flatops.benchmarks", "flatops.integrations", "flatops.kernels", "flatops.landscape"),
        *("flatops.optim", "flatops.train", "flatops.train.datasets", "flatops.train.presets"),
    ],
    package_data={
        "flatops": ["py.typed"],
        "flatops.train.presets": ["*.toml"],
        "flatops.benchmarks": ["results/tuning.json"],
    },
    package_dir={"flatops": "flatops", "flatops.benchmarks": "benchmarks", "flatops.kernels": "kernels"},
    setup_requires=[] if HAS_TORCH else ["torch>=" + ".".join(map(str, OLDEST))],
    **(compiled_core() if HAS_TORCH and wants_core else {}),
)
