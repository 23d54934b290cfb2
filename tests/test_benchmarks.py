"""The benchmarks' measurements: counts, machine code, and a rehearsal on the CPU of what runs on a GPU."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from flatops.benchmarks import bench, bench_gpu, machine_code, measure

ROOT = Path(__file__).parent.parent


# --- times and counts -------------------------------------------------------------------------------------------------


def test_contenders_run_in_turn_and_the_first_round_does_not_count():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    assert measure.in_turn(contenders, rounds=2) == {"a": [3, 5], "b": [4, 6]}
    assert calls == list("ababab")


def test_quantiles():
    assert measure.quantile([4.0, 1.0, 2.0, 3.0, 5.0], 0.5) == 3.0
    assert measure.quantile([0.0, 10.0], 0.2) == pytest.approx(2.0)


def test_a_trace_is_counted_within_the_mark():
    def event(cat, name, ts, **more):
        return {"cat": cat, "name": name, "ts": ts, **more}

    events = [
        event("user_annotation", measure.MARK, 100, dur=50),
        event("gpu_user_annotation", measure.MARK, 120, dur=70),
        event("cuda_runtime", "cudaDeviceSynchronize", 90),  # the profiler's own
        event("cuda_runtime", "cudaLaunchKernel", 101),
        event("cuda_driver", "cuLaunchKernelEx", 102),
        event("cuda_runtime", "cudaMemcpyAsync", 103),
        event("cuda_runtime", "cudaStreamSynchronize", 104),
        event("cuda_runtime", "cudaDeviceSynchronize", 160),
        event("kernel", "perturb", 120),
        event("kernel", "fold", 155),  # later than the call that launched it
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 130),
        event("gpu_memset", "Memset (Device)", 131),
        {"ph": "M", "name": "process_name"},
    ]
    assert measure.tally(events) == {"launches": 2, "copies": 2, "host_syncs": 1, "host_reads": 1}


def test_a_traced_call_launches_nothing_on_a_cpu():
    ran = []
    counts = measure.traced(lambda: ran.append(torch.ones(3) + 1))
    if not torch.cuda.is_available():
        assert counts == {"launches": 0, "copies": 0, "host_syncs": 0, "host_reads": 0}
    assert len(ran) == 1


class FakeCuda:
    """Stands in for torch.cuda and records the host's calls in order; the GPU takes no time."""

    def __init__(self, monkeypatch):
        self.said = said = []
        self.mode = "default"

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                said.append("record")

            def query(self):
                return False

            def elapsed_time(self, other):
                return 3.0

        def set_mode(mode):
            self.mode = mode

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: said.append("synchronize"))
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: said.append("sleep") or int(cycles))
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)


def test_a_batch_starts_when_all_of_it_is_queued(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    batch = measure.Batch(lambda: cuda.said.append("call"), torch.device("cuda"))
    assert batch.calls == measure.Batch.CALLS and batch.pause > 0
    cuda.said.clear()
    sample = batch()
    calls = ["call"] * batch.calls
    assert cuda.said == [*("synchronize", "sleep", "record"), *calls, *("record", "synchronize"), *calls, "synchronize"]
    assert sample.queued and sample.device == pytest.approx(3e-3 / batch.calls)
    assert sample.host > 0 and sample.wall > 0


def test_a_call_with_a_host_sync_is_recognised(monkeypatch):
    cuda = FakeCuda(monkeypatch)

    def waiting():
        if cuda.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    gpu = torch.device("cuda")
    assert measure.waits(lambda: None, gpu) is None and cuda.mode == "default"
    assert "synchronizing" in measure.waits(waiting, gpu) and cuda.mode == "default"
    assert measure.waits(waiting, torch.device("cpu")) is None


# --- the tables -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("copies", [1, 3])
def test_every_row_runs_and_changes_do_not_accumulate(dtype, copies):
    rows = bench.operator_rows([(16, 3, 3, 3), (1024,), (3, 700)], torch.device("cpu"), "cpp", dtype, copies)
    assert [row.name for row in rows][:2] == ["floor", "perturb_"]
    for row in rows:
        for _ in range(copies):
            row.call()
        assert row.peer or row.bytes
    if dtype == torch.float32:
        for musts in bench.MUST.values():
            assert set(musts) <= {row.name for row in rows}


def test_copies_take_turns(monkeypatch):
    seen = []
    monkeypatch.setattr(bench.ops, "grad_norm", lambda grads, backend: seen.append(grads[0].data_ptr()))
    rows = bench.operator_rows([(600, 2)], torch.device("cpu"), "cpp", copies=3)
    row = next(row for row in rows if row.name == "grad_norm")
    for _ in range(6):
        row.call()
    assert len(set(seen[:3])) == 3 and seen[:3] == seen[3:]


def test_the_cpu_rows_are_the_committed_ones():
    result = bench.measure(bench.Config(model="cnn", rounds=1), processes=1)
    committed = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())
    assert result.keys() == committed.keys()
    assert {frozenset(row) for row in result["rows"]} == {frozenset(row) for row in committed["rows"]}
    if result["simd"] == committed["simd"]:
        assert [row["name"] for row in result["rows"]] == [row["name"] for row in committed["rows"]]


def test_rehearsal(tmp_path, capsys):
    """benchmarks/gpu.sh without a GPU: every program that it starts there runs and writes its results."""
    environment = {**os.environ, "FLATOPS_GPU_REHEARSAL": "1", "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", ROOT / "benchmarks/gpu.sh", tmp_path], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {*("summary.txt", "log.txt", "tests.xml", "info.json", "bench_cnn.json", "train_step.json")}
    summary = (tmp_path / "summary.txt").read_text()
    assert "failed" not in summary and summary.splitlines()[-1].startswith("all")
    assert json.loads((tmp_path / "info.json").read_text())["core"]["built"]

    table = json.loads((tmp_path / "bench_cnn.json").read_text())
    assert table["backends"]["cpp"] == "" and table["weights"] > 0
    assert {(row["backend"], row["dtype"]) for row in table["rows"]} >= {("cpp", "float32"), ("cpp", "bfloat16")}
    for row in table["rows"]:
        assert row["error"] is None
        assert row["device_ms"] > 0 and row["host_ms"] > 0 and row["wall_ms"] > 0 and row["floors"] > 0
        assert row["launches"] == row["host_syncs"] == 0 and row["queued"] and row["graph_ms"] is None
    musts = {row["name"]: row["must"] for row in table["rows"] if row["must"]}
    assert musts == bench.MUST["cuda"]

    steps = json.loads((tmp_path / "train_step.json").read_text())
    assert [row["name"] for row in steps["rows"]][:4] == ["SGD", "RWP", "m-RWP", "SAM"]
    for row in steps["rows"]:
        assert row["images_per_second"] > 0 and row["step"]["launches"] == 0
        assert ("own" in row) == (row["name"] != "SGD")

    # Also shows what only a GPU would report.
    table["rows"][1] |= {"graph_ms": 0.068, "queued": False}
    table["rows"][2] |= {"graph_ms": "RuntimeError: not [permitted]", "error": "the host waits: there"}
    table["rows"][3] = {key: value for key, value in table["rows"][3].items() if key != "device_ms"}
    bench_gpu.show({**table, "gpu": "GPU"})
    shown = capsys.readouterr().out
    for part in ("68.0", "~", "not [permitted]", "the host waits: there", "failed", "no cuda"):
        assert part in shown, part


def test_a_row_that_fails_does_not_affect_the_others(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(bench.ops, "filter_norms", broken)
    monkeypatch.setattr(bench_gpu, "traced", lambda call: {})
    monkeypatch.setattr(bench_gpu, "BACKENDS", {"cpp": bench_gpu.BACKENDS["cpp"]})
    result = bench_gpu.measure(bench.Config(model="cnn", rounds=1))
    failed = [row for row in result["rows"] if row["error"]]
    assert {row["name"] for row in failed} == {"filter_norms"}
    assert all("device_ms" in row for row in result["rows"] if not row["error"])


# --- machine code -----------------------------------------------------------------------------------------------------

CODE = r"""
#include <cstdint>
// Straight on, with a slow path in the square root, and narrow accesses where a tile is not whole.
__global__ void wide(float* x, int n) {
  int i = 4 * (blockIdx.x * blockDim.x + threadIdx.x);
  float v[4] = {};
  if (i + 4 <= n) *(float4*)v = *(float4*)(x + i);
  else for (int c = 0; c < 4; ++c) if (i + c < n) v[c] = x[i + c];
#pragma unroll
  for (int c = 0; c < 4; ++c) v[c] = __fsqrt_rn(v[c]);
  if (i + 4 <= n) *(float4*)(x + i) = *(float4*)v;
  else for (int c = 0; c < 4; ++c) if (i + c < n) x[i + c] = v[c];
}
__global__ void loop(const double* x, double* y, int n) {
  double sum = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 32) sum = fma(x[i], x[i], sum);
  *y = sum;
}
__global__ void local(int* x, int n) {
  int a[64];
  for (int i = 0; i < n; ++i) a[x[i] & 63] = i;
  x[0] = a[x[n] & 63];
}
__global__ void half(const uint16_t* x, uint16_t* y) {
  __shared__ uint16_t t[256];
  t[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = t[threadIdx.x ^ 1];
}
"""


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """The kernels above, compiled for two architectures and read for one."""
    nvcc = machine_code.tool("nvcc")
    if nvcc is None or machine_code.tool() is None:
        pytest.skip("needs nvcc and cuobjdump")
    folder = tmp_path_factory.mktemp("code")
    (folder / "code.cu").write_text(CODE)
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90)]
    fatbin = folder / "code.fatbin"
    subprocess.run([nvcc, "-fatbin", *targets, "-o", fatbin, folder / "code.cu"], check=True)
    found = machine_code.kernels(fatbin, "sm_90")
    return {name: next(k for mangled, k in found.items() if f"{len(name)}{name}" in mangled) for name in
            ("wide", "loop", "local", "half")}  # fmt: skip


def test_resources_and_widths(code):
    assert all(kernel.arch == "sm_90" and 0 < kernel.registers < 256 for kernel in code.values())
    assert code["wide"].loads.keys() == code["wide"].stores.keys() == {32, 128} and code["wide"].spills == 0
    assert code["loop"].loads.keys() == code["loop"].stores.keys() == {64}
    assert code["half"].loads.keys() == code["half"].stores.keys() == {16} and code["half"].shared >= 512
    assert code["local"].spills > 0 and code["local"].stack >= 256
    assert code["wide"].instructions["MUFU.RSQ"] >= 4 and 8 <= code["wide"].warps <= 64


def test_the_path_of_a_whole_tile(code):
    path = code["wide"].path()
    accesses = Counter((i.name, i.bits) for i in path if i.name in ("LDG", "STG"))
    assert accesses == {("LDG", 128): 1, ("STG", 128): 1}
    assert not any(i.name in ("CALL", "RET") for i in path)
    assert sum(i.opcode == "MUFU.RSQ" for i in path) >= 4
    each = machine_code.by_pipe(path, elements=4)
    assert each["xu"] >= 1 and each["issue"] < len(code["wide"].code) / 4
    assert each["issue"] == pytest.approx(sum(n for pipe, n in each.items() if pipe != "issue"))


def test_a_loop_counts_as_often_as_it_runs(code):
    once, often = (code["loop"].path(trips) for trips in (1, 100))
    body = {i.name for i in often if often[i] == 100}
    assert {"LDG", "DFMA", "BRA"} <= body and "STG" not in body
    assert once.total() < often.total() < 100 * once.total()


def test_a_prediction_is_the_slower_of_two_counts():
    weights = machine_code.MODELS["ResNet-50"]
    least = machine_code.predict({"issue": 42.0, "alu": 15.0, "xu": 0.5}, 8, weights)
    assert least.arithmetic == pytest.approx(36.2, abs=0.1) and least.memory == pytest.approx(68.2, abs=0.1)
    assert least.pipe == "issue"
    assert machine_code.predict({"issue": 42.0, "alu": 30.0}, 8, weights).pipe == "alu"
    assert machine_code.predict({"issue": 3.0, "xu": 1.0}, 8, weights).pipe == "xu"
    shared = machine_code.predict({"issue": 100.0, "fp32": 60.0, "imad": 50.0}, 8, weights)
    assert shared.pipe == "fp32"  # together they take longer than either


def test_branches_of_every_kind():
    lines = """
\tcode for sm_90
\t\tFunction : f
        /*0000*/                   ISETP.GE.AND P0, PT, R1, R2, PT ;   /* 0x1 */
        /*0010*/               @P0 BRA 0x40 ;                          /* 0x2 */
        /*0020*/                   BRA.DIV UR4, 0x80 ;                 /* 0x3 */
        /*0030*/                   BRA !P5, 0x50 ;                     /* 0x4 */
        /*0040*/              @!P1 EXIT ;                              /* 0x5 */
        /*0050*/                   STG.E.128 desc[UR4][R2.64], R4 ;    /* 0x6 */
        /*0060*/                   EXIT ;                              /* 0x7 */
        /*0070*/                   BRA 0x70 ;                          /* 0x8 */
        /*0080*/                   CALL.REL.NOINC 0x90 ;               /* 0x9 */
"""
    kernel = machine_code.parse(lines)["f"]
    assert [i.ends for i in kernel.code] == [False] * 6 + [True, True, False]
    assert [len(block) for block in kernel.blocks] == [2, 1, 1, 1, 2, 1, 1]
    assert {i.address for i in kernel.path()} == set(range(0, 0x70, 0x10))
    assert kernel.code[1].predicated and not kernel.code[2].predicated


def test_the_table_of_our_own_kernels():
    """The table's patterns find every kernel that is compiled in."""
    from flatops.backend import _C

    if not getattr(_C, "cuda_archs", None) or machine_code.tool() is None:
        pytest.skip("needs an extension with CUDA code, and cuobjdump")
    table = machine_code.table(machine_code.rows(machine_code.kernels(_C.__file__)))
    assert table.count("\n") == 1 + len(machine_code.OPERATORS)
    assert all(row.split("|")[4].strip() == "0" for row in table.splitlines()[2:])  # no spills
