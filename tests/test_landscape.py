"""Loss surfaces, sharpness, eigenvalues and `flatops landscape`, against explicit implementations."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
import torch
from documentation import run_snippets
from models import all_bits, assert_same_bits, loss_of, make_batch, make_net
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from flatops import cli, landscape, perturb, reference
from flatops.landscape import plots
from flatops.landscape.probe import Probe
from flatops.train import TrainConfig, train

pytestmark = pytest.mark.usefixtures("one_thread")


def batches(dtype: torch.dtype = torch.float32) -> list:
    """Of different sizes: the mean is over samples."""
    return [make_batch(0, dtype, 8), make_batch(1, dtype, 5)]


def mean_loss(model: nn.Module, pairs: list) -> float:
    model.eval()
    with torch.no_grad():
        return float(
            sum(loss_of(model, pair).double() * len(pair[1]) for pair in pairs) / sum(len(y) for _, y in pairs)
        )


def explicit(w: torch.Tensor, draw: int, index: int, seed: int = 0) -> torch.Tensor:
    """Li et al.'s direction in plain float64 from the reference's normals, filter by filter."""
    key = torch.tensor(seed)
    filters = w.shape[0] if w.dim() > 1 else 1
    z = reference.normals(filters, w.numel() // filters, key, torch.tensor(draw), index).double()
    flat = w.detach().contiguous().double().reshape(filters, -1)
    return (z / z.norm(dim=1, keepdim=True) * flat.norm(dim=1, keepdim=True)).reshape(w.shape)


def trained(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """In training mode, with changed statistics and one-dimensional parameters."""
    model = make_net(seed, dtype)
    model(make_batch(5, dtype)[0])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.rand_like(p))
    return model


class Bowl(nn.Module):
    """Half the weighted squared distance of its weights from their initial values, for any input."""

    def __init__(self, *shape: int, steep: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(*shape, dtype=torch.float64))
        self.start, self.steep = self.weight.detach().clone(), steep

    def forward(self, x):
        return 0.5 * self.steep * (self.weight - self.start).square().sum()


def output_as_loss(output, target):
    return output


NOTHING = [(torch.zeros(1), torch.zeros(1))]


# --- directions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (5, 7), (3, 1), (6,), (1,), (), (2, 0), (0,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_direction_is_normalised_filter_by_filter(shape, dtype):
    w = torch.randn(shape).to(dtype)
    d = landscape.direction(w, seed=3, draw=2, index=1)
    assert d.dtype == torch.float32 and d.shape == w.shape
    if w.numel():
        torch.testing.assert_close(d.double(), explicit(w, 2, 1, seed=3), rtol=1e-5, atol=1e-6)
        rows = (lambda t: t.flatten(1)) if w.dim() > 1 else (lambda t: t.reshape(1, -1))
        torch.testing.assert_close(rows(d.double()).norm(dim=1), rows(w.double()).norm(dim=1), rtol=1e-5, atol=1e-6)


def test_a_filter_of_zeros_stays_and_the_layout_does_not_matter():
    w = torch.randn(4, 3, 3, 3)
    w[1] = 0
    d = landscape.direction(w, seed=0, draw=0)
    assert not d[1].any() and d[0].any()
    assert torch.equal(landscape.direction(w.to(memory_format=torch.channels_last), seed=0, draw=0), d)


# --- surfaces ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("all_parameters", [False, True])
def test_a_surface_equals_that_of_stored_directions(all_parameters):
    model = trained()
    found = landscape.surface(
        model, F.cross_entropy, batches(), points=3, radius=0.5, seed=7, draws=(4, 1), all_parameters=all_parameters
    )
    assert found.axes == [[-0.5, 0.0, 0.5]] * 2
    twin = trained()
    start = [p.detach().double() for p in twin.parameters()]
    for i, a in enumerate(found.axes[0]):
        for j, b in enumerate(found.axes[1]):
            with torch.no_grad():
                for index, (p, w) in enumerate(zip(twin.parameters(), start)):
                    if all_parameters or p.dim() > 1:
                        p.copy_(w + a * explicit(w, 4, index, 7) + b * explicit(w, 1, index, 7))
            assert found.losses[i][j] == pytest.approx(mean_loss(twin, batches()), rel=1e-5)
    assert found.losses[1][1] == pytest.approx(mean_loss(trained(), batches()), rel=1e-12)
    line = landscape.surface(
        model, F.cross_entropy, batches(), points=3, radius=0.5, seed=7, draws=[4], all_parameters=all_parameters
    )
    assert line.losses == [row[1] for row in found.losses]


def test_a_bowl_is_a_bowl_along_every_direction():
    """L(w + a d) = a^2 / 2 sum ||w_f||^2; in a plane plus a b d_1.d_2."""
    bowl = Bowl(6, 10)
    norm = float(bowl.start.square().sum())
    line = landscape.surface(bowl, output_as_loss, NOTHING, points=9, radius=2.0, draws=[5])
    np.testing.assert_allclose(line.losses, [0.5 * a * a * norm for a in line.axes[0]], rtol=1e-6, atol=1e-12)
    assert line.losses[4] == 0
    plane = landscape.surface(bowl, output_as_loss, NOTHING, points=3)
    between = float((explicit(bowl.start, 0, 0) * explicit(bowl.start, 1, 0)).sum())
    want = [[0.5 * norm * (a * a + b * b) + a * b * between for b in (-1, 0, 1)] for a in (-1, 0, 1)]
    np.testing.assert_allclose(plane.losses, want, rtol=1e-6, atol=1e-9)


def test_surfaces_repeat_with_the_seed_and_differ_between_seeds():
    model = trained()
    first, again, other = (
        landscape.surface(model, F.cross_entropy, batches(), points=3, draws=[0], seed=seed) for seed in (0, 0, 1)
    )
    assert first == again and first.losses != other.losses and first.losses[1] == other.losses[1]


def test_frozen_parameters_move_too():
    model, frozen = trained(), trained().requires_grad_(False)
    assert landscape.surface(frozen, F.cross_entropy, batches(), points=3) == landscape.surface(
        model, F.cross_entropy, batches(), points=3
    )


def test_channels_last_and_bfloat16_have_the_same_directions():
    found = {}
    for name, model, dtype in (
        ("plain", trained(), torch.float32),
        ("last", trained().to(memory_format=torch.channels_last), torch.float32),
        ("short", trained().bfloat16(), torch.bfloat16),
    ):
        before = all_bits(model.parameters())
        found[name] = landscape.surface(model, F.cross_entropy, batches(dtype), points=3, radius=0.5).losses
        assert_same_bits(all_bits(model.parameters()), before)
    np.testing.assert_allclose(found["last"], found["plain"], rtol=1e-5)
    np.testing.assert_allclose(found["short"], found["plain"], rtol=0.05)


def test_autocast_does_not_remember_weights_that_have_moved():
    model = trained()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = landscape.surface(model, F.cross_entropy, batches(), points=3, draws=[0])
    assert len(set(found.losses)) == 3


def test_losses_that_are_not_finite_are_kept():
    def breaks(output, target):
        return output + (math.nan if output > 1 else 0)

    line = landscape.surface(Bowl(2, 2), breaks, NOTHING, points=3, radius=10.0, draws=[0])
    assert math.isnan(line.losses[0]) and line.losses[1] == 0 and math.isnan(line.losses[2])


# --- everything is restored --------------------------------------------------------------------------


def every_measure(model: nn.Module, loss_fn) -> list:
    told = (model, loss_fn, batches())
    return [
        lambda: landscape.surface(*told, points=3),
        lambda: landscape.surface(*told, points=3, draws=[0], all_parameters=True),
        lambda: landscape.sharpness(*told, draws=2, steps=1),
        lambda: landscape.top_eigenvalues(*told, iterations=3),
    ]


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("measure", range(4))
def test_weights_buffers_modes_and_gradients_are_restored(measure, error):
    """Wherever the loss raises, even in the middle of an ascent; a frozen layer in evaluation mode stays so."""
    for moment in range(1, 8, 3) if error else [0]:
        model = trained()
        model.features[1].eval()
        model.head.bias.requires_grad_(False)
        loss_of(model, make_batch(2)).backward()
        before = all_bits([*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)])
        buffers, modes = all_bits(model.buffers()), [m.training for m in model.modules()]
        calls = 0

        def loss_fn(output, target):
            nonlocal calls
            calls += 1
            if calls == moment:
                raise error
            model.features[4].num_batches_tracked.add_(1)  # as an unusual layer may do
            return F.cross_entropy(output, target)

        call = every_measure(model, loss_fn)[measure]
        if error and moment <= 6:
            with pytest.raises(error):
                call()
        elif not error:
            call()
        after = all_bits([*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)])
        assert_same_bits(after, before)
        assert_same_bits(all_bits(model.buffers()), buffers)
        assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize("measure", [landscape.surface, landscape.sharpness])
def test_an_interrupt_on_any_line_restores_the_weights(measure):
    """Ctrl-C before every line of flatops/landscape in turn."""
    quick = {"points": 3, "draws": [0]}
    if measure is landscape.sharpness:
        quick = {"sigmas": [0.1], "rhos": [0.1], "draws": 1, "steps": 1}
    here = str(Path(landscape.__file__).parent)
    model = nn.Linear(3, 2)
    before, line, interrupted = all_bits(model.parameters()), 0, True
    while interrupted:
        line, interrupted, seen = line + 1, False, 0

        def trace(frame, event, argument):
            nonlocal seen, interrupted
            if not frame.f_code.co_filename.startswith(here):
                return None
            seen += event == "line"
            if event == "line" and seen == line:
                interrupted = True
                raise KeyboardInterrupt
            return trace

        try:
            sys.settrace(trace)
            measure(model, F.cross_entropy, [(torch.ones(1, 3), torch.zeros(1, dtype=torch.long))], **quick)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
            torch.set_grad_enabled(True)  # an interrupt can keep torch.no_grad() from being undone
        assert_same_bits(all_bits(model.parameters()), before)
    assert line > 50


# --- sharpness -------------------------------------------------------------------------------------------


def test_average_sharpness_is_the_mean_over_perturbed_losses():
    model = trained()
    found = landscape.sharpness(model, F.cross_entropy, batches(), sigmas=[0.02, 0.1], draws=3, seed=5, rhos=[0.1])
    loss = mean_loss(model, batches())
    assert found.loss == pytest.approx(loss, rel=1e-12)
    for k, sigma in enumerate(found.sigmas):
        rises = []
        for draw in range(3):
            with perturb(model, sigma, seed=5, draw=draw):
                rises.append(mean_loss(model, batches()) - loss)
        assert found.average[k] == pytest.approx(fmean(rises), rel=1e-9)
        assert found.error[k] == pytest.approx(stdev(rises) / math.sqrt(3), rel=1e-9)


def test_noise_in_a_bowl_raises_the_loss_as_expected():
    """E = sigma^2 / 2 sum_f n_f ||w_f||^2, here within four standard errors."""
    bowl = Bowl(5, 40)
    found = landscape.sharpness(bowl, output_as_loss, NOTHING, sigmas=[0.1], draws=50, rhos=[0.1])
    want = 0.5 * 0.1**2 * 40 * float(bowl.start.square().sum())
    assert abs(found.average[0] - want) < 4 * found.error[0] < 0.2 * want


def test_worst_sharpness_starts_with_sams_ascent_and_stays_in_the_ball():
    model = trained()
    found = landscape.sharpness(model, F.cross_entropy, batches(), sigmas=[0.01], draws=1, rhos=[0.05, 0.5], steps=4)
    assert found.error == [0]
    twin, pairs = trained().eval(), batches()
    params = list(twin.parameters())
    total = sum(loss_of(twin, pair) * len(pair[1]) for pair in pairs) / 13
    slopes = torch.autograd.grad(total, params)
    norm = torch.cat([s.flatten() for s in slopes]).norm()
    start = [p.detach().clone() for p in params]
    for rho, sam, worst in zip(found.rhos, found.sam, found.worst):
        with torch.no_grad():
            for p, w, s in zip(params, start, slopes):
                p.copy_(w + rho * s / norm)
        assert sam == pytest.approx(mean_loss(twin, pairs) - found.loss, rel=1e-4)
        assert worst >= sam > 0


def test_the_worst_sharpness_of_an_uneven_bowl():
    """The ascent turns to the steep side: 1/2 h rho^2 + g rho is the maximum."""

    class Uneven(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64))

        def forward(self, x):
            x, y, z = self.weight - 1
            return 0.05 * x + 50 * x * x + 0.1 * y + z.sin() * 0.01

    found = landscape.sharpness(Uneven(), output_as_loss, NOTHING, sigmas=[0.1], draws=1, rhos=[0.2], steps=15)
    assert 0.99 * (0.01 + 2.0) < found.worst[0] <= 0.01 + 2.0 + 1e-3
    assert found.worst[0] > 1.5 * found.sam[0]


def test_without_a_gradient_there_is_no_ascent():
    found = landscape.sharpness(Bowl(3, 3), output_as_loss, NOTHING, sigmas=[0.1], draws=1, rhos=[0.1])
    assert found.sam == found.worst == [0]


# --- eigenvalues -----------------------------------------------------------------------------------------


def full_hessian(model: nn.Module, pairs: list) -> torch.Tensor:
    model.eval()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    params = [model.get_parameter(name).detach() for name in names]

    def loss(flat):
        parts = flat.split([p.numel() for p in params])
        weights = {name: part.view(p.shape) for name, part, p in zip(names, parts, params)}
        losses = [F.cross_entropy(torch.func.functional_call(model, weights, (x,)), y) * len(y) for x, y in pairs]
        return sum(losses) / sum(len(y) for _, y in pairs)

    return torch.autograd.functional.hessian(loss, torch.cat([p.reshape(-1) for p in params]), vectorize=True)


def test_eigenvalues_are_those_of_the_full_hessian():
    model = trained(dtype=torch.float64)
    model.features[0].requires_grad_(False)
    pairs = batches(torch.float64)
    exact = torch.linalg.eigvalsh(full_hessian(model, pairs))
    exact = exact[exact.abs().argsort(descending=True)].tolist()
    found = landscape.top_eigenvalues(model, F.cross_entropy, pairs, count=3, iterations=3000, tolerance=1e-7)
    assert [each.value for each in found] == pytest.approx(exact[:3], rel=1e-6)
    assert all(each.residual <= 1e-7 and 1 < each.iterations < 3000 for each in found)
    [short] = landscape.top_eigenvalues(model, F.cross_entropy, pairs, iterations=2, tolerance=1e-7)
    assert short.iterations == 2 and min(abs(short.value - e) for e in exact) <= short.residual * abs(short.value)


def test_float32_and_bfloat16_are_close():
    exact, single, short = (
        landscape.top_eigenvalues(trained(dtype=torch.float64).to(dtype), F.cross_entropy, batches(dtype))[0].value
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    )
    assert single == pytest.approx(exact, rel=1e-3) and short == pytest.approx(exact, rel=0.1)


def test_eigenvalues_of_a_bowl_and_of_a_linear_loss():
    found = landscape.top_eigenvalues(Bowl(2, 2, steep=-3.0), output_as_loss, NOTHING, count=9)
    assert len(found) == 4  # as many as there are weights
    assert [e.value for e in found] == pytest.approx([-3.0] * 4) and found[0].iterations == 1
    linear = landscape.top_eigenvalues(nn.Linear(2, 1), lambda out, y: out.mean(), [(torch.ones(1, 2), torch.ones(1))])
    assert (linear[0].value, linear[0].residual) == (0, 0)


def test_attention_can_be_differentiated_twice():
    torch.manual_seed(0)

    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.lift = nn.Linear(4, 4)

        def forward(self, x):
            q = self.lift(x)[:, None]
            return F.scaled_dot_product_attention(q, q, q).mean((1, 2))

    pairs = [(torch.randn(3, 5, 4), torch.randint(4, (3,)))]
    assert landscape.top_eigenvalues(Attends(), F.cross_entropy, pairs)[0].value > 0


# --- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, options, error, name",
    [
        (landscape.surface, {"points": 4}, ValueError, "points"),
        (landscape.surface, {"points": 1}, ValueError, "points"),
        (landscape.surface, {"radius": 0.0}, ValueError, "radius"),
        (landscape.surface, {"radius": math.nan}, ValueError, "radius"),
        (landscape.surface, {"draws": []}, ValueError, "draws"),
        (landscape.surface, {"draws": [1, 1]}, ValueError, "draws"),
        (landscape.surface, {"seed": -1}, ValueError, "seed"),
        (landscape.surface, {"batches": []}, ValueError, "batches"),
        (landscape.sharpness, {"sigmas": [0.1, -1]}, ValueError, "sigmas"),
        (landscape.sharpness, {"rhos": []}, ValueError, "rhos"),
        (landscape.sharpness, {"draws": 0}, ValueError, "draws"),
        (landscape.sharpness, {"model": trained().requires_grad_(False)}, ValueError, "requires a gradient"),
        (landscape.top_eigenvalues, {"count": 0}, ValueError, "count"),
        (landscape.top_eigenvalues, {"batches": []}, ValueError, "batches"),
        (landscape.surface, {"model": nn.BatchNorm1d(3)}, ValueError, "all_parameters"),
        (landscape.surface, {"model": nn.ReLU(), "all_parameters": True}, ValueError, "model has no parameter"),
        (landscape.surface, {"batches": [torch.ones(3)]}, TypeError, "batches must hold pairs"),
        (landscape.surface, {"batches": [(torch.ones(3), 1)]}, TypeError, "batches must hold pairs"),
    ],
)
def test_errors_name_the_argument(call, options, error, name):
    given = {"model": trained(), "loss_fn": F.cross_entropy, "batches": batches()} | options
    before = all_bits(given["model"].parameters())
    with pytest.raises(error, match=name):
        call(**given)
    assert_same_bits(all_bits(given["model"].parameters()), before)


# --- pictures ----------------------------------------------------------------------------------------------


def some_surface(losses: list, points: int = 3) -> landscape.Surface:
    dimensions = 2 if isinstance(losses[0], list) else 1
    return landscape.Surface([[-1.0, 0.0, 1.0]] * dimensions, losses, 0, list(range(dimensions)))


@pytest.mark.parametrize(
    "losses",
    [
        [1.0, 0.1, 2.0],
        [0.0, -1.0, math.nan],
        [[1.0, 2.0, 30.0], [1.0, 0.01, 1.0], [math.nan, math.inf, 4.0]],
        [[1.0] * 3] * 3,
        [[0.0] * 3] * 3,
        [[math.nan] * 3] * 3,
        [[-1.0, 0.0, 1.0]] * 3,
    ],
    ids=str,
)
def test_everything_can_be_drawn(losses, tmp_path):
    drawn = {f"number {k}": some_surface(losses) for k in range(4)}
    figure = landscape.plot(drawn, tmp_path / "a.png", "four")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    titles = " ".join(axes.get_title() for axes in figure.axes)
    holes = not np.isfinite(np.array(losses)).all() and isinstance(losses[0], list)
    assert ("hatched" in titles) == holes


def test_one_scale_for_all_and_curves_apart_from_planes():
    line, plane = some_surface([1.0, 0.1, 2.0]), some_surface([[5.0] * 3] * 3)
    assert plots.limits([asdict(line), asdict(plane)]) == (0.1, 5.0, True)
    for wrong in ({}, {"line": line, "plane": plane}):
        with pytest.raises(ValueError, match="surfaces"):
            landscape.plot(wrong)


def test_importing_loads_no_matplotlib():
    code = "import sys, flatops; from flatops import landscape; assert not {'matplotlib', 'plotly'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the command -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two networks trained on the same digits, and one with other labels."""
    folder, threads = tmp_path_factory.mktemp("runs"), torch.get_num_threads()
    config = TrainConfig(epochs=1, batch_size=256, label_noise=0.3)
    for name, changes in {"sgd": {"ema": 0.9}, "mrwp": {"method": "mrwp"}, "other": {"seed": 1}}.items():
        train(replace(config, output=folder / name, **changes), Console(file=StringIO()))
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def program():
    """The program, which needs plotly."""
    pytest.importorskip("plotly")
    from flatops.landscape import run

    return run


QUICK = "--points 3 --batches 1 --batch-size 64 --draws 2 --sigmas 0.02 0.1 --rhos 0.1 --iterations 5".split()


def test_the_command_from_two_runs_to_a_picture(runs, program, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["landscape", str(runs / "sgd"), str(runs / "mrwp/best.pt"), "--output", str(out), *QUICK]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "SGD" in printed and "m-RWP" in printed and "64 training and 64 test images" in printed
    result = json.loads((out / "landscape.json").read_text())
    sgd, mrwp = result["networks"]
    assert sgd["name"] == "SGD" and mrwp["name"] == "m-RWP σ 0.05" and sgd["colour"] != mrwp["colour"]
    for network in (sgd, mrwp):
        middle = network["plane"]["losses"][1][1]
        assert network["sharpness"]["training"]["loss"] == middle == network["line"]["training"]["losses"][1]
        assert network["sharpness"]["test"]["loss"] != middle
        assert network["eigenvalues"]["training"][0]["iterations"] >= 1
        assert network["plane"]["draws"] == [0, 1]
    assert (out / "landscape.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "landscape.html").read_text()
    assert len(page) > 1e6 and not re.search("<(script|link)[^>]+(src|href)=", page)  # opens offline
    assert all(text in page for text in ("SGD: test accuracy", " 0.05: test accuracy", "training loss"))
    before = (out / "landscape.png").read_bytes()
    plots.portrait(result, out / "landscape.png")  # the JSON is sufficient
    assert (out / "landscape.png").read_bytes() == before


def test_two_copies_of_a_network_have_the_same_landscape(runs, program, tmp_path):
    from flatops.landscape.config import LandscapeConfig

    quick = {"points": 3, "batches": 1, "batch_size": 64, "draws": 1, "iterations": 5, "all_parameters": True}
    config = LandscapeConfig(runs=(runs / "sgd", runs / "sgd/last.pt"), output=tmp_path, **quick)
    one, two = program.landscape(config, Console(file=StringIO()))["networks"]
    assert [one["name"], two["name"]] == ["SGD (sgd)", "SGD (last.pt)"]
    assert all(one[key] == two[key] for key in ("plane", "line", "sharpness", "eigenvalues"))
    calls = []
    model, pairs = trained(), batches()
    landscape.surface(model, F.cross_entropy, pairs, points=3, on_pass=lambda: calls.append(1))
    for _ in range(2):
        landscape.surface(model, F.cross_entropy, pairs, points=3, draws=[0], on_pass=lambda: calls.append(1))
        landscape.sharpness(model, F.cross_entropy, pairs, draws=1, on_pass=lambda: calls.append(1))
    assert program.passes(config) == len(calls) + 2 * 5


def test_ema_shows_the_averaged_weights(runs, program, tmp_path):
    """As for a checkpoint whose network is the average."""
    from flatops.landscape.config import LandscapeConfig

    state = torch.load(runs / "sgd/last.pt", weights_only=True)
    torch.save(state | {"model": state["ema"]}, tmp_path / "average.pt")
    quick = {"points": 3, "batches": 1, "batch_size": 64, "draws": 1, "iterations": 2}
    config = LandscapeConfig(runs=(runs / "sgd",), ema=True, output=tmp_path, **quick)
    found = program.landscape(config, Console(file=StringIO()))
    [average], title = found["networks"], found["title"]
    [same] = program.landscape(replace(config, runs=(tmp_path / "average.pt",), ema=False), Console(file=StringIO()))[
        "networks"
    ]
    [network] = program.landscape(replace(config, ema=False), Console(file=StringIO()))["networks"]
    assert average["plane"] == same["plane"] != network["plane"] and "the averaged weights of cnn" in title
    assert average["test_accuracy"] == state["history"][-1]["ema_accuracy"]


def test_losses_that_are_not_finite_are_shown_as_holes(runs, program, tmp_path):
    state = torch.load(runs / "sgd/last.pt", weights_only=True)
    state["model"]["1.weight"][0] = 1e38  # overflows away from the centre, if not there
    torch.save(state, tmp_path / "huge.pt")
    out = str(tmp_path / "out")
    assert cli.main(["landscape", str(runs / "sgd"), str(tmp_path / "huge.pt"), "--output", out, *QUICK]) == 0
    result = json.loads((tmp_path / "out/landscape.json").read_text())
    assert None in result["networks"][1]["line"]["training"]["losses"]
    assert (tmp_path / "out/landscape.png").exists() and (tmp_path / "out/landscape.html").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "runs must name at least one checkpoint"),
        (["nowhere"], "no checkpoint at"),
        (["damaged.pt"], "is damaged or not a checkpoint"),
        (["sgd", "other"], "runs of different data"),
        (["changed.pt"], "was trained on"),
        (["stranger.pt"], "has weights of another network"),
        (["sgd", "mrwp", "--ema"], "ema: mrwp has no averaged weights"),
        (["sgd", "--radius", "0"], "radius must be finite and positive, not 0"),
        (["sgd", "--points", "10"], "points must be an odd number of at least 3, not 10"),
        (["sgd", "--batches", "0"], "batches must be at least 1, not 0"),
        (["sgd", "--batch-size", "5000"], "batch_size 5000 exceeds the 1347 training images"),
        (["sgd", "--sigmas", "-1"], "sigmas must be finite and positive"),
        (["sgd", "--seed", "-1"], "seed must be"),
        (["sgd", "--device", "cuda:9"], "no device 'cuda:9' here"),
        (["sgd", "--output", "sgd/last.pt"], "output"),
    ],
)
def test_errors_name_the_argument_and_exit_with_status_2(
    arguments, message, runs, program, tmp_path, capsys, monkeypatch
):
    (runs / "damaged.pt").write_bytes((runs / "sgd/last.pt").read_bytes()[:1000])
    state = torch.load(runs / "sgd/last.pt", weights_only=True)
    torch.save(state | {"data": "3 images"}, runs / "changed.pt")
    torch.save(state | {"model": {"odd": torch.ones(1)}}, runs / "stranger.pt")
    monkeypatch.chdir(runs)
    given = arguments if "--output" in arguments else [*arguments, "--output", str(tmp_path / "out")]
    try:
        status = cli.main(["landscape", *given])
    except SystemExit as exit:  # tyro's, for a value out of range
        status = exit.code
    assert status == 2 and message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "out/landscape.json").exists()


def test_without_plotly_it_first_says_what_to_install(monkeypatch, capsys, runs):
    ours = ("plotly", "flatops.landscape.run", "flatops.landscape.page")
    for name in [name for name in sys.modules if name.startswith(ours)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(landscape, "page", raising=False)
    monkeypatch.setitem(sys.modules, "plotly", None)
    assert cli.main(["landscape", str(runs / "nowhere")]) == 2
    assert "plotly is missing; install it with: pip install 'flatops[landscape]'" in capsys.readouterr().err


def test_the_snippets_of_the_documentation_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_snippets("landscape.md", 1)
    assert (tmp_path / "surface.png").exists()


def test_a_sharded_model_is_refused(monkeypatch):
    from flatops import distributed

    monkeypatch.setattr(distributed, "any_distributed", lambda tensors: True)
    with pytest.raises(ValueError, match="model is sharded"):
        Probe(trained(), F.cross_entropy, batches())


# --- complex weights -----------------------------------------------------------------------------------


class Complex(nn.Module):
    """A complex matrix between real ones, or the same as pairs of reals."""

    def __init__(self, pairs: bool) -> None:
        super().__init__()
        w = torch.view_as_complex(torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0)))
        self.weight = nn.Parameter(torch.view_as_real(w).clone() if pairs else w)

    def forward(self, x):
        w = self.weight if self.weight.is_complex() else torch.view_as_complex(self.weight)
        return (x.to(w.dtype) @ w.T).abs()


def test_complex_weights_move_as_pairs_of_real_ones():
    """Surfaces and sharpness equal those of the pairs, and weights are restored; the Hessian is of real weights."""
    data = [(torch.randn(6, 3), torch.randint(4, (6,)))]
    models = Complex(pairs=False), Complex(pairs=True)
    before = models[0].weight.detach().clone()
    surfaces = [landscape.surface(m, F.cross_entropy, data, points=3).losses for m in models]
    assert surfaces[0] == surfaces[1]
    rises = [landscape.sharpness(m, F.cross_entropy, data, sigmas=[0.1], rhos=[0.1], draws=2, steps=1) for m in models]
    assert rises[0].average == rises[1].average
    assert rises[0].worst == pytest.approx(rises[1].worst, rel=1e-4)
    assert torch.equal(models[0].weight, before)
    with pytest.raises(TypeError, match="complex parameters"):
        landscape.top_eigenvalues(models[0], F.cross_entropy, data)
