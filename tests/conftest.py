"""What has to be set before flatops is imported, and fixtures that several files share."""

from __future__ import annotations

import os
import signal

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton's kernels are imported: they run in its interpreter

from cases import BACKENDS  # noqa: E402

# A shell that runs the tests in the background has SIGINT ignored; some of them interrupt themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Files that take minutes, first: none should be left alone with one process at the end.
LONG = ("test_train_distributed.py", "test_triton.py", "test_benchmarks.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request):
    """Every backend that this machine runs, in turn; flatops uses it, on tensors of its device."""
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
    """One thread: on a busy machine small tensors wait for a second one longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
