"""README's picture, from the rows that `flatops bench --json` wrote:

python -m flatops.benchmarks.picture benchmarks/results/cpu.json docs/bench.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def draw(result: dict[str, Any], path: Path) -> None:
    """Bars: what a perturbed pass costs beside plain training, in passes over the weights; ours and the seeds' way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = result["rows"]
    seeds = iter(row["floors"] for row in rows if row["name"] == "the seeds' way")
    rwp, _, sam, *_ = seeds
    by_name = {row["name"]: row["floors"] for row in rows if row["simd"] == result["simd"]}
    pairs = [
        ("RWP\nperturb, restore", rwp, by_name["perturb_, backup, restore_"]),
        ("SAM\nascend, restore", sam, by_name["ascend_, backup, restore_"]),
        ("noise alone", by_name["torch.Tensor.normal_"], by_name["normals alone"]),
    ]
    figure, axes = plt.subplots(figsize=(8, 2.8), layout="constrained")
    for i, (_, theirs, ours) in enumerate(pairs):
        for y, value, color in ((i - 0.19, theirs, "0.75"), (i + 0.19, ours, "tab:blue")):
            axes.barh(y, value, 0.36, color=color)
            axes.text(value, y, f" {value:.1f}", va="center", fontsize=9)
    axes.set_yticks(range(len(pairs)), [name for name, _, _ in pairs])
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("floors: reads and writes of all weights, one thread; less is better")
    axes.set_title(
        f"{result['model']}, {result['weights'] / 1e6:.1f} million weights, {result['machine']}", fontsize=10
    )
    axes.barh(0, 0, color="0.75", label="research scripts (noise: torch.normal_)")
    axes.barh(0, 0, color="tab:blue", label="flatops")
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
