"""Lightning, Hugging Face's Trainer and accelerate on two processes, against a plain loop on one."""

from __future__ import annotations

from pathlib import Path

import integration_worker as worker
import pytest
import torch
from models import assert_same_bits, loss_of
from torch import Tensor
from torchrun import torchrun

pytestmark = pytest.mark.usefixtures("one_thread")
# Relative to the weights' norm. Seen: 2e-8 to 3e-8; without perturbations, or with other noise, 1e-2 to 9e-2.
TOLERANCE = 5e-7


def run(framework: str, folder: Path) -> list[dict]:
    """The results of two processes for every case of a framework."""
    file = folder / "weights"
    done = torchrun(worker.__file__, framework, file)
    assert done.returncode == 0, done.stderr
    return [torch.load(f"{file}.{rank}") for rank in range(2)]


@pytest.fixture(scope="module")
def lightning(tmp_path_factory):
    return run("lightning", tmp_path_factory.mktemp("lightning"))


@pytest.fixture(scope="module")
def transformers(tmp_path_factory):
    return run("transformers", tmp_path_factory.mktemp("transformers"))


def plain(method: str, accumulate: int) -> list[Tensor]:
    """The plain loop on one process; for parallel m-RWP with one pass per half of the batch."""
    model = worker.network()
    other = {"parallel": False, "stream": 1} if method == "parallel mrwp" else {}
    optimizer = worker.optimizer_of(method, model, **other)
    for i, batch in enumerate(worker.batches(accumulate), 1):
        clean, noisy = (worker.part(batch, rank) for rank in range(2)) if other else (batch, batch)
        earlier = [p.grad for p in model.parameters()]
        if method == "sam":
            model.zero_grad()
            loss_of(model, clean).backward()
        elif method != "rwp":
            (optimizer.clean_weight * loss_of(model, clean) / accumulate).backward()
        with optimizer.perturbed():
            (getattr(optimizer, "perturbed_weight", 1.0) * loss_of(model, noisy) / accumulate).backward()
        if method == "sam" and earlier[0] is not None:
            for p, grad in zip(model.parameters(), earlier):
                p.grad += grad
        if i % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return list(model.parameters())


def distance(left: list[Tensor], right: list[Tensor]) -> float:
    """Relative to the norm."""
    left, right = (torch.cat([t.detach().flatten() for t in tensors]) for tensors in (left, right))
    return ((left - right).norm() / right.norm()).item()


@pytest.mark.parametrize(
    "framework, case",
    [(framework, case) for framework, cases in worker.CASES.items() for case in cases],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value)),
)
def test_two_processes_compute_what_one_does(request, framework, case):
    """Their weights have moved, are equal to the bit, and equal up to rounding those of one process."""
    first, second = (result[case] for result in request.getfixturevalue(framework))
    assert_same_bits(first, second)
    assert distance(first, list(worker.network().parameters())) > 0.01
    assert distance(first, plain(*case[1:])) < TOLERANCE


def test_mrwp_on_shards_is_refused_with_what_to_do(lightning):
    for result in lightning:
        assert "multiply the losses by clean_weight and perturbed_weight" in result["refused"]
