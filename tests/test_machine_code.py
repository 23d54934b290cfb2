"""What the CUDA kernels' machine code has to show with any compiler: no spills, 128-bit accesses, nothing approximate, room for the blocks that
are to be resident. How many registers and instructions it takes is said in docs/performance.md."""

import functools
import re

import pytest

from flatops.backend import _C
from flatops.benchmarks import machine_code

if not _C.cuda_archs:
    pytest.skip("the core was built without CUDA: there was no usable nvcc", allow_module_level=True)

ARCHS = [arch for arch in _C.cuda_archs if arch.startswith("sm_")]
FLOAT32 = r"perturbIf|ascendIf|4copyIf|filter_sumsIf|part_sumsIf"


read = functools.cache(machine_code.kernels)  # for architectures in any order


@pytest.fixture(params=ARCHS)
def kernels(request):
    """The kernels compiled for one architecture, by name."""
    return read(_C.__file__, request.param)


def test_every_operator_has_its_kernel(kernels):
    for operator, pattern, *_ in machine_code.OPERATORS:
        assert sum(bool(re.search(pattern, name)) for name in kernels) == 1, operator


def test_nothing_is_spilled(kernels):
    assert {name: kernel.spills for name, kernel in kernels.items() if kernel.spills or kernel.stack} == {}


def test_registers_leave_room_for_the_blocks_that_are_to_be_resident(kernels):
    """As many as csrc/cuda asks for by __launch_bounds__, of 256 threads."""
    for name, kernel in kernels.items():
        blocks = 3 if re.search(r"perturbIf", name) else 4 if "mark_candidates" in name else 1
        assert kernel.warps >= 8 * blocks, name


def test_weights_and_gradients_move_128_bits_at_once(kernels):
    """On the path of whole, aligned tiles, where 16 or more weights a thread are read or written; what else is read are numbers, one a block."""
    for name, kernel in kernels.items():
        if re.search(FLOAT32, name):
            path = kernel.path(machine_code.SEARCH)
            loads, stores = (
                sum(n for i, n in path.items() if i.name == access and i.bits == 128) for access in ("LDG", "STG")
            )
            narrow = sum(n for i, n in path.items() if i.name in ("LDG", "STG") and i.bits < 128)
            assert loads + stores >= 8 and narrow < 16, name


def test_nothing_is_approximate(kernels):
    """Bits would differ from a CPU's. Reciprocals and inverse roots are where correctly rounded divisions and roots begin."""
    for name, kernel in kernels.items():
        assert not any(re.match(r"MUFU\.(LG2|EX2|SIN|COS|SQRT|TANH)", opcode) for opcode in kernel.instructions), name


@pytest.mark.skipif("sm_90" not in ARCHS, reason="the model is of an H100, and TORCH_CUDA_ARCH_LIST left it out")
def test_memory_and_not_arithmetic_bounds_an_h100():
    """By the model in docs/performance.md: bytes take longer than instructions in all that moves weights."""
    kernels = machine_code.kernels(_C.__file__, "sm_90")
    weights = machine_code.MODELS["ResNet-50"]
    for operator, pattern, elements, bytes_per_weight in machine_code.OPERATORS:
        kernel = next(k for name, k in kernels.items() if re.search(pattern, name))
        pipes = machine_code.by_pipe(kernel.path(machine_code.SEARCH), elements)
        prediction = machine_code.predict(pipes, bytes_per_weight, weights)
        if operator != "normals alone":
            assert prediction.arithmetic < prediction.memory, operator
