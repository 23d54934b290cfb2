"""What does a real training step cost relative to SGD's? A timm model on synthetic images, in bf16 autocast.

Each method has its own model and optimizer in one process, and their steps take turns. The result is the median over
rounds of the ratio to the SGD step of the same round.

    python -c "from flatops.benchmarks import train_step as t; t.main(t.Config(device='cuda'))"
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import flatops
from flatops import terminal
from flatops.benchmarks import papers
from flatops.benchmarks.measure import Batch, in_turn, provenance, quantile, synchronize, traced, waits
from flatops.methods import METHODS
from flatops.train import models


@dataclass(kw_only=True)
class Config:
    """Train with each method for a few steps."""

    model: str = "resnet50"
    """Any timm name."""
    batch: int = 256
    """Images per step."""
    image: int = 224
    """Width and height of the images."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device to train on."""
    rounds: int = 15
    """Rounds; the median counts."""
    steps: int = 3
    """Steps per round."""
    json: Path | None = None
    """Also write the rows to this JSON file."""


@dataclass
class Contender:
    """One implementation of a method."""

    name: str
    step: Callable[[], Any]
    own: Callable[[], Any] | None = None  # everything but forward, backward and the base optimizer's step
    must: float | None = None  # limit relative to SGD's step
    seconds: list[float] = field(default_factory=list)  # per step


def build_contenders(config: Config) -> list[Contender]:
    """SGD first, then flatops, then the papers' code."""
    device = torch.device(config.device)
    torch.backends.cudnn.benchmark = True
    generator = torch.Generator(device).manual_seed(0)

    def batch() -> tuple[Tensor, Tensor]:
        shape = (config.batch, 3, config.image, config.image)
        x = torch.randn(shape, generator=generator, device=device).contiguous(memory_format=torch.channels_last)
        return x, torch.randint(1000, (config.batch,), generator=generator, device=device)

    first, second = batch(), batch()
    base: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "fused": True}

    def network_with(make: Callable[[Any], torch.optim.Optimizer]) -> tuple[Any, list[Tensor], Any, Callable]:
        torch.manual_seed(0)
        model = models.create(config.model, classes=1000, channels=3)
        model = model.to(device, memory_format=torch.channels_last).train()
        params = list(model.parameters())

        def backward(data: tuple[Tensor, Tensor], weight: float = 1.0) -> None:
            with torch.autocast(device.type, torch.bfloat16):
                loss = cross_entropy(model(data[0]), data[1])
            (loss if weight == 1 else weight * loss).backward()

        return model, params, make(params), backward

    def sgd(params: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, **base)

    def end(optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
        optimizer.zero_grad()

    def plain() -> Contender:
        _, _, optimizer, backward = network_with(sgd)

        def step() -> None:
            backward(first)
            end(optimizer)

        return Contender("SGD", step)

    def ours(name: str, must: float | None = None, **options: float) -> Contender:
        method = METHODS[name]
        options |= method.fixed | base
        model, params, optimizer, backward = network_with(lambda p: method.optimizer(p, torch.optim.SGD, **options))
        mixes = method.batches == 2
        clean_pass = mixes or method.ascends

        def step() -> None:
            if clean_pass:
                backward(first, optimizer.clean_weight if mixes else 1.0)
            frozen = flatops.freeze_batchnorm_stats(model, enabled=clean_pass)
            with optimizer.perturbed(), frozen:
                backward(second if mixes else first, optimizer.perturbed_weight if mixes else 1.0)
            end(optimizer)

        def own() -> None:
            for p, g in zip(params, grads):
                p.grad = g
            with optimizer.perturbed():
                pass

        backward(first)
        grads = [p.grad for p in params]
        optimizer.zero_grad()
        return Contender(method.label, step, own, must)

    def papers_rwp() -> Contender:
        _, params, optimizer, backward = network_with(sgd)

        def step() -> None:
            noise = papers.perturb(params, 0.005)
            backward(first)
            papers.remove(params, noise)
            end(optimizer)

        return Contender("RWP, the papers' code", step, lambda: papers.remove(params, papers.perturb(params, 0.005)))

    def papers_sam() -> Contender:
        model, params, optimizer, backward = network_with(sgd)

        def ascend(grads: list[Tensor]) -> list[Tensor]:
            return papers.ascend(params, grads, 0.05, papers.grad_norm(grads))

        def step() -> None:
            backward(first)
            kept = ascend([p.grad for p in params])
            optimizer.zero_grad()
            with flatops.freeze_batchnorm_stats(model):
                backward(first)
            papers.copy_back(params, kept)
            end(optimizer)

        backward(first)
        grads = [p.grad for p in params]
        optimizer.zero_grad()
        return Contender("SAM, the papers' code", step, lambda: papers.copy_back(params, ascend(grads)))

    return [
        plain(),
        ours("rwp", must=1.01, sigma=0.005),
        ours("mrwp", sigma=0.005, lam=0.5),
        ours("sam", rho=0.05),
        papers_rwp(),
        papers_sam(),
    ]


def measure(config: Config) -> dict[str, Any]:
    """Times and counts of every method's step."""
    device = torch.device(config.device)
    contenders = build_contenders(config)

    def turn(method: Contender) -> Callable[[], float]:
        def run() -> float:
            synchronize(device)
            start = time.perf_counter()
            for _ in range(config.steps):
                method.step()
            synchronize(device)
            return (time.perf_counter() - start) / config.steps

        return run

    taken = in_turn({method.name: turn(method) for method in contenders}, config.rounds)
    own = {method.name: Batch(method.own, device) for method in contenders if method.own}
    own_taken = in_turn(own, config.rounds)
    rows = []
    for method in contenders:
        ratios = [mine / sgd for mine, sgd in zip(taken[method.name], taken["SGD"])]
        step = quantile(taken[method.name], 0.5)
        row = {
            "name": method.name,
            "step_ms": step * 1e3,
            "step_ms_p20": quantile(taken[method.name], 0.2) * 1e3,
            "step_ms_p80": quantile(taken[method.name], 0.8) * 1e3,
            "images_per_second": config.batch / step,
            "ratio_to_sgd": quantile(ratios, 0.5),
            "ratio_to_sgd_p20": quantile(ratios, 0.2),
            "ratio_to_sgd_p80": quantile(ratios, 0.8),
            "must": method.must,
            "step": traced(method.step),
        }
        if method.own:
            samples = own_taken[method.name]
            row |= {
                "own_ms": quantile([s.device for s in samples], 0.5) * 1e3,
                "own_host_ms": quantile([s.host for s in samples], 0.5) * 1e3,
                "own": traced(method.own),
                "own_waits": waits(method.own, device),
            }
        rows.append(row)
    return {
        **provenance(device),
        "model": config.model,
        "batch": config.batch,
        "image": config.image,
        "rounds": config.rounds,
        "steps": config.steps,
        "memory_peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "rows": rows,
    }


def show(result: dict[str, Any]) -> None:
    """Prints the table."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=f"{result['model']}, batches of {result['batch']} images of {result['image']}x{result['image']}, "
        f"bf16 autocast\n{result.get('gpu', result['machine'])}, torch {result['torch']}",
        caption="own: the method's part beyond forward, backward and the base optimizer's step; on the GPU, and on the "
        "host until everything is launched. A step of m-RWP sees two batches, of which one is counted.",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("method", no_wrap=True)
    columns = ("ms per step", "images/s", "to SGD", "limit", "own ms", "host ms", "own launches", "own syncs")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in result["rows"]:
        met = row["must"] is None or row["ratio_to_sgd"] <= row["must"]
        ratio = f"{row['ratio_to_sgd']:.3f}"
        own = ("", "", "", "")
        if "own" in row:
            counts = (str(row["own"][name]) for name in ("launches", "host_syncs"))
            own = (f"{row['own_ms']:.3f}", f"{row['own_host_ms']:.3f}", *counts)
        table.add_row(
            row["name"],
            f"{row['step_ms']:.2f}",
            f"{row['images_per_second']:.0f}",
            ratio if met else f"[red]{ratio}[/red]",
            f"{row['must']:.2f}" if row["must"] else "",
            *own,
        )
    terminal.say(terminal.console(width=130), table)
    for row in result["rows"]:
        if row.get("own_waits"):
            print(f"{row['name']}: the host waits: {row['own_waits']}")


def main(config: Config) -> int:
    """Measures and prints; writes JSON if asked to. Returns 1 if a step of ours has a host sync."""
    result = measure(config)
    show(result)
    if config.json:
        config.json.write_text(json.dumps(result, indent=2) + "\n")
    return int(any(row.get("own_waits") for row in result["rows"] if "papers' code" not in row["name"]))
