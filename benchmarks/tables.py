"""The tables about speed in README and docs, from the measured rows: no figure is typed by hand.

A page marks each table with a pair of comments, and everything between them is replaced:

    <!-- bench: NAME -->
    <!-- end -->
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flatops.benchmarks.machine_code import MODELS, microseconds
from flatops.methods import METHODS
from flatops.train.report import describe_options

Results = dict[str, dict[str, Any]]  # by name, as in suite.QUESTIONS
PAGES = ("README.md", *(f"docs/{page}.md" for page in ("performance", "evidence", "landscape", "distributed")))
BLOCK = re.compile(r"(<!-- bench: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
HALF = 0.55  # up to this ratio, a time counts as half
PAPERS, FOREACH = "the papers' code", "torch's foreach"

# Why an operator takes longer than its memory traffic.
BETWEEN = {
    "perturb_": "compute-bound: Philox and Box–Muller",
    "perturb_, backup, restore_": "compute-bound, only partly hidden behind the backup's stores",
    "grad_norm": "a core reads alone at a lower bandwidth than it reads and writes",
    "ascend_, backup": "memory-bound",
    "normals alone": "compute-bound",
    "topk_mask, half": "one pass, selection among candidates, the sample",
    "topk_mask, 5 %": "the same with fewer candidates",
    "topk_mask, 80 % zeros": "a second pass over part of the scores, no candidates",
    "topk_mask, all equal": "the same",
    "ascend_, half masked, backup": "compressing the backup",
    "regrow_mask_, a tenth": "two selections; Philox words for all weights",
}


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table with the first column left-aligned."""
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] + ["---:"] * (len(lines[0]) - 1))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None) -> str:
    """Two significant digits, or all digits before the point if more; empty for None."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.1f}" if abs(value) >= 1 else f"{value:.2g}"


def where(result: dict[str, Any]) -> str:
    """Machine, versions, commit and date in one line, and the command."""
    about = f"{result['machine']}, {result['simd']}, torch {result['torch']}, Python {result['python']}"
    when = f"commit {result['commit']}, {result['date'][:10]}"
    return f"`flatops bench --suite full` on {about}; {when}."


def named(rows: list[dict[str, Any]], **fields: Any) -> dict[str, Any] | None:
    """The first row with these values, or None."""
    return next((row for row in rows if all(row.get(k) == v for k, v in fields.items())), None)


def speed(results: Results) -> str:
    """README's table: flatops and other implementations, in floors."""
    cpu, peers, growth = results["cpu"], results["peers"], results["growth"]
    rows = cpu["rows"]

    def method(name: str) -> list[str]:
        rows = [row for row in peers["rows"] if row["model"] == "resnet50" and row["method"] == name]
        of = lambda *who: min((row["floors"] for row in rows if row["name"] in who), default=None)
        ours = of("flatops")
        theirs = [of("pytorch_optimizer", "pytorch_optimizer, foreach"), of(FOREACH), of(PAPERS)]
        return [name, *map(number, [ours, *theirs, min(filter(None, theirs)) / ours])]

    columns = ["flatops", "pytorch_optimizer", FOREACH, "research scripts", "the fastest of these to flatops"]
    mask, noise = (named(rows, name=name) for name in ("topk_mask, half", "normals alone"))
    papers_mask, torchs = named(rows, of=mask["name"], name=PAPERS), named(rows, of=noise["name"], peer=True)
    body = [method(name) for name in ("SAM", "ASAM", "SSAM", "RWP")]
    body += [
        ["SSAM: a mask of half the weights", number(mask["floors"]), "", "", number(papers_mask["floors"]),
         number(papers_mask["floors"] / mask["floors"])],
        ["noise alone", number(noise["floors"]), "", f"{number(torchs['floors'])} (`normal_`)", "",
         number(torchs["floors"] / noise["floors"])],
    ]  # fmt: skip
    line = named(growth["rows"], name="perturb_, backup, restore_")
    return "\n\n".join(
        [
            table(["a perturbed pass, entered and left", *columns], body),
            f"Cost grows as a line: `perturb_` with backup and `restore_` take {line['ns_per_weight']:.2f} ns "
            f"a weight, {number(line['us_per_call'])} µs a call and {number(line['us_per_tensor'])} µs a tensor, "
            f"and less in a cache. {where(cpu)}",
        ]
    )


def operators(results: Results) -> str:
    """Every operator: bytes, limit and floors."""
    cpu = results["cpu"]
    body = []
    for row in cpu["rows"][1:]:
        ours = named(cpu["rows"], name=row["of"])
        label = f"`{row['name']}`" if not row["peer"] else f"{row['name']}: `{row['of']}`"
        level = ", AVX2 forced" if row["simd"] != cpu["simd"] else ""
        note = f"{number(row['floors'] / ours['floors'])} × flatops" if row["peer"] else BETWEEN.get(row["name"], "")
        figures = [row["bytes_per_weight"], row["floors_by_bytes"], row["must"], row["floors"]]
        counts = [str(row["operations"]), str(row["host_reads"])]
        body.append([label + level, *map(number, figures), *counts, note])
    head = [
        "operator",
        "bytes per weight",
        "floors by bytes",
        "limit",
        "floors measured",
        "operations",
        "host syncs",
        "notes",
    ]
    also = [f"- {c['name']}: {number(c['value'])} (limit: {c['sign']} {c['must']:g})." for c in cpu["checks"]]
    return "\n\n".join([table(head, body), "\n".join(also), where(cpu)])


def models(results: Results) -> str:
    """Floors of each operator, a row per model and dtype."""
    result = results["models"]
    names = list(dict.fromkeys((row["of"], row["name"]) for row in result["rows"][1:] if row["name"] != "floor"))
    cases = dict.fromkeys((row["model"], row["dtype"]) for row in result["rows"])
    body = []
    for model, dtype in cases:
        of = lambda **fields: named(result["rows"], model=model, dtype=dtype, **fields)
        millions = number(of(name="floor")["weights"] / 1e6)
        found = [of(of=operator, name=name) for operator, name in names]
        body.append([f"{model}, {millions} million, {dtype}", *(number(row and row["floors"]) for row in found)])
    head = [f"`{name}`" if name == of else name for of, name in names]
    gain = ", ".join(f"`{row['name']}` {number(row['times'])}" for row in result["gain"] if row["name"] != "floor")
    more = f"{result['threads']} threads against one, ResNet-50, wall-clock time: {gain}." if gain else ""
    skipped = f"Not enough memory for: {'; '.join(result['skipped'])}." if result["skipped"] else ""
    return "\n\n".join(filter(None, [table(["", *head], body), more, skipped, where(result)]))


def peers(results: Results) -> str:
    """Whole perturbed passes of optimizers, on a large and on a tiny model."""
    result = results["peers"]
    body = []
    for row in result["rows"]:
        if row["model"] == "resnet50":
            tiny = named(result["rows"], model="cnn", method=row["method"], name=row["name"])
            exact = "" if row["times_ours"] is None else "yes" if row["exact"] else "no"
            body.append(
                [row["method"], row["name"], number(row["floors"]), number(row["times_ours"]), exact]
                + [str(row["operations"]), str(row["host_reads"]), number(tiny["ms"] * 1e3), number(tiny["times_ours"])]
            )
    head = ["method", "implementation", "floors", "× flatops", "restored bit for bit", "operations", "host syncs"]
    return "\n\n".join([table([*head, "small CNN, µs", "small CNN, × flatops"], body), where(result)])


def memory(results: Results) -> str:
    """Bytes per weight of a perturbed pass."""
    result = results["memory"]
    body = [
        [row["method"], row["name"], *(f"{row[k]:.1f}" for k in ("peak", "kept", "allocated"))]
        for row in result["rows"]
    ]
    head = ["method", "implementation", "peak", "kept between passes", "allocated by each later pass"]
    return "\n\n".join([table(head, body), where(result)])


def growth(results: Results) -> str:
    """The lines fitted over sizes."""
    result = results["growth"]
    body = [
        [f"`{row['name']}`", f"{row['ns_per_weight']:.3f}", f"{row['floors']:.2f}", f"{row['worst']:.0%}"]
        + [" to ".join(f"{each:.2f}" for each in row["between"])]
        + [number(row["us_per_call"]), number(row["us_per_tensor"])]
        for row in result["rows"]
    ]
    head = ["", "b, ns per weight", "b, floors", "largest deviation from the line, from 10 million on"]
    head += ["100,000 to 10 million, relative to fixed + b·n", "fixed cost, µs per call", "µs per tensor"]
    sizes = f"{min(result['sizes']):,} to {max(result['sizes']):,} weights."
    return "\n\n".join([table(head, body), f"{sizes} {where(result)}"])


def points(value: float) -> str:
    """A signed difference in percentage points."""
    return f"{100 * value:+.1f}".replace("-", "−")


def between(row: dict[str, float]) -> str:
    """A difference of accuracies with its 95 % interval."""
    return f"{points(row['mean'])} ({points(row['low'])} to {points(row['high'])})"


def accuracy(results: Results, schedule: str) -> str:
    """A table of accuracies: with one schedule for all, or with each method's own options."""
    result = results["accuracy"]
    rows = [row for row in result["rows"] if row["schedule"] == schedule]
    best = max(row["mean"] for row in rows)
    body = []
    for row in rows:
        mean = f"{100 * row['mean']:.1f} ± {100 * row['deviation']:.1f} %"
        others = between(row["above_sgd"]) if row["method"] != "sgd" else ""
        mean = f"**{mean}**" if row["mean"] == best else mean
        label, options = METHODS[row["method"]].label, describe_options(row["options"]).replace("  ", ", ")
        body.append([label, options, mean, others, f"{row['to_sgd']:.2f}"])
    head = ["", "options", "test accuracy", "above SGD, paired, 95 %", "training's time, SGD = 1"]
    return "\n\n".join([table(head, body), f"{result['seeds'][schedule]} seeds. {where(result)}"])


def fixed(results: Results) -> str:
    """Accuracies with one schedule for all."""
    return accuracy(results, "fixed")


def tuned(results: Results) -> str:
    """Accuracies with options found on held-out images."""
    return accuracy(results, "tuned")


def steps(results: Results) -> str:
    """A step of each method relative to SGD's."""
    result = results["methods"]
    networks = list(dict.fromkeys(row["network"] for row in result["rows"]))
    body = []
    for method in dict.fromkeys(row["method"] for row in result["rows"]):
        found = [named(result["rows"], network=network, method=method) for network in networks]
        body.append([METHODS[method].label, *(f"{row['to_sgd']:.2f}" for row in found)])
        body[-1] += [f"{row['share']:.1%}" if row["share"] is not None else "" for row in found]
    head = [
        "",
        *(f"{network}, SGD = 1" for network in networks),
        *(f"{network}: flatops' share" for network in networks),
    ]
    sizes = [named(result["rows"], network=network) for network in networks]
    about = "; ".join(f"{row['network']}: {row['batch']} images of {row['side']}×{row['side']}" for row in sizes)
    return "\n\n".join([table(head, body), f"{about}; float32, one thread. {where(result)}"])


def distributed(results: Results) -> str:
    """A step on several processes relative to SGD's."""
    result = results["distributed"]
    config, rows = result["config"], result["rows"]
    kinds = {"ddp": "DDP", "fsdp": "FSDP2"}
    body = []
    for method in dict.fromkeys(row["method"] for row in rows):
        found = [named(rows, method=method, parallel=kind) for kind in kinds]
        body.append(
            [method, *(cell for row in found for cell in (step_of(row), str(row["collectives"]) if row else ""))]
        )
    about = f"{config['model']}, {config['image']}×{config['image']}, batch {config['batch']}"
    about += f", {config['processes']} processes"
    head = [
        about,
        *(cell for label in kinds.values() for cell in (f"{label}: step, SGD = 1 (quartiles)", "collectives")),
    ]
    return "\n\n".join([table(head, body), where(result)])


def step_of(row: dict[str, Any] | None) -> str:
    """A step relative to SGD's with its quartiles; for SGD itself, its time."""
    if row is None:
        return ""
    return f"{row['to_sgd']:.2f} " + (
        f"({row['ms']:.0f} ms)" if row["method"] == "SGD" else f"({row['low']:.2f} to {row['high']:.2f})"
    )


def machine_code(results: Results) -> str:
    """What the machine code for an H100 promises."""
    result = results["machine_code"]
    body = [
        [row["name"], str(row["registers"]), row["loads"], row["stores"], f"{row['instructions']:.1f}"]
        + [microseconds(pair) for pair in row["us"].values()]
        for row in result["rows"]
    ]
    head = ["operator", "registers", "loads", "stores", "instructions per weight"]
    head += [f"{model}: arithmetic, memory (µs)" for model in MODELS]
    return "\n\n".join([table(head, body) if body else "This build has no code for sm_90.", where(result)])


def verdicts(results: Results) -> str:
    """The papers' claims, and whether they hold here."""
    found = results["accuracy"]["verdicts"]
    step = {(row["network"], row["method"]): row["to_sgd"] for row in results["methods"]["rows"]}
    halves = {network: step[network, "rwp"] / step[network, "sam"] for network, _ in step}
    seen = "seen" if max(halves.values()) <= HALF else "not seen"
    shown = ", ".join(f"{value:.2f} ({network})" for network, value in halves.items())
    body = [[f"RWP takes half of SAM's time ({arxiv('2211.11489')})", f"{shown} of SAM's step", f"**{seen}**"]]
    for claim in dict.fromkeys(row["claim"] for row in found):
        for row in (row for row in found if row["claim"] == claim):
            label = f"{claim} ({arxiv(row['paper'])})" if row["schedule"] == "fixed" else ""
            body.append([label, f"{row['schedule']}: {between(row)}", f"**{row['verdict']}**"])
    return "\n\n".join(
        [
            table(["claim", "measured (accuracies: paired difference, 95 % interval)", "verdict"], body),
            where(results["accuracy"]),
        ]
    )


def flatness(results: Results) -> str:
    """The minima of SGD and of m-RWP."""
    result = results["flatness"]
    sigma, rho = (result["config"][name][-2] for name in ("sigmas", "rhos"))
    body = [
        [f"{row['network']}, {row['images']} images", f"{row['test_accuracy']:.1%}", f"{row['loss']:.2g}"]
        + [" and ".join(map(number, row["ends"])), f"{number(row['average'][-2])} ± {row['error'][-2]:.1g}"]
        + [number(row["worst_rise"][-2]), number(row["eigenvalue"])]
        for row in result["rows"]
    ]
    head = ["", "test accuracy", "loss", "loss at a = −1 and 1", f"average rise, σ {sigma:g}"]
    return "\n\n".join([table([*head, f"worst rise, ρ {rho:g}", "top eigenvalue"], body), where(result)])


def arxiv(number: str) -> str:
    """A link to a paper."""
    return f"[{number}](https://arxiv.org/abs/{number})"


BLOCKS: dict[str, Callable[[Results], str]] = {
    block.__name__: block
    for block in (
        speed,
        operators,
        models,
        peers,
        memory,
        growth,
        fixed,
        tuned,
        steps,
        distributed,
        machine_code,
        verdicts,
        flatness,
    )
}


def rewritten(text: str, results: Results) -> str:
    """A page with its tables replaced by those of these results."""
    return BLOCK.sub(lambda found: f"{found[1]}{BLOCKS[found[2]](results)}\n{found[3]}", text)


def write(root: Path, results: Results) -> None:
    """Rewrites the tables of every page."""
    for page in PAGES:
        path = root / page
        path.write_text(rewritten(path.read_text(encoding="utf-8"), results), encoding="utf-8")
