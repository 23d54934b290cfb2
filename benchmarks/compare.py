"""Do two runs agree? The ratios that differ between two files of rows, or between the files of two folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RATIOS = (
    *("floors", "times_ours", "to_sgd", "share", "times", "value", "between", "peak", "kept", "allocated"),
    *("mean", "above_sgd", "loss", "ends", "average", "worst_rise", "eigenvalue", "instructions"),
)
AGREE = 0.15  # relative difference that two runs on one machine may have


def ratios(result: dict[str, Any]) -> dict[str, float]:
    """Every ratio of a result, named by the text fields of its row.

    The gain of several threads is left out: wall-clock time varies by half with the load on the second core.
    """
    lists = [rows for rows in result.values() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
    return {
        ", ".join([*(value for value in row.values() if isinstance(value, str)), ratio, *place]): number
        for rows in lists
        for row in rows
        if row.get("threads", 1) == 1
        for ratio in RATIOS
        for place, number in numbers(row.get(ratio))
    }


def numbers(value: Any) -> list[tuple[list[str], float]]:
    """All numbers in a value, which may be a list or a dict, each with its path."""
    if value is None:
        return []
    if isinstance(value, (list, dict)):
        parts = enumerate(value) if isinstance(value, list) else value.items()
        return [([str(key)], each) for key, each in parts]
    return [([], value)]


def differences(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[float | None, float | None, float]]:
    """Name to both values and their difference relative to the smaller one, infinite if only one side has the name."""
    old, new = ratios(a), ratios(b)
    found = {}
    for name in old | new:
        x, y = old.get(name), new.get(name)
        apart = 0.0 if x == y else abs(x - y) / min(abs(x), abs(y)) if x and y else float("inf")
        found[name] = (x, y, apart)
    return found


def read(path: Path) -> dict[str, Any]:
    """Reads a file of rows.

    Raises:
        ValueError: the file is damaged, or not a file of rows.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged or not a file of rows: {error}") from error
    if not isinstance(result, dict) or "rows" not in result:
        raise ValueError(f"{path} is not a file of rows of flatops bench")
    return result


def main(a: Path, b: Path) -> int:
    """Prints the ratios that differ by more than AGREE and each file's largest difference. Returns 1 if any do."""
    pairs = [(a, b)]
    if a.is_dir() and b.is_dir():
        names, others = ({path.name for path in folder.glob("*.json")} for folder in (a, b))
        pairs = [(a / name, b / name) for name in sorted(names & others)]
        for name in sorted(names ^ others):
            print(f"{name}: only in {a if name in names else b}")
    status = 0
    for old, new in pairs:
        found = differences(read(old), read(new))
        apart = {name: each for name, each in found.items() if each[2] > AGREE}
        largest = max((each[2] for each in found.values()), default=0.0)
        print(f"{new.name}: {len(found)} ratios, {len(apart)} more than {AGREE:.0%} apart, the largest {largest:.1%}")
        for name, (x, y, far) in sorted(apart.items(), key=lambda item: -item[1][2]):
            print(f"  {name}: {_shown(x)} and {_shown(y)}, {far:.0%}")
        status |= bool(apart)
    return status


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"
