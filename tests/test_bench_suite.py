"""The full suite: its pure parts, a tiny run of each benchmark, and whether the pages match the committed rows."""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flatops.benchmarks import (
    accuracy,
    bench,
    command,
    compare,
    distributed,
    flatness,
    growth,
    machine_code,
    measure,
    memory,
    methods,
    models,
    peers,
    picture,
    suite,
    tables,
    tuning,
)
from flatops.methods import METHODS
from flatops.train import TrainConfig, Trainer

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"


# --- pure parts -------------------------------------------------------------------------------------------------------


def test_a_line_is_fitted_exactly():
    a, b, worst = growth.fit([(n, 5e-6 + 3e-10 * n) for n in (1e5, 1e6, 1e7, 1e9)])
    assert a == pytest.approx(5e-6, rel=1e-6) and b == pytest.approx(3e-10, rel=1e-6) and worst < 1e-9


def test_a_line_is_fitted_by_relative_errors():
    """A distant point that is a tenth too high moves the line no more than a near one does."""
    a, b, worst = growth.fit([(10, 10.0), (1000, 1100.0)])
    assert a + 10 * b == pytest.approx(10) and worst == pytest.approx(0, abs=1e-9)
    *_, worst = growth.fit([(1, 1.0), (10, 10.0), (100, 110.0), (1000, 1000.0)])
    assert 0.04 < worst < 0.1


def test_bytes_within_the_mark():
    def memory_event(ts, size):
        return {"name": "[memory]", "cat": "cpu_instant_event", "ts": ts, "args": {"Bytes": size}}

    mark = {"name": measure.MARK, "cat": "user_annotation", "ts": 10, "dur": 10}
    sizes = [(5, 1000), (11, 8), (12, 4), (13, -8), (14, 2), (25, 1000)]
    events = [mark, *(memory_event(*each) for each in sizes)]
    assert measure.balance(events) == {"allocated": 14, "peak": 12, "kept": 6}


def test_allocations_of_a_call():
    kept = []
    found = measure.allocations(lambda: kept.append(torch.ones(1000) + 1))
    assert found["peak"] >= 8000 and found["kept"] == 4000


def process_row(start):
    return [{"name": "one", "ms": float(abs(os.getpid() - start)), "exact": True}, {"name": "two", "ms": 7.0}]


def test_the_best_of_processes_is_the_minimum_of_each_row():
    one, two = measure.best_of_processes(process_row, os.getpid(), processes=2)
    assert one["name"] == "one" and one["exact"] and 0 < one["ms"] and two == {"name": "two", "ms": 7.0}


ROWS = [
    {"name": "perturb_", "of": "perturb_", "ms": 1.0, "floors": 2.0},
    {"name": "theirs", "of": "perturb_", "ms": 9.0, "floors": 9.0, "times_ours": None},
]


def test_differences_are_relative_to_the_smaller():
    other = [ROWS[0] | {"floors": 2.5}, {"name": "new", "floors": 0.0}]
    found = compare.differences({"rows": ROWS}, {"rows": other})
    assert found["perturb_, perturb_, floors"] == (2.0, 2.5, 0.25)
    assert found["theirs, perturb_, floors"] == (9.0, None, math.inf)
    assert found["new, floors"] == (None, 0.0, math.inf)


def test_differences_of_lists_and_of_negative_values():
    old = {"rows": [{"name": "a", "mean": -0.2, "between": [1.0, 2.0], "above_sgd": {"low": -0.4, "high": 0.1}}]}
    new = {"rows": [{"name": "a", "mean": -0.3, "between": [1.0, 2.5], "above_sgd": {"low": -0.2, "high": 0.1}}]}
    found = {name: each[2] for name, each in compare.differences(old, new).items()}
    assert found == pytest.approx(
        {"a, mean": 0.5, "a, between, 0": 0, "a, between, 1": 0.25, "a, above_sgd, low": 1, "a, above_sgd, high": 0}
    )


def test_the_gain_of_several_threads_is_not_compared():
    gain = [{"name": "perturb_", "threads": threads, "times": 1.7} for threads in (1, 2)]
    assert compare.ratios({"gain": gain}) == {"perturb_, times": 1.7}


def test_a_file_in_only_one_folder_is_named(tmp_path, capsys):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "cpu.json").write_text(json.dumps({"rows": ROWS}))
    (tmp_path / "a/tuning.json").write_text("{}")
    assert compare.main(tmp_path / "a", tmp_path / "b") == 0
    assert f"tuning.json: only in {tmp_path / 'a'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        ({"suite": "full", "model": "resnet18"}, "model: means nothing with suite full"),
        ({"results": Path("x")}, "results: means nothing without suite full"),
        ({"compare": (Path("a"), Path("b")), "rounds": 3}, "rounds: means nothing with compare"),
    ],
)
def test_options_that_would_be_ignored(options, message):
    with pytest.raises(ValueError, match=message):
        command.main(bench.Config(**options))


def test_files_and_folders_are_compared(tmp_path, capsys):
    for folder, floors in (("a", 2.0), ("b", 2.2), ("c", 3.0)):
        (tmp_path / folder).mkdir()
        rows = [ROWS[0] | {"floors": floors}]
        (tmp_path / folder / "cpu.json").write_text(json.dumps({"rows": rows}))
    a, b, c = (tmp_path / name for name in "abc")
    assert command.main(bench.Config(compare=(a, b))) == 0
    assert command.main(bench.Config(compare=(a / "cpu.json", c / "cpu.json"))) == 1
    shown = capsys.readouterr().out
    assert "0 more than 15% apart, the largest 10.0%" in shown and "2 and 3, 50%" in shown


@pytest.mark.parametrize("content", [b"", b"{", b'{"rows": [{"name": "per', b"\xff", b"[]"])
def test_a_damaged_file_of_rows_is_named(tmp_path, content):
    for name, written in (("good.json", json.dumps({"rows": ROWS}).encode()), ("bad.json", content)):
        (tmp_path / name).write_bytes(written)
    with pytest.raises(ValueError, match="bad.json is .*not a file of rows"):
        command.main(bench.Config(compare=(tmp_path / "good.json", tmp_path / "bad.json")))


def test_every_ratio_has_its_own_name():
    for name in suite.QUESTIONS:
        result = committed(name)
        rows = [row for key in ("rows", "checks", "verdicts") for row in result.get(key, [])]
        rows = [row for row in rows if row.get("threads") != 2]
        values = sum(len(compare.numbers(row.get(ratio))) for row in rows for ratio in compare.RATIOS)
        assert len(compare.ratios(result)) == values > 0, name


@pytest.mark.parametrize("value, shown", [(None, ""), (199.4, "199"), (4.44, "4.4"), (0.825, "0.82"), (10, "10")])
def test_numbers(value, shown):
    assert tables.number(value) == shown


def test_a_table():
    assert tables.table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"


def test_the_text_between_the_comments_is_replaced(monkeypatch):
    monkeypatch.setitem(tables.BLOCKS, "speed", lambda results: results["cpu"])
    page = "before\n<!-- bench: speed -->\nold\nlines\n<!-- end -->\nafter <!-- end -->\n"
    new = tables.rewritten(page, {"cpu": "new"})
    assert new == "before\n<!-- bench: speed -->\nnew\n<!-- end -->\nafter <!-- end -->\n"
    assert tables.rewritten(new, {"cpu": "new"}) == new


# --- the pages --------------------------------------------------------------------------------------------------------


def test_pages_and_pictures_are_made_of_the_committed_rows(tmp_path):
    (tmp_path / "docs").mkdir()
    for page in tables.PAGES:
        shutil.copy(ROOT / page, tmp_path / page)
    suite.publish(tmp_path, RESULTS)
    for page in tables.PAGES:
        assert (tmp_path / page).read_text() == (ROOT / page).read_text(), page
    assert {path.name for path in (tmp_path / "docs").glob("*.png")} == set(suite.PICTURES.values())
    for name, picture_name in suite.PICTURES.items():
        with Image.open(ROOT / "docs" / picture_name) as drawn:
            assert drawn.text["rows"] == picture.digest(committed(name)), picture_name


def test_every_block_has_its_place():
    places = [found[1] for page in tables.PAGES for found in tables.BLOCK.findall((ROOT / page).read_text())]
    assert sorted(places) == sorted(tables.BLOCKS)


# --- a tiny run of each question --------------------------------------------------------------------------------------


def committed(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def test_models(monkeypatch):
    shapes = [(16, 3, 3, 3), (1024,), (3, 700)]
    result = models.measure({"tiny": lambda: shapes, models.THREADED[0]: lambda: shapes}, rounds=1, processes=1)
    assert result.keys() == committed("models").keys() and not result["skipped"]
    assert {frozenset(row) for row in result["rows"]} == {frozenset(row) for row in committed("models")["rows"]}
    assert {row["dtype"] for row in result["rows"]} == set(models.DTYPES)
    assert all(row["floors"] > 0 for row in result["rows"])
    monkeypatch.setattr(models, "available_memory", lambda: 0)
    assert len(models.measure({"tiny": lambda: shapes}, processes=1)["skipped"]) == len(models.DTYPES)


def test_several_threads_are_compared_with_one():
    rows = models._rows([(*models.THREADED, [(64, 64)])], threads=2, rounds=1)
    assert {row["threads"] for row in rows if "threads" in row} == {1, 2} and torch.get_num_threads() == 1
    assert {row["name"] for row in rows if "threads" in row} == {
        row["name"] for row in rows if row.get("peer") is False
    }


def test_shapes_of_models_that_timm_lacks():
    count = lambda shapes: sum(map(math.prod, shapes))
    assert count(models.wide_resnet_28_10()) == 36_536_884 and count(models.llama()) == 1_100_048_384


def test_peers():
    result = peers.measure({"cnn": (1, 2)})
    rows = {(row["method"], row["name"]): row for row in result["rows"]}
    kept = committed("peers")
    assert result.keys() == kept.keys() and {(row["method"], row["name"]) for row in kept["rows"]} == set(rows)
    assert all(row["exact"] for (_, name), row in rows.items() if name == "flatops")
    assert not rows["RWP", tables.PAPERS]["exact"]  # w + e - e is not w
    assert rows["RWP", "flatops"]["host_reads"] == rows["SAM", "flatops"]["host_reads"] == 0


def test_every_contender_perturbs():
    """A contender that perturbs nothing would look fast: between its two steps the weights must differ."""
    b = bench.Buffers([(3, 50)], torch.device("cpu"), torch.float32)
    for (method, name), call in peers.contenders(b).items():
        version = b.params[0]._version
        call()
        assert method == peers.PLAIN or b.params[0]._version >= version + 2, (method, name)


def test_memory():
    rows = {(row["method"], row["name"]): row for row in memory.measure("cnn")["rows"]}
    ours, theirs = rows["SAM", "flatops"], rows["SAM", "pytorch_optimizer"]
    assert ours["kept"] == pytest.approx(4) and ours["peak"] < 4.1 and ours["allocated"] < 0.1
    assert theirs["peak"] > 0 and theirs["allocated"] > 0
    assert rows["SSAM", "flatops"]["kept"] == pytest.approx(2, abs=0.1)


def test_growth(monkeypatch):
    monkeypatch.setattr(growth, "MEMORY", 10**5)
    monkeypatch.setattr(growth, "LINEAR", 10**4)
    result = growth.measure((10**4, 10**5, 3 * 10**5), counts=(1, 10), calls=3, processes=1)
    assert result.keys() == committed("growth").keys() and result["sizes"] == [10240, 102400, 307200]
    assert {frozenset(row) for row in result["rows"]} == {frozenset(row) for row in committed("growth")["rows"]}
    assert {row["name"] for row in result["rows"]} == {row["name"] for row in committed("growth")["rows"]}


def test_methods():
    result = methods.measure({"tiny": ("resnet10t", 32, 2)}, rounds=1, processes=2)
    assert result.keys() == committed("methods").keys()
    rows = {row["method"]: row for row in result["rows"]}
    assert {row["method"] for row in committed("methods")["rows"]} <= rows.keys() == METHODS.keys()
    assert rows["sgd"]["to_sgd"] == 1 and all(0 < row["share"] < 1 for name, row in rows.items() if name != "sgd")


def test_distributed():
    """More passes need more collectives; local ascent and parallel m-RWP need as many as SGD."""
    result = distributed.measure(distributed.Config(model="cnn", batch=4, image=8, rounds=1))
    kept = committed("distributed")
    assert result.keys() == kept.keys() and {frozenset(row) for row in result["rows"]} == {
        frozenset(row) for row in kept["rows"]
    }
    calls = {(row["parallel"], row["method"]): row["collectives"] for row in result["rows"]}
    assert calls.keys() == {(row["parallel"], row["method"]) for row in kept["rows"]}
    once = {calls["ddp", name] for name in ("SGD", "RWP", "m-RWP, parallel", "SAM, local ascent")}
    assert once == {calls["ddp", "SGD"]} and calls["ddp", "SAM, synced ascent"] == 2 * calls["ddp", "SGD"]


def test_a_batch_that_is_not_divisible_by_the_processes():
    with pytest.raises(ValueError, match="batch 5 must be divisible by processes 2"):
        distributed.measure(distributed.Config(batch=5))


def test_machine_code(monkeypatch):
    kept = committed("machine_code")
    assert [row["name"] for row in kept["rows"]] == [name for name, *_ in machine_code.OPERATORS]
    found = machine_code.measure()
    assert found.keys() == kept.keys() and {frozenset(row) for row in found["rows"]} <= {
        frozenset(row) for row in kept["rows"]
    }
    monkeypatch.setattr(machine_code, "tool", lambda: None)
    nothing = machine_code.measure()
    assert nothing["rows"] == [] and "no code for sm_90" in tables.machine_code({"machine_code": nothing})


def test_flatness(one_thread):
    result = flatness.measure(1, points=3, iterations=1, batches=1, draws=2)
    kept = committed("flatness")
    assert result.keys() == kept.keys() and {frozenset(row) for row in result["rows"]} == {
        frozenset(row) for row in kept["rows"]
    }
    assert [(row["network"], row["images"]) for row in result["rows"]] == [
        (row["network"], row["images"]) for row in kept["rows"]
    ]


def test_accuracies_are_those_of_the_last_epoch(monkeypatch):
    """For every method and seed; SGD's difference to itself is zero."""
    monkeypatch.setattr(
        accuracy, "options_of", lambda schedule: {"sgd": {"epochs": 1}, "rwp": {"epochs": 2, "sigma": 0.1}}
    )
    monkeypatch.setattr(tuning, "LABEL_NOISE", 0.0)
    runs = [run for seed in (0, 1) for run in accuracy.runs_of(("tuned", seed))]
    sgd, rwp = rows = accuracy.accuracies("tuned", runs)
    plain = Trainer(TrainConfig(epochs=1, seed=1)).run_epoch()["test_accuracy"]
    assert sgd["accuracies"][1] == plain and sgd["above_sgd"] == {"mean": 0, "low": 0, "high": 0}
    assert len(rwp["curve"]) == 2 and rwp["options"] == {"epochs": 2, "sigma": 0.1} and rwp["to_sgd"] > 0
    assert {frozenset(row) for row in rows} == {frozenset(row) for row in committed("accuracy")["rows"]}


def test_an_interval_contains_the_mean_in_95_percent_of_cases():
    random = np.random.default_rng(0)
    found = [accuracy.interval(list(random.normal(3.0, 2.0, 5))) for _ in range(2000)]
    assert 0.93 < np.mean([low < 3 < high for low, high in found]) < 0.97


@pytest.mark.parametrize(
    "low, high, kind, found",
    [
        (0.001, 0.02, "better", "seen"),
        (-0.001, 0.02, "better", "not seen"),
        (-0.02, -0.001, "better", "the opposite"),
        (-0.004, 0.01, "no worse", "seen"),
        (-0.006, 0.01, "no worse", "not seen"),
        (-0.02, -0.006, "no worse", "the opposite"),
    ],
)
def test_verdicts(low, high, kind, found):
    assert accuracy.verdict({"low": low, "high": high}, kind) == found


def test_verdicts_are_paired():
    """Seeds differ much and methods little, but always in the same direction."""
    easy, hard = 0.99, 0.6
    rows = [
        {"schedule": schedule, "method": method, "accuracies": [easy + more, hard + more, easy + more / 2]}
        for schedule in accuracy.SEEDS
        for method, more in (
            ("sgd", 0.0),
            ("rwp", 0.0),
            ("mrwp", 0.009),
            ("arwp", -0.009),
            ("sam", 0.001),
            ("ssam", 0.0),
        )
    ]
    found = {row["claim"]: row["verdict"] for row in accuracy.verdicts(rows)}
    assert found == {
        "SAM is better than SGD": "seen",
        "RWP is better than SGD": "not seen",
        "RWP is no worse than SAM": "seen",
        "SSAM with half of the weights is no worse than SAM": "seen",
        "m-RWP is better than RWP": "seen",
        "m-RWP is no worse than SAM": "seen",
        "ARWP is better than RWP": "the opposite",
    }


def test_all_methods_try_the_same_schedules():
    """The same in every run, without duplicates, and every radius equally often."""
    schedules = {}
    for method, radii in tuning.RADII.items():
        found = tuning.trials(method)
        assert len({tuple(each.items()) for each in found}) == tuning.TRIALS and found == tuning.trials(method)
        schedules[method] = [{name: each[name] for name in tuning.SCHEDULE} for each in found]
        assert all(value in tuning.SCHEDULE[name] for each in schedules[method] for name, value in each.items())
        for name, values in radii.items():
            counts = [sum(each[name] == value for each in found) for value in values]
            assert sum(counts) == tuning.TRIALS and max(counts) - min(counts) <= 1
        TrainConfig(method=method, **found[0])
    assert all(each == schedules["sgd"] for each in schedules.values())


def test_the_committed_search_matches_the_program():
    kept = committed("tuning")
    assert kept["schedule"] == {name: list(values) for name, values in tuning.SCHEDULE.items()}
    for method in tuning.RADII:
        rows = [row for row in kept["rows"] if row["method"] == method]
        tried = [row["options"] for row in rows]
        assert all(each in tried for each in tuning.trials(method))
        assert len({tuple(each.values()) for each in tried}) == len(tried)
        seeds = [len(row["accuracies"]) for row in rows]
        assert seeds == [12] * tuning.FINALISTS + [4] * (len(rows) - tuning.FINALISTS)


@pytest.mark.parametrize("method", ["sgd", "sam", "arwp"])
def test_a_search_tries_every_radius_and_repeats_the_best(method, monkeypatch):
    """With fake training: large rates are best, but small ones look best at first; the largest radius is best."""

    def spread(call, jobs):
        luck = lambda options, seed: 10 * (seed in tuning.SEEDS and options["lr"] == 0.01)
        return [luck(options, seed) + options["lr"] + options.get("sigma", 0) / 100 for _, options, seed in jobs]

    monkeypatch.setattr(tuning, "spread", spread)
    rows = tuning.search(method)
    radii = tuning.RADII[method]
    on_one = [
        row["options"]
        for row in rows
        if {k: row["options"][k] for k in tuning.SCHEDULE} == {k: rows[0]["options"][k] for k in tuning.SCHEDULE}
    ]
    assert len(on_one) == math.prod(map(len, radii.values()))
    assert tuning.TRIALS <= len(rows) <= tuning.TRIALS + len(on_one) - 1
    assert [len(row["accuracies"]) for row in rows] == [12] * tuning.FINALISTS + [4] * (len(rows) - tuning.FINALISTS)
    if "sigma" in radii:
        assert rows[0]["options"]["sigma"] == max(radii["sigma"])


def test_tuning_never_sees_the_test_images(monkeypatch):
    seen = []
    monkeypatch.setattr(
        tuning,
        "run_seed",
        lambda configs, seed: seen.append((configs, seed)) or [{"history": [{"test_accuracy": 1.0}]}],
    )
    assert tuning.accuracy(("sam", {"rho": 0.1, "epochs": 10}, 1003)) == 1.0
    [(configs, seed)] = seen
    assert configs["sam"].validation == 0.2 and configs["sam"].rho == 0.1 and seed == 1003
    assert not set(tuning.SEEDS) & set(tuning.MORE_SEEDS) and min(tuning.SEEDS) >= max(accuracy.SEEDS.values())


def test_the_tuned_table_has_what_the_search_found():
    best = accuracy.tuned()
    assert best.keys() == set(tuning.RADII)
    for row in committed("accuracy")["rows"]:
        if row["schedule"] == "tuned":
            assert best[row["method"]].items() <= row["options"].items()


def test_a_full_suite(tmp_path, monkeypatch, capsys):
    """Each benchmark runs in its own process and writes its rows to a folder; README stays unchanged."""
    monkeypatch.setattr(suite, "TIMED", {"cpu": "bench"})
    monkeypatch.setattr(suite, "TOGETHER", {"accuracy": "accuracy", "flatness": "flatness"})
    monkeypatch.setattr(suite, "QUESTIONS", suite.TIMED | suite.TOGETHER)
    monkeypatch.setattr(suite, "answer", stub)
    before = (ROOT / "README.md").read_text()
    assert command.main(bench.Config(suite="full", results=tmp_path / "new")) == 0
    found = {path.stem: json.loads(path.read_text())["asked"] for path in (tmp_path / "new").iterdir()}
    assert found == suite.QUESTIONS
    assert (ROOT / "README.md").read_text() == before


def test_an_interrupted_suite_keeps_old_results(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text("as it was")
    monkeypatch.setattr(suite, "ask", raises_memory_error)
    with pytest.raises(MemoryError):
        command.main(bench.Config(suite="full"))
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def raises_memory_error(modules):
    for module in modules:
        if module == "models":
            raise MemoryError("too small a machine")
        yield {"asked": module}


def stub(module):
    return {"asked": module}
