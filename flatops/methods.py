"""The table of methods: each one's optimizer and options, and its looks in tables and plots. A method is a row here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from flatops.optim import RWP, SAM, SSAM


@dataclass(frozen=True)
class Method:
    """One row of METHODS.

    Args:
        label: name in tables and plots.
        colour: colour in plots.
        summary: description in `flatops train --help`, which groups neighbours with the same summary.
        optimizer: optimizer class; None for the base optimizer alone.
        options: hyperparameters, with the defaults of `flatops train`, which were chosen on digits.
        fixed: arguments of the class that make it this method.
        timm: defaults in timm's registry that differ from the class's; None: not in the registry.
        ascends: whether a step begins with a clean pass, whose gradient the weights ascend along.
        batches: batches per step, each from its own shuffle of the data; 2 for a clean and a perturbed pass.
    """

    label: str
    colour: str
    summary: str = ""
    optimizer: type[RWP | SAM] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    timm: dict[str, Any] | None = None
    ascends: bool = False
    batches: int = 1

    @property
    def accepts(self) -> tuple[str, ...]:
        """The options of `flatops train` that apply to it: its own, sigma_end and rho_end."""
        return (*self.options, *(f"{name}_end" for name in ("sigma", "rho") if name in self.options))


_MIXED, _ADAPTED = "RWP mixed with the clean gradient", "RWP with noise adapted to the Fisher information"
_SPARSE = {"rho": 0.2, "sparsity": 0.5, "mask": "fisher", "pattern": "global", "fisher_samples": 128}
METHODS = {  # in the order of tables and plots; the colours are colour-blind safe
    "sgd": Method("SGD", "#7f7f7f"),
    "rwp": Method("RWP", "#56b4e9", "random weight perturbation", RWP, {"sigma": 0.03}, timm={}),
    "mrwp": Method("m-RWP", "#0072b2", _MIXED, RWP, {"sigma": 0.05, "lam": 0.5}, timm={"lam": 0.5}, batches=2),
    "arwp": Method("ARWP", "#cc79a7", _ADAPTED, RWP, {"sigma": 0.05, "eta": 0.1, "beta": 0.99}, timm={"eta": 0.1}),
    "marwp": Method(
        "m-ARWP", "#8a3e6b", _ADAPTED, RWP, {"sigma": 0.07, "lam": 0.5, "eta": 0.1, "beta": 0.99}, batches=2
    ),
    "sam": Method("SAM", "#d55e00", "sharpness-aware minimisation", SAM, {"rho": 0.15}, timm={}, ascends=True),
    "asam": Method(
        "ASAM", "#e69f00", "adaptive SAM", SAM, {"rho": 1.0}, fixed={"adaptive": True}, timm={"rho": 0.5}, ascends=True
    ),
    # timm's training script does not call update_mask(): the dynamic mask updates itself.
    "ssam": Method(
        "SSAM", "#009e73", "sparse SAM", SSAM, _SPARSE, timm={"mask": "dynamic", "update_every": 1000}, ascends=True
    ),
}
OPTIONS = tuple(dict.fromkeys(name for method in METHODS.values() for name in method.accepts))  # of all methods


def find(name: str) -> Method:
    """The method of that name, or ValueError."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; choose from {', '.join(METHODS)}")
    return METHODS[name]
