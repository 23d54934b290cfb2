"""What concerns only Triton: its machine code, its interpreter, and the tables that kernels read.

test_ops.py compares bits with the reference, in the interpreter if there is no GPU. Machine code needs no GPU either:
run as a program, this file compiles every kernel for one architecture and prints an analysis.
"""

from __future__ import annotations

import collections
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")  # before what imports it (E402), so that its absence skips this file
import triton.language as tl  # noqa: E402
from cases import assert_same_bits  # noqa: E402

from flatops import kernels, reference  # noqa: E402
from flatops.benchmarks import machine_code  # noqa: E402

tensor_list = kernels.tensor_list
widen, narrow, philox = kernels.arithmetic.widen, kernels.arithmetic.narrow, kernels.philox.philox

DTYPES = ["fp32", "bf16", "fp16", "fp64"]
ARCHITECTURES = [80, 90, 100]
# For every kernel, its largest variant; "noise" is perturb_ with a backup, as RWP calls it.
PERTURB = {"backup": True, "fisher": True}
TOPK = {
    "mask": None,
    "key": None,
    "draw": None,
    "column": 0,
    "place": None,
    "live": True,
    "lowest": False,
    "bits": None,  # as for the dtype
}
DROP = {"column": tensor_list.DROP.value, "place": None, "live": True, "lowest": True, "bits": None}
RANDOM = {"column": None, "place": 0xFFFFFFFF, "live": False, "lowest": False, "bits": 24}
VARIANTS = {
    "perturb": ("perturb", "perturb_kernel", PERTURB),
    "noise": ("perturb", "perturb_kernel", {"backup": True, "fisher": False}),
    "regenerate": ("perturb", "perturb_kernel", {"backup": False, "fisher": True, "sigma": None}),
    "normal": ("perturb", "perturb_kernel", {"backup": False, "fisher": False, "sigma": None, "scales": None}),
    "copy": ("perturb", "copy_kernel", {}),
    "ascend": ("ascend", "ascend_kernel", {"adaptive": True, "backup": True}),
    "sum": ("sum", "sum_kernel", {"product": True, "whole": True}),
    "norms": ("sum", "norms_kernel", {}),
    "fisher": ("fisher", "fisher_kernel", {}),
    "long_norms": ("sum", "long_norms_kernel", {}),
    "long_fisher": ("fisher", "long_fisher_kernel", {}),
    "whole_sums": ("sum", "whole_sums_kernel", {}),
    "whole_norm": ("sum", "whole_norm_kernel", {}),
    "ascend_masked": ("ascend", "ascend_masked_kernel", {"adaptive": True, "width": 8}),
    "restore_masked": ("ascend", "restore_masked_kernel", {"width": 8}),
    "squares": ("fisher", "squares_kernel", {}),
    "histogram": ("mask", "histogram_kernel", TOPK),
    "histogram_drop": ("mask", "histogram_kernel", DROP),
    "histogram_random": ("mask", "histogram_kernel", RANDOM),
    "compare": ("mask", "compare_kernel", TOPK),
    "compare_drop": ("mask", "compare_kernel", DROP),
    "compare_random": ("mask", "compare_kernel", RANDOM),
    "mask": ("mask", "mask_kernel", {"regrow": True}),
}
FOLDS = ["long_norms", "long_fisher", "whole_sums", "whole_norm"]  # these work on float64 sums only
# Compiled for every dtype.
BY_DTYPE = ["perturb", "ascend", "sum", "norms", "fisher", "ascend_masked", "squares", "histogram_drop", "compare_drop"]
CODE = [
    (arch, name, dtype)
    for arch in ARCHITECTURES
    for name in VARIANTS
    for dtype in (DTYPES if arch == 90 and name in BY_DTYPE else ["fp32"])
]
ARGUMENTS = {
    **dict.fromkeys(["tensors", "key", "draw", "state", "result"], "*i64"),
    **dict.fromkeys(["blocks", "folds", "mask", "found"], "*i32"),
    **dict.fromkeys(["scales", "norms"], "*fp32"),
    **dict.fromkeys(["sums", "sigma", "rho", "norm", "scale", "out", "backup"], "*fp64"),
    **dict.fromkeys(["first", "count", "digits"], "i32"),
    **dict.fromkeys(["k", "elements", "size", "slots"], "i64"),
    "eta": "fp32",
    "beta": "fp64",
}


# --- machine code -----------------------------------------------------------------------------------------------------


def build(arch: int, name: str, dtype: str) -> dict:
    """Compiles one variant and analyses its machine code."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, kernel, constants = VARIANTS[name]
    kernel = getattr(getattr(kernels, module), kernel)
    if "dtype" in kernel.arg_names:
        constants = {**constants, "dtype": tl.dtype(dtype)}
    if "bits" in constants and constants["column"] is not None:
        constants["bits"] = {"fp32": 32, "bf16": 16, "fp16": 24, "fp64": 64}[dtype]
    signature = {a: "constexpr" if a in constants else ARGUMENTS[a] for a in kernel.arg_names}
    index = kernel.arg_names.index
    source = ASTSource(
        kernel,
        signature,
        constexprs={(index(a),): value for a, value in constants.items()},
        attrs={(index(a),): [["tt.divisibility", 16]] for a, t in signature.items() if t[0] == "*"},
    )
    options = tensor_list.FOLD_OPTIONS if name in FOLDS else tensor_list.OPTIONS
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"  # as new as Triton's ptxas
        command = [tool, "-res-usage", "-sass", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    [code] = machine_code.parse(listing).values()
    return {
        "blocks": code.warps // options["num_warps"],
        "local memory": code.stack + code.spills,
        "widest": [max(accesses, default=0) for accesses in (code.loads, code.stores)],
        "contracted": sum(i.name == "DFMA" for i in code.code),
        "ptx": sorted(set(re.findall(r"^\s+(?:@!?%p\d+ )?([a-z]+\.[\w.:]+)", compiled.asm["ptx"], re.M))),
    }


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """An analysis of every variant's machine code; one process per architecture."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    processes = [
        subprocess.Popen([sys.executable, __file__, str(arch)], env=environment, stdout=subprocess.PIPE, text=True)
        for arch in ARCHITECTURES
    ]
    found = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes)
    return {tuple(key): value for out in found for key, value in json.loads(out)}


@pytest.mark.parametrize("arch, name, dtype", CODE)
def test_machine_code(arch, name, dtype, compiled):
    """No spills, registers for two blocks (one computes, one waits), only the contract's operations, rounded once."""
    code = compiled[arch, name, dtype]
    assert code["local memory"] == 0 and code["blocks"] >= 2
    floating = {op.replace(".rn", "").removesuffix("x2") for op in code["ptx"] if re.search(r"\.b?f(16|32|64)", op)}
    floating = {op for op in floating if not re.match(r"(ld|st|mov|cvt|setp|selp|neg|abs|min|max|shfl)\.", op)}
    assert floating <= {"fma.f32"} | {f"{op}.f{n}" for op in ("add", "sub", "mul", "div", "sqrt") for n in (32, 64)}
    assert all(".rn" in op for op in code["ptx"] if op.startswith(("div.", "sqrt.", "fma.")) and ".f" in op)
    assert not any(".ftz" in op or ".approx" in op for op in code["ptx"])
    if name not in ("ascend", "ascend_masked", "whole_norm"):  # these divide and take roots in float64, by fma
        assert code["contracted"] == 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "name", ["noise", "perturb", "regenerate", "normal", "copy", "ascend", "sum", "norms", "squares"]
)
def test_accesses_are_128_bits_wide(arch, name, compiled):
    loads, stores = compiled[arch, name, "fp32"]["widest"]
    assert loads >= 128 or name == "normal"
    assert stores >= 128 or name in ("sum", "norms")


# --- the interpreter --------------------------------------------------------------------------------------------------

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled where there is a GPU"
)


@triton.jit
def fma_kernel(a, b, c, out, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out + i, tl.fma(tl.load(a + i), tl.load(b + i), tl.load(c + i)))


@interpreted
def test_fma_rounds_once():
    a, b, c = torch.randn(3, 4096, generator=torch.Generator().manual_seed(0))
    c = torch.where(torch.arange(4096) % 2 == 0, -a * b, c)  # half of the sums cancel
    out = torch.empty(4096)
    fma_kernel[(1,)](a, b, c, out, 4096)
    assert_same_bits(out, reference.fma(a, b, c))
    assert not torch.equal(out, a * b + c)


@triton.jit
def convert_kernel(small, wide, n: tl.constexpr, dtype: tl.constexpr):
    i = tl.arange(0, n)
    x = widen(tl.load(small + i))
    y = tl.load(wide + i)
    tl.store(wide + i, x)
    tl.store(small + i, narrow(y, dtype))


@interpreted
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversions_round_to_the_nearest(dtype):
    """Every 16-bit number to float32; any float32, and those halfway between two 16-bit numbers, back."""
    small = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    bits = torch.randint(-(2**31), 2**31, (2**16,), generator=torch.Generator().manual_seed(0)).int()
    half_way = (small.float().view(torch.int32) + torch.tensor([0x8000, 0x1000]).repeat(2**15)).int()
    for wide in (bits.view(torch.float32), half_way.view(torch.float32)):
        to_wide, to_small = small.float(), wide.to(dtype)
        ours, theirs = small.clone(), wide.clone()
        convert_kernel[(1,)](ours, theirs, 2**16, tensor_list.TYPES[dtype])
        assert_same_bits([theirs, ours], [to_wide, to_small])


@triton.jit
def philox_kernel(counter, key, out):
    c, k = counter.to(tl.pointer_type(tl.uint32)), key.to(tl.pointer_type(tl.uint32))
    x = philox(tl.load(c), tl.load(c + 1), tl.load(c + 2), tl.load(c + 3), tl.load(k), tl.load(k + 1))
    for i in tl.static_range(4):
        tl.store(out + i, x[i].to(tl.int32, bitcast=True))


@interpreted
@pytest.mark.parametrize(
    "counter, key, words",
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    counter, key, words = (torch.tensor(x).to(torch.int32) for x in (counter, key, words))
    out = torch.empty(4, dtype=torch.int32)
    philox_kernel[(1,)](counter, key, out)
    assert torch.equal(out, words)


@interpreted
@pytest.mark.parametrize("count", [0, 1, 129, 1024, 1025, 2**20 + 1])
def test_total_of_any_number_of_sums(count):
    """Up to the third level of the rule, which only tensors of more than 2^30 weights reach."""
    sums = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = torch.empty((), dtype=torch.float64)
    kernels.sum.whole_norm_kernel[(1,)](sums, count, out)
    assert out.item() == math.sqrt(reference.total(sums).item())


# --- blocks and tables ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["all", "long", "whole"])
def test_blocks_cover_every_element_once(kind):
    """Row by row as kernels divide them, with the sizes of this process, compiled or interpreted."""
    rows, reduce, tile = (getattr(tensor_list, n).value for n in ("ROWS", "REDUCE", "TILE"))
    sizes = [(), (0, 4), (7,), (3 * rows, 5), (2, tile), (3, tile + 1), (2 * tile + 3,), (5, 3 * reduce)]
    shapes = tensor_list.Shapes([torch.Size(s) for s in sizes], [torch.float32, torch.float64] * 4)
    cut = shapes.cut(kind)
    seen = [torch.zeros(torch.Size(s).numel(), dtype=torch.int32) for s in sizes]
    sums = torch.zeros(len(cut.blocks) * rows, dtype=torch.int64)
    for dtype, first, count in cut.launches:
        for number in range(first, first + count):
            tensor, filter, start, shift = cut.blocks[number].tolist()
            assert shapes.dtypes[tensor] == dtype
            filters, length = shapes.filters[tensor], shapes.lengths[tensor]
            if kind == "whole":
                filters, length = 1, filters * length
            for row in range(rows):
                begin = start * reduce + (row & ((1 << shift) - 1)) * reduce
                n = max(0, min(reduce, length - begin))
                if filter + (row >> shift) < filters:
                    begin += (filter + (row >> shift)) * length
                    seen[tensor][begin : begin + n] += 1
                    sums[number * rows + row] = n
    for t, length in zip(seen, shapes.lengths):
        assert (t == (1 if kind != "long" or length > tile else 0)).all()
    for tensor, filter, first, count in cut.folds.tolist():
        length = shapes.lengths[tensor] * (shapes.filters[tensor] if kind == "whole" else 1)
        assert sums[first : first + count].sum() == length


def test_tables_are_made_once_and_bounded():
    params = [torch.randn(3, 4), torch.randn(5)]
    first = tensor_list.TensorList(params).table
    assert tensor_list.TensorList(params).table is first
    assert tensor_list.TensorList(params[::-1]).table is not first
    assert tensor_list.TensorList(params, first_row=[2, 0]).table is not first
    for i in range(300):
        tensor_list.TensorList(params, index=[i, i + 1])
    assert len(tensor_list._tables) <= 256


def test_weights_that_share_memory_are_refused():
    w = torch.randn(10)
    with pytest.raises(ValueError, match=r"params\[1\] and params\[0\] share memory"):
        tensor_list.TensorList([w[4:], w[:5]], changed=True)
    tensor_list.TensorList([w[5:], w[:5]], changed=True)


@interpreted
def test_versions_increase_where_something_changes():
    """Even if unusual layouts are copied: the gradient's copy is not written back."""
    params, grads, backup = ([torch.ones(6, 4).t()] for _ in range(3))
    rho, norm = torch.tensor(0.5, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    kernels.ascend.ascend_(params, grads, backup, None, rho, norm, False)
    assert (params[0] == 1.25).all() and (backup[0] == 1).all()
    assert (params[0]._version > 0, backup[0]._version > 0, grads[0]._version) == (True, True, 0)
    version = backup[0]._version
    kernels.perturb.restore_(params, backup, None)
    assert (params[0] == 1).all() and backup[0]._version == version


@interpreted
def test_versions_increase_where_masks_change():
    params, fisher = [torch.ones(40)], [torch.zeros(40)]
    kernels.fisher.fisher_(fisher, params, torch.tensor(2.0, dtype=torch.float64))
    mask, bad = kernels.mask.topk_mask(fisher, 3)
    assert mask.tolist() == [7, 0, 0] and bad == -1 and fisher[0]._version > 0
    version, key = mask._version, torch.tensor(1)
    kernels.mask.regrow_mask_(mask, params, params, params, key, key, [0], 2)
    assert mask.tolist() == [0b11100, 0, 0] and mask._version > version and params[0]._version == 0


# --- masks ------------------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("dtype", tensor_list.TYPES, ids=str)
def test_topk_with_the_digits_of_a_gpu(dtype, monkeypatch):
    """The interpreter uses larger ones, and more elements at a time."""
    sizes = {"DIGIT": 8, "BINS": 256, "STATE": 258, "SPAN": 256}
    for name, value in sizes.items():
        monkeypatch.setattr(kernels.mask, name, tl.constexpr(value))
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(n, generator=generator).to(dtype) for n in (700, 0, 1500)]
    mask, bad = kernels.mask.topk_mask([p.abs() for p in params], 900)
    assert_same_bits([mask, bad], list(reference.topk_mask([p.abs() for p in params], 900)))
    key, draw, index = torch.tensor(2**40 + 17), torch.tensor(5), [3, 4, 5]
    for drop, grow in ((params, []), ([], params)):
        ours, theirs = mask.clone(), mask.clone()
        for function, changed in ((kernels.mask.regrow_mask_, ours), (reference.regrow_mask_, theirs)):
            function(changed, params, drop, grow, key, draw, index, 300)
        assert_same_bits(ours, theirs)


@interpreted
def test_backups_with_too_few_slots_are_not_overrun():
    """Weights without a slot do not change, and all others are restored."""
    params, norm = [torch.randn(5000)], torch.tensor(1.0, dtype=torch.float64)
    before = params[0].clone()
    mask, _ = kernels.mask.topk_mask([before.abs()], 2500)
    room = torch.full((1300,), 7.0)
    backup = [room[:1200]]
    kernels.ascend.ascend_(params, params, backup, mask, norm, norm, False)
    changed = params[0] != before
    assert changed[:2048].sum() == mask[-3] <= 1200 and not changed[3 * 1024 :].any()
    assert (room[1200:] == 7).all()
    kernels.perturb.restore_(params, backup, mask)
    assert_same_bits(params[0], before)


class Stream:
    """As much of a CUDA stream as tables need."""

    waits = 0

    def record_event(self):
        return self

    def wait_event(self, event):
        self.waits += 1


def test_tables_on_a_gpu(monkeypatch):
    """Filled once without a host sync, and awaited by other streams; tables that a graph reads are never freed."""
    streams, capturing, recorded = [Stream(), Stream()], [False], []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr(torch.Tensor, "to", lambda t, device, non_blocking: t.clone())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, stream: recorded.append(stream))
    monkeypatch.setattr(tensor_list, "_tables", collections.OrderedDict())
    monkeypatch.setattr(tensor_list, "_graphs_read", [])
    monkeypatch.setattr(tensor_list, "_reserve", torch.zeros(6, dtype=torch.int64))

    def table(key, *values):
        return tensor_list._on_device(key, lambda: torch.tensor(values), torch.device("cuda", 0))

    a = table("a", 1, 2)
    assert table("a") is a and a.tolist() == [1, 2]
    streams.reverse()
    assert table("a") is a and streams[0].waits == 1 and recorded == [streams[0]]

    capturing[0] = True
    assert table("a") is a and tensor_list._graphs_read[0] is a
    assert table("b", 3, 4).tolist() == [3, 4] and table("b", 5, 6).tolist() == [5, 6]
    assert table("c", *range(9)).tolist() == list(range(9))  # more than was reserved
    assert [t.tolist() for t in tensor_list._graphs_read[1:]] == [[3, 4], [5, 6], list(range(9))]
    assert list(tensor_list._tables) == ["a"]


if __name__ == "__main__":
    arch = int(sys.argv[1])
    print(json.dumps([(key, build(*key)) for key in CODE if key[0] == arch]))
