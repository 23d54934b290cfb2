"""Which operators backends have, which backend is chosen, and why one cannot be used."""

import sys
import warnings

import pytest
import torch

from flatops import ops
from flatops.backend import _C, _runs_on, choose, why_not
from flatops.schemas import SCHEMAS

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_every_backend_has_the_operators_that_are_declared_and_no_others():
    """The lists besides SCHEMAS: csrc/bindings.h, Triton's kernels, and the public functions."""
    for device in ("CPU", *(["CUDA"] if _C.cuda_archs else [])):
        for name in SCHEMAS:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"flatops::{name}", device), name
    # None is registered without being declared.
    assert not [impl for impl in torch._C._dispatch_find_dangling_impls() if "flatops" in impl]
    assert set(pytest.importorskip("flatops.kernels", exc_type=ImportError).OPERATORS) == set(SCHEMAS)
    functions = {"normal_": "normal", "subtract_noise_": "restore_"}  # differently named
    assert {functions.get(name, name) for name in SCHEMAS} <= set(ops.__all__)


@pytest.fixture
def machine(monkeypatch):
    """Simulates a GPU, the architectures that the core was compiled for, and Triton's version or absence."""
    module = sys.modules["flatops.backend"]  # `flatops.backend` is the context manager of that name

    def pretend(capability: tuple[int, int], archs: list[str], triton: tuple[int, int] | None) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
        monkeypatch.setattr(_C, "cuda_archs", archs)
        monkeypatch.setattr(module, "TRITON", triton)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(module, "_forced", None)
        module._warn.cache_clear()

    return pretend


@pytest.mark.parametrize(
    "code, device, runs",
    [
        ("sm_80", 80, True),
        ("sm_80", 89, True),  # machine code runs on later minor versions
        ("sm_86", 80, False),
        ("sm_80", 90, False),  # but on no other major version
        ("compute_80", 90, True),  # PTX is compiled for any later GPU
        ("compute_120", 90, False),
        ("sm_90a", 90, True),
        ("sm_100a", 103, False),
        ("sm_120", 121, True),
    ],
)
def test_what_runs_where(code, device, runs):
    assert _runs_on(code, device) is runs


def test_cuda_is_chosen_where_it_was_compiled_for_the_device(machine):
    machine((9, 0), ["sm_80", "sm_90"], triton=(3, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(GPU) == "cuda"


def test_triton_is_chosen_where_cuda_was_not_compiled(machine):
    machine((9, 0), [], triton=(3, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(GPU) == "triton"
    with pytest.raises(RuntimeError, match="no nvcc"):
        choose(GPU, "cuda")


def test_an_architecture_that_the_binary_lacks(machine):
    machine((12, 0), ["sm_80", "sm_90"], triton=(3, 6))
    assert choose(GPU) == "triton"
    with pytest.raises(
        RuntimeError, match="compiled for sm_80 sm_90 and a GPU is sm_120: set TORCH_CUDA_ARCH_LIST=12.0"
    ):
        choose(GPU, "cuda")


def test_the_reference_is_chosen_with_one_warning_where_there_is_nothing_else(machine):
    machine((9, 0), [], triton=None)
    with pytest.warns(UserWarning, match="slow reference.*cuda: .*no nvcc.*triton: .*pip install triton"):
        assert choose(GPU) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(GPU) == "reference"


@pytest.mark.parametrize("triton, interpreted, says", [((3, 5), "0", "3.6 or later"), ((3, 6), "1", "unset it")])
def test_a_triton_that_cannot_be_used(machine, monkeypatch, triton, interpreted, says):
    machine((9, 0), [], triton=triton)
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    with pytest.raises(RuntimeError, match=says):
        choose(GPU, "triton")


def test_triton_on_a_cpu_is_for_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET=1" in why_not("triton", CPU)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        ops.filter_norms([torch.ones(3, 3)], backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert why_not("triton", CPU) == ""


def test_the_wrong_device_is_an_error_that_says_what_to_do():
    with pytest.raises(ValueError, match="backend 'cuda' cannot be used: it does not support cpu tensors"):
        ops.filter_norms([torch.ones(3, 3)], backend="cuda")
