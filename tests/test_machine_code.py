"""Requirements on the CUDA kernels' machine code: registers, no spills, 128-bit accesses, nothing approximate."""

import functools
import re

import pytest

from flatops.backend import _C
from flatops.benchmarks import machine_code

if not _C.cuda_archs:
    pytest.skip("the core was built without CUDA: there was no usable nvcc", allow_module_level=True)

ARCHS = [arch for arch in _C.cuda_archs if arch.startswith("sm_")]
FLOAT32 = r"perturbIf|ascendIf|4copyIf|filter_sumsIf|part_sumsIf"


read = functools.cache(machine_code.kernels)  # called for the architectures in any order


@pytest.fixture(params=ARCHS)
def kernels(request):
    """The kernels compiled for one architecture, by name."""
    return read(_C.__file__, request.param)


def test_every_operator_has_its_kernel(kernels):
    for operator, pattern, *_ in machine_code.OPERATORS:
        assert sum(bool(re.search(pattern, name)) for name in kernels) == 1, operator


def test_nothing_is_spilled(kernels):
    assert {name: kernel.spills for name, kernel in kernels.items() if kernel.spills or kernel.stack} == {}


def test_registers_leave_room_for_the_requested_blocks(kernels):
    """As many blocks of 256 threads as csrc/cuda requests by __launch_bounds__ are resident."""
    for name, kernel in kernels.items():
        blocks = 3 if re.search(r"perturbIf", name) else 4 if "mark_candidates" in name else 1
        assert kernel.warps >= 8 * blocks, name


def test_weights_and_gradients_move_128_bits_at_once(kernels):
    """On the path of whole, aligned tiles, with 16 weights or more per thread; other reads are scalars, one a block."""
    for name, kernel in kernels.items():
        if re.search(FLOAT32, name):
            path = kernel.path(machine_code.SEARCH)
            loads, stores = (
                sum(n for i, n in path.items() if i.name == access and i.bits == 128) for access in ("LDG", "STG")
            )
            narrow = sum(n for i, n in path.items() if i.name in ("LDG", "STG") and i.bits < 128)
            assert loads + stores >= 8 and narrow < 16, name


def test_nothing_is_approximate(kernels):
    """Bits would differ from a CPU's. Approximate reciprocals and roots may only start correctly rounded operations."""
    for name, kernel in kernels.items():
        assert not any(re.match(r"MUFU\.(LG2|EX2|SIN|COS|SQRT|TANH)", opcode) for opcode in kernel.instructions), name


@pytest.mark.skipif("sm_90" not in ARCHS, reason="needs machine code for an H100: TORCH_CUDA_ARCH_LIST=9.0")
def test_an_h100_is_memory_bound():
    """In the model of docs/performance.md, bytes take longer than instructions in everything that moves weights."""
    kernels = machine_code.kernels(_C.__file__, "sm_90")
    weights = machine_code.MODELS["ResNet-50"]
    for operator, pattern, elements, bytes_per_weight in machine_code.OPERATORS:
        kernel = next(k for name, k in kernels.items() if re.search(pattern, name))
        pipes = machine_code.by_pipe(kernel.path(machine_code.SEARCH), elements)
        prediction = machine_code.predict(pipes, bytes_per_weight, weights)
        if operator != "normals alone":
            assert prediction.arithmetic < prediction.memory, operator
