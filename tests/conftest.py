"""Settings that have to precede the import of flatops, and fixtures shared by several files."""

from __future__ import annotations

import os
import random
import signal
import sys
import zlib

import numpy
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # set before Triton's kernels are imported: they then run in its interpreter

from cases import BACKENDS

from flatops.backend import _C

# A shell that runs the tests in the background ignores SIGINT, but some tests interrupt themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Files that take minutes run first, in any order: none should be left to one process at the end.
LONG = ("test_ops.py", "test_train_distributed.py", "test_triton.py", "test_benchmarks.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def seed(item):
    """Seeds from the run's seed, which pytest prints, and the test's name, independent of what ran before."""
    own = zlib.crc32(f"{item.config.getoption('randomly_seed', 0)} {item.nodeid}".encode())
    for generator in (random.seed, numpy.random.seed, torch.manual_seed):
        generator(own)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    seed(item)


def pytest_runtest_call(item):
    seed(item)  # again: the first test of a file runs shared fixtures


def state():
    """State that a test could leave changed for others."""
    return {
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "process group": torch.distributed.is_initialized(),
        "backend": sys.modules["flatops.backend"]._forced,  # `flatops.backend` is the context manager of that name
        "SIMD": _C.simd(),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)],
        "folder": os.getcwd(),
        # Libraries set these when they are imported; a test cannot undo that.
        "environment": {
            k: v
            for k, v in os.environ.items()
            if k.startswith(("FLATOPS", "TRITON", "CUDA", "MASTER", "RANK", "WORLD"))
        },
    }


@pytest.fixture(autouse=True)
def nothing_is_left():
    before = state()
    yield
    assert state() == before


@pytest.fixture(autouse=True)
def one_default_seed(monkeypatch):
    """Optimizers without a seed draw the same noise, so tests can compare two. Tests of the default undo this."""
    monkeypatch.setattr("flatops.optim.groups._default_seed", lambda: 0)


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request):
    """Every backend that this machine runs, in turn; flatops uses it on tensors of its device."""
    with request.param.forced():
        yield request.param


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    """Several thread counts, in turn."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def one_thread():
    """One thread: on a busy machine, waiting for a second one takes longer than small tensors take to compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
