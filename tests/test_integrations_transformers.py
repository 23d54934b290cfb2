"""Hugging Face's Trainer and accelerate's loop against plain ones, to the bit: precision, accumulation, resume."""

from __future__ import annotations

import accelerate
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
from documentation import run_snippets
from models import assert_same_bits, loss_of, make_batch, make_net, state_tensors
from plain import plain_loop
from torch.amp import GradScaler

import flatops
from flatops.integrations.transformers import FlatMinimaMixin

pytestmark = pytest.mark.usefixtures("one_thread")
ADAMW = torch.optim.AdamW
METHODS = {
    "sam": (flatops.SAM, {"rho": 0.1}),
    "rwp": (flatops.RWP, {"sigma": 0.05}),
    "mrwp": (flatops.RWP, {"sigma": 0.05, "lam": 0.5}),
    "marwp": (flatops.RWP, {"sigma": 0.05, "lam": 0.5, "eta": 1.0}),
}
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALE = 2.0**10


@pytest.fixture(autouse=True)
def fresh_state():
    """Resets accelerate's state, which is global."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def make_optimizer(method, model):
    flat, ours = METHODS[method]
    return flat(model.parameters(), ADAMW, lr=1e-3, **ours)


def use_scaler(accelerator, **options):
    """fp16 with a GradScaler on the CPU, which accelerate itself refuses."""
    accelerator.native_amp, accelerator.scaler = True, GradScaler("cpu", init_scale=SCALE, **options)
    accelerator.state._mixed_precision = "fp16"


def by_hand(method, model, loss_of_batch, batches, precision, accumulate, clip):
    """The plain loop: the passes of every micro-batch, with gradients added up."""
    optimizer = make_optimizer(method, model)
    scaler = GradScaler("cpu", init_scale=SCALE, enabled=precision == "fp16")

    def backward(i):
        loss = loss_of_batch(i)
        scaler.scale(loss).backward()
        return loss.item()

    losses = plain_loop(model, optimizer, backward, batches, scaler, accumulate, clip)
    return model, optimizer, losses, scaler


# --- Trainer -------------------------------------------------------------------------------------------


def make_llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16, pad_token_id=0,
        )
    )  # fmt: skip


def make_texts(count=8):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 32, (count, 8), generator=generator)
    return [{"input_ids": t, "labels": t.clone()} for t in tokens]


class FlatTrainer(FlatMinimaMixin, transformers.Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.items, self.losses = [], []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.items.append(num_items_in_batch)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def training_step(self, *args, **kwargs):
        self.losses.append(super().training_step(*args, **kwargs))
        return self.losses[-1]

    def get_train_dataloader(self):
        return self.accelerator.prepare(torch.utils.data.DataLoader(self.train_dataset, batch_size=2))


def arguments(folder, **options):
    defaults = {
        "output_dir": str(folder), "use_cpu": True, "report_to": [], "max_steps": 4, "per_device_train_batch_size": 2,
        "save_strategy": "no", "disable_tqdm": True, "lr_scheduler_type": "constant", "logging_strategy": "no",
    }  # fmt: skip
    return transformers.TrainingArguments(**{**defaults, **options})


def make_trainer(method, folder, kind=FlatTrainer, texts=8, **options):
    model = make_llama()
    return kind(
        model,
        arguments(folder, **options),
        train_dataset=make_texts(texts),
        optimizers=(make_optimizer(method, model), None),
    )


def plain(method, items, precision="fp32", accumulate=1, clip=1.0, steps=4, factors=None):
    """Without the Trainer; `items`: the numbers of tokens by which it divided each micro-batch's loss."""
    model = make_llama()
    model.train()
    dtype = PRECISIONS[precision]
    data = make_texts()

    def loss(i):
        batch = {key: torch.stack([data[2 * i % 8][key], data[(2 * i + 1) % 8][key]]) for key in data[0]}
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            return model(**batch, num_items_in_batch=items).loss * (factors or {}).get(i, 1.0)

    return by_hand(method, model, loss, steps * accumulate, precision, accumulate, clip)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", METHODS)
def test_the_trainer_equals_a_plain_loop(method, precision, accumulate, tmp_path):
    """Weights and AdamW's state to the bit, with gradients clipped; the clean losses are logged."""
    options = {"bf16": True} if precision == "bf16" else {}
    trainer = make_trainer(method, tmp_path, gradient_accumulation_steps=accumulate, max_grad_norm=0.1, **options)
    if precision == "fp16":
        use_scaler(trainer.accelerator)
    trainer.train()
    model, optimizer, losses, _ = plain(method, trainer.items[0], precision, accumulate, 0.1)
    assert len(set(map(int, trainer.items))) == 1
    assert_same_bits(trainer.model.parameters(), model.parameters())
    ours = flatops.unwrap(trainer.optimizer)
    assert_same_bits(state_tensors(ours), state_tensors(optimizer))
    assert_same_bits(getattr(ours, "fisher", {}).values(), getattr(optimizer, "fisher", {}).values())
    assert [loss.item() for loss in trainer.losses] == losses


@pytest.mark.parametrize("method", ["sam", "rwp", "mrwp"])
def test_an_overflow_skips_the_step(method, tmp_path):
    class Overflowing(FlatTrainer):
        calls = 0

        def compute_loss(self, *args, **kwargs):
            self.calls += 1
            in_second_step = self.calls == 2 if method == "rwp" else self.calls in (3, 4)
            return super().compute_loss(*args, **kwargs) * (1e38 if in_second_step else 1.0)

    trainer = make_trainer(method, tmp_path, Overflowing)
    use_scaler(trainer.accelerator)
    trainer.train()
    model, optimizer, _, scaler = plain(method, trainer.items[0], "fp16", factors={1: 1e38})
    assert trainer.accelerator.scaler.get_scale() == scaler.get_scale() == SCALE / 2
    assert_same_bits(trainer.model.parameters(), model.parameters())
    assert_same_bits(state_tensors(flatops.unwrap(trainer.optimizer)), state_tensors(optimizer))


@pytest.mark.parametrize("precision, accumulate", [("fp32", 1), ("fp16", 3)])
@pytest.mark.parametrize("method", ["sam", "rwp", "marwp"])
def test_resume_mid_epoch_equals_no_interruption(method, precision, accumulate, tmp_path):
    """Two of three or four steps of an epoch, a checkpoint, new objects, the rest: the same bits, shuffled too."""

    class Shuffling(FlatTrainer):
        get_train_dataloader = transformers.Trainer.get_train_dataloader

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    def trainer(folder, **options):
        made = make_trainer(
            method, tmp_path / folder, Shuffling, 8 if accumulate == 1 else 16,  # an epoch ends with two micro-batches
            max_steps=6, gradient_accumulation_steps=accumulate, **options,
        )  # fmt: skip
        if precision == "fp16":
            use_scaler(made.accelerator, growth_interval=3)
        return made

    whole = trainer("whole")
    whole.train()
    first = trainer("part", save_strategy="steps", save_steps=2)
    first.add_callback(Stop())
    first.train()
    second = trainer("part")
    second.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2"))
    assert_same_bits(second.model.parameters(), whole.model.parameters())
    assert_same_bits(state_tensors(flatops.unwrap(second.optimizer)), state_tensors(flatops.unwrap(whole.optimizer)))
    if precision == "fp16":
        scalers = [one.accelerator.scaler.state_dict() for one in (second, whole)]
        assert scalers[0] == scalers[1] and scalers[0]["scale"] == 4 * SCALE


def test_the_trainer_makes_the_optimizer(tmp_path):
    """From a class and its options, with the Trainer's groups for weight decay."""
    options = {"base": ADAMW, "rho": 0.1, "lr": 1e-3}
    trainer = FlatTrainer(
        make_llama(), arguments(tmp_path, weight_decay=0.1), train_dataset=make_texts(),
        optimizer_cls_and_kwargs=(flatops.SAM, options),
    )  # fmt: skip
    trainer.train()
    groups = flatops.unwrap(trainer.optimizer).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0] and groups[1]["rho"] == 0.1


def test_without_the_mixin_there_is_a_warning(tmp_path):
    trainer = make_trainer("sam", tmp_path, transformers.Trainer)
    with pytest.warns(UserWarning, match="without a perturbed pass"):
        trainer.train()


def test_other_optimizers_and_engines_are_refused(tmp_path):
    model = make_llama()
    trainer = FlatTrainer(
        model, arguments(tmp_path), train_dataset=make_texts(), optimizers=(ADAMW(model.parameters()), None)
    )
    with pytest.raises(TypeError, match="flatops optimizers"):
        trainer.train()
    trainer.accelerator.state.distributed_type = accelerate.DistributedType.DEEPSPEED
    with pytest.raises(ValueError, match="DEEPSPEED"):
        trainer.training_step(model, {})


@pytest.mark.parametrize("method", ["sam", "rwp"])
def test_an_exception_restores_the_weights(method, tmp_path):
    class Failing(FlatTrainer):
        def compute_loss(self, *args, **kwargs):
            if flatops.unwrap(self.optimizer).is_perturbed:
                raise KeyboardInterrupt
            return super().compute_loss(*args, **kwargs)

    trainer = make_trainer(method, tmp_path, Failing)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert_same_bits(trainer.model.parameters(), make_llama().parameters())


# --- accelerate ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_accelerates_loop(method, precision, accumulate):
    """flatops.passes inside accelerator.accumulate gives the bits of a loop without either."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    if precision == "fp16":
        use_scaler(accelerator)
    net = make_net()
    model, optimizer = accelerator.prepare(net, make_optimizer(method, net))
    for i in range(4):
        with accelerator.accumulate(model):
            for one_pass in flatops.passes(optimizer, model):
                with one_pass:
                    accelerator.backward(loss_of(model, make_batch(i)))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()

    other = make_net()

    def loss(i):
        x, y = make_batch(i)
        with torch.autocast("cpu", dtype=torch.float16, enabled=precision == "fp16"):
            output = other(x)
        return torch.nn.functional.cross_entropy(output.float(), y) / accumulate

    _, expected, _, _ = by_hand(method, other, loss, 4, precision, accumulate, 0.1)
    assert_same_bits(net.state_dict().values(), other.state_dict().values())
    ours = flatops.unwrap(optimizer)
    assert_same_bits(state_tensors(ours), state_tensors(expected))
    assert_same_bits(getattr(ours, "fisher", {}).values(), getattr(expected, "fisher", {}).values())


@pytest.mark.filterwarnings("ignore")
def test_the_snippets_of_the_documentation_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_snippets("transformers.md", 2)
