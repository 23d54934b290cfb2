"""The processes of test_integrations_distributed.py, under torchrun.

integration_worker.py FRAMEWORK FILE: runs every case of CASES[FRAMEWORK] in one process group and writes the weights to
FILE.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import Batch, loss_of, make_batch, make_net
from torch import Tensor, nn

import flatops

SGD = torch.optim.SGD
# One stream for all, or replicas would draw noise that a single process does not.
METHODS = {
    "sam": (flatops.SAM, {"rho": 0.5}),
    "rwp": (flatops.RWP, {"seed": 0, "sigma": 0.3, "stream": 0}),
    "mrwp": (flatops.RWP, {"seed": 0, "sigma": 0.3, "lam": 0.3, "stream": 0}),
    "parallel mrwp": (flatops.RWP, {"seed": 0, "sigma": 0.3, "lam": 0.3, "parallel": True}),
}
STEPS = 4

# (how, method, micro-batches per step)
CASES = {
    "lightning": [
        ("ddp", "sam", 1), ("ddp", "rwp", 2), ("ddp", "mrwp", 2),
        ("fsdp2", "sam", 1), ("fsdp2", "sam", 2), ("fsdp2", "rwp", 1),
    ],
    "transformers": [
        ("trainer", "sam", 1), ("trainer", "rwp", 2), ("trainer", "mrwp", 2), ("trainer", "parallel mrwp", 1),
        ("accelerate", "sam", 1), ("accelerate", "mrwp", 2),
    ],
}  # fmt: skip


def network() -> nn.Module:
    """Has no BatchNorm, whose statistics would differ between processes and from those of a single process."""
    return make_net(norm=lambda channels: nn.GroupNorm(2, channels))


def optimizer_of(method: str, model: nn.Module, **other: Any) -> torch.optim.Optimizer:
    flat, options = METHODS[method]
    return flat(model.parameters(), SGD, lr=0.1, momentum=0.9, **{**options, **other})


def batches(accumulate: int) -> list[Batch]:
    return [make_batch(i) for i in range(STEPS * accumulate)]


def part(batch: Batch, rank: int) -> Batch:
    return tuple(t.chunk(2)[rank] for t in batch)


def lightning() -> Callable[..., nn.Module]:
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    from flatops.integrations.lightning import FlatMinima

    class Module(pl.LightningModule):
        def __init__(self, how: str, method: str) -> None:
            super().__init__()
            self.net, self.how, self.method = network(), how, method

        def configure_model(self) -> None:
            if self.how == "fsdp2":
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer_of(self.method, self.net)

        def training_step(self, batch: Batch) -> Tensor:
            return loss_of(self.net, batch)

    def fit(how: str, method: str, accumulate: int) -> nn.Module:
        module = Module(how, method)
        trainer = pl.Trainer(
            accelerator="cpu", devices=2, max_epochs=1, strategy="ddp" if how == "ddp" else ModelParallelStrategy(2, 1),
            callbacks=[FlatMinima()], accumulate_grad_batches=accumulate, use_distributed_sampler=False, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        mine = [part(batch, dist.get_rank()) for batch in batches(accumulate)]
        trainer.fit(module, torch.utils.data.DataLoader(mine, batch_size=None))
        return module.net

    return fit


def transformers() -> Callable[..., nn.Module]:
    import accelerate
    import transformers

    from flatops.integrations.transformers import FlatMinimaMixin

    class Trainer(FlatMinimaMixin, transformers.Trainer):
        def get_train_dataloader(self) -> Any:
            loader = torch.utils.data.DataLoader(self.train_dataset, batch_size=4)
            return self.accelerator.prepare(loader)  # deals batches out to the processes

        def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], **_: Any) -> Tensor:
            return loss_of(model, (inputs["x"], inputs["y"]))

    def train(method: str, accumulate: int) -> nn.Module:
        model = network()
        data = [{"x": x, "y": y} for batch in batches(accumulate) for x, y in zip(*batch)]
        arguments = transformers.TrainingArguments(
            use_cpu=True, num_train_epochs=1, per_device_train_batch_size=4, gradient_accumulation_steps=accumulate,
            max_grad_norm=0.0, lr_scheduler_type="constant", report_to=[], save_strategy="no", logging_strategy="no",
            disable_tqdm=True,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=data, optimizers=(optimizer_of(method, model), None)).train()
        return model

    def loop(method: str, accumulate: int) -> nn.Module:
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        net = network()
        model, optimizer = accelerator.prepare(net, optimizer_of(method, net))
        for batch in batches(accumulate):
            with accelerator.accumulate(model):
                for one_pass in flatops.passes(optimizer, model):
                    with one_pass:
                        accelerator.backward(loss_of(model, part(batch, accelerator.process_index)))
                optimizer.step()
                optimizer.zero_grad()
        return net

    return lambda how, *case: {"trainer": train, "accelerate": loop}[how](*case)


def main(framework: str, file: str) -> None:
    warnings.simplefilter("ignore")  # the frameworks' advice
    torch.set_num_threads(1)
    os.chdir(Path(file).parent)  # the Trainer creates a folder
    run = {"lightning": lightning, "transformers": transformers}[framework]()
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    result = {}
    for case in CASES[framework]:
        weights = [p.detach() for p in run(*case).parameters()]
        result[case] = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in weights]
    if framework == "lightning":
        try:
            run("fsdp2", "mrwp", 1)
        except RuntimeError as error:
            result["refused"] = str(error)
    torch.save(result, f"{file}.{dist.get_rank()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
