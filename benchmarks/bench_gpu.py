"""How many floors does each operator cost on each backend of a GPU? The table of `flatops bench --device cuda`.

Next to the time on the GPU it shows kernel launches, host syncs and the host's own time, which a training step hides as
long as it is shorter than the work that the GPU has queued.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict
from typing import Any

import torch

from flatops import terminal
from flatops.backend import BACKENDS, why_not
from flatops.benchmarks import bench
from flatops.benchmarks.measure import (
    Batch,
    Sample,
    graph_of,
    in_turn,
    provenance,
    quantile,
    synchronize,
    traced,
    waits,
)

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def measure(config: bench.Config) -> dict[str, Any]:
    """Everything that the table shows. With device "cpu" it is a rehearsal whose times mean nothing."""
    device = torch.device(config.device)
    shapes = bench.parameter_shapes(config.model)
    backends = {name: why_not(name, device) for name in BACKENDS if name != "reference"}
    result = {
        **provenance(device),
        "model": config.model,
        "tensors": len(shapes),
        "weights": sum(math.prod(s) for s in shapes),
        "rounds": config.rounds,
        "backends": backends,
        "rows": [],
    }
    groups: list[tuple[list[dict[str, Any]], list[Batch | None]]] = []

    def keep() -> None:  # after every group: a kernel that kills the process must not lose earlier results
        if config.json:
            bench.write(result, config.json)

    for backend, missing in backends.items():
        for dtype in DTYPES if not missing else ():
            groups.append(_timed(result, shapes, device, backend, dtype, peers=not groups, rounds=config.rounds))
            result["rows"] += groups[-1][0]
            keep()
    # Counts follow all times, as a profiler stays attached; graphs come last, as a failed capture has after-effects.
    for further in (_counts, _graph):
        for entry, batch in itertools.chain(*(zip(*group) for group in groups)):
            if batch is not None:
                entry |= further(batch, entry["peer"], device, config.rounds)
        keep()
    return result


def _timed(
    result: dict[str, Any],
    shapes: list[tuple[int, ...]],
    device: torch.device,
    backend: str,
    dtype: torch.dtype,
    peers: bool,
    rounds: int,
) -> tuple[list[dict[str, Any]], list[Batch | None]]:
    """One backend's rows of one dtype, measured in turn; a row that fails holds its error and has no batch."""
    weights = result["weights"]
    # At least two, and enough to read three times the L2 cache before a buffer is used again.
    copies = max(2, math.ceil(3 * result.get("l2_bytes", 0) / (weights * dtype.itemsize)))
    rows = bench.operator_rows(shapes, device, backend, dtype, copies)
    if not peers:
        rows = [row for row in rows if not row.peer]
    table: list[dict[str, Any]] = [
        {
            "backend": backend,
            "dtype": DTYPES[dtype],
            "name": row.name,
            "peer": row.peer,
            "must": bench.MUST["cuda"].get(row.name) if dtype == torch.float32 and not row.peer else None,
            "bytes_per_weight": row.bytes,
            "floors_by_bytes": row.bytes / (2 * dtype.itemsize) if row.bytes else None,
            "error": None,
        }
        for row in rows
    ]
    batches: list[Batch | None] = [None] * len(rows)
    for i, row in enumerate(rows):
        try:
            row.call()
            synchronize(device)
            batches[i] = Batch(row.call, device)
        except Exception as error:  # whatever a kernel or its compiler may raise
            table[i]["error"] = f"{type(error).__name__}: {error}"
    contenders = {str(i): batch for i, batch in enumerate(batches) if batch is not None}
    try:
        taken = in_turn(contenders, rounds)
        floor = quantile([s.device for s in taken["0"]], 0.5)
    except Exception as error:  # a kernel that corrupted the CUDA context fails everything after it
        for entry in table:
            entry["error"] = entry["error"] or f"{type(error).__name__}: {error}"
        return table, [None] * len(rows)
    for i, samples in taken.items():
        table[int(i)] |= _times(samples, floor, table[int(i)]["bytes_per_weight"], weights)
        table[int(i)]["calls"] = contenders[i].calls
    return table, batches


def _times(samples: list[Sample], floor: float, bytes: int | None, weights: int) -> dict[str, Any]:
    """Medians in ms, and what is derived from them."""
    by_field = {name: [asdict(s)[name] for s in samples] for name in ("device", "host", "wall")}
    device = quantile(by_field["device"], 0.5)
    return {
        "device_ms": device * 1e3,
        "device_ms_p20": quantile(by_field["device"], 0.2) * 1e3,
        "device_ms_p80": quantile(by_field["device"], 0.8) * 1e3,
        "floors": device / floor,
        "gb_per_s": bytes * weights / device / 1e9 if bytes else None,
        "host_ms": quantile(by_field["host"], 0.5) * 1e3,
        "wall_ms": quantile(by_field["wall"], 0.5) * 1e3,
        "queued": all(s.queued for s in samples),
    }


def _counts(batch: Batch, peer: bool, device: torch.device, rounds: int) -> dict[str, Any]:
    """Counts, which do not depend on the machine; for our rows also a check that there are no host syncs."""
    counts: dict[str, Any] = traced(batch.call)
    if not peer and (wait := waits(batch.call, device)):
        counts["error"] = f"the host waits: {wait}"
    return counts


def _graph(batch: Batch, peer: bool, device: torch.device, rounds: int) -> dict[str, Any]:
    """Milliseconds per call inside a CUDA graph, or the reason why it cannot be captured."""
    if peer or device.type != "cuda":
        return {"graph_ms": None}
    try:
        replay = Batch(graph_of(batch.call, batch.calls), device)
        return {"graph_ms": quantile([replay().device for _ in range(rounds)], 0.5) / batch.calls * 1e3}
    except Exception as error:  # whatever cannot be captured
        return {"graph_ms": f"{type(error).__name__}: {error}"}


def show(result: dict[str, Any]) -> None:
    """Prints the table."""
    from rich import box
    from rich.table import Table

    console = terminal.console(width=150)
    table = Table(
        title=f"{result['model']}: {result['tensors']} tensors, {result['weights']:,} weights\n"
        f"{result.get('gpu', result['machine'])}, torch {result['torch']}",
        caption="floor: one read and one write of every weight by torch, measured in the same run. by bytes: floors "
        "if only the required memory traffic took time. limit: the most floors allowed. host: until the call returns. "
        "wall: call after call. graph: inside a CUDA graph. launches, syncs: kernel launches and host syncs.\n"
        "~: includes the host's time.",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("operator", no_wrap=True)
    columns = ("µs", "floors", "limit", "by bytes", "GB/s", "host µs", "wall µs", "graph µs", "launches", "syncs")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    group = None
    for row in result["rows"]:
        if group != (group := (row["backend"], row["dtype"])):
            table.add_section()
            table.add_row(f"[bold]{row['backend']}, {row['dtype']}[/bold]")
        name = f"  {row['name']}" if row["peer"] else row["name"]
        if "device_ms" not in row:
            table.add_row(name, "[red]failed[/red]")
            continue
        met = row["must"] is None or row["floors"] <= row["must"]
        graph = row["graph_ms"]
        table.add_row(
            name,
            f"{'' if row['queued'] else '~'}{row['device_ms'] * 1e3:.1f}",
            f"{row['floors']:.2f}" if met else f"[red]{row['floors']:.2f}[/red]",
            f"{row['must']:.2f}" if row["must"] else "",
            f"{row['floors_by_bytes']:.2f}" if row["floors_by_bytes"] else "",
            f"{row['gb_per_s']:.0f}" if row["gb_per_s"] else "",
            f"{row['host_ms'] * 1e3:.0f}",
            f"{row['wall_ms'] * 1e3:.0f}",
            f"{graph * 1e3:.1f}" if isinstance(graph, float) else "none" if graph else "",
            str(row["launches"]),
            str(row["host_syncs"]),
            style="dim" if row["peer"] else None,
        )
    terminal.say(console, table)
    for name, why in result["backends"].items():
        if why:
            terminal.say(console, f"no {name}: {why}")
    for row in result["rows"]:
        what = f"{row['backend']}, {row['dtype']}, {row['name']}"
        if row["error"]:
            terminal.say(console, f"{what}: {row['error']}", style="red")
        if isinstance(row.get("graph_ms"), str):
            terminal.say(console, f"{what}, no graph: {row['graph_ms']}")


def once(model: str, device: str, backend: str) -> None:
    """Runs every operator once, warmed up, between the marks that `ncu --profile-from-start off` waits for."""
    shapes = bench.parameter_shapes(model)
    rows = bench.operator_rows(shapes, torch.device(device), backend)
    calls = [row.call for row in rows if not row.peer]
    for profiled in (False, True):
        if profiled and device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        for call in calls:
            call()
    synchronize(torch.device(device))
    if device == "cuda":
        torch.cuda.profiler.stop()


def main(config: bench.Config) -> int:
    """Measures and prints; writes JSON if asked to. Returns 1 if a row failed."""
    result = measure(config)
    show(result)
    return int(not result["rows"] or any(row["error"] for row in result["rows"]))
