"""Our hyperparameters in the base optimizer's param_groups: range checks, defaults and checkpoints."""

from __future__ import annotations

import abc
import hashlib
from typing import Any

import torch
from torch import Tensor

from flatops import distributed
from flatops.checks import signed
from flatops.optim import scaler
from flatops.optim.run import Run, Stage
from flatops.scalars import number, on, plain
from flatops.weights import DTYPES


class Groups(torch.optim.Optimizer):
    """An optimizer built around a base one, with options of its own in `param_groups`."""

    base: Any = None  # the class that steps
    run: Run

    def _construct(self, params: Any, options: dict[str, Any], base_kwargs: dict[str, Any]) -> None:
        """Builds the base optimizer, with our options in param_groups beside lr."""
        self.run = Run(default_seed="seed" in options and options["seed"] is None)
        if self.run.default_seed:
            options["seed"] = _default_seed()
        self.options = options = {key: plain(value) for key, value in options.items()}
        self._check_group(options)
        scaler.forget(self)
        self.base.__init__(self, params, **base_kwargs)
        if taken := options.keys() & self.defaults.keys():
            raise ValueError(
                f"base {self.base.__name__} has its own hyperparameter {', '.join(sorted(taken))}: use another base"
            )
        if any(options.keys() - group.keys() for group in self.param_groups):
            raise TypeError(
                f"base {self.base.__name__} uses the parameter groups of an optimizer inside it: pass the inner one to "
                f"flatops as base, and the flatops optimizer to {self.base.__name__}"
            )
        self.defaults.update(options)
        params = self._all_params()
        self.run.given = bool(params) and all(isinstance(p, torch.nn.Parameter) for p in params)

    @abc.abstractmethod
    def _check_group(self, group: dict[str, Any]) -> None:
        """Raises for a hyperparameter out of range."""

    def _check_groups(self) -> None:
        """Raises for a hyperparameter out of range in any group: users and schedulers write to them."""
        for group in self.param_groups:
            self._check_group(group)

    def _all_params(self) -> list[Any]:
        return [p for group in self.param_groups for p in group["params"]]

    def _not_while_perturbed(self, what: str) -> None:
        if self.run.in_pass:
            raise RuntimeError(
                f"{what} while the weights are perturbed: leave perturbed() first, or call second_step()"
            )

    def _trainable(
        self, keys: tuple[str, ...], with_grad: bool = False
    ) -> dict[tuple[Any, ...], tuple[list[Tensor], list[int]]]:
        """(device, *values of keys) -> parameters and their positions, for one operator call each.

        Groups with equal values are merged. A tensor equals only itself: comparing values would be a host sync.
        """
        parts: dict[tuple[Any, ...], tuple[list[Tensor], list[int]]] = {}
        position = 0
        for group in self.param_groups:
            values = tuple(group.get(key) for key in keys)
            for p in group["params"]:
                if p.requires_grad and not (with_grad and p.grad is None):
                    params, index = parts.setdefault((p.device, *values), ([], []))
                    params.append(p)
                    index.append(position)
                position += 1
        return parts

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; hyperparameters that it does not set are the optimizer's.

        Raises:
            ValueError, TypeError: for a hyperparameter out of range or an unsupported dtype or placement; nothing is
                added.
        """
        self._not_while_perturbed("add_param_group()")
        if isinstance(param_group, dict):  # torch raises for anything else
            for key, value in self.options.items():
                param_group[key] = plain(param_group.get(key, value))
            self._check_group(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for i, p in enumerate(group["params"]):
                if p.dtype not in DTYPES:
                    raise TypeError(
                        f"params[{i}] is {p.dtype}: expected float32, bfloat16, float16, float64 or complex numbers"
                    )
                distributed.check_layout(p, f"params[{i}]")
            self._check_groups()
        except (TypeError, ValueError):
            del self.param_groups[-1]
            raise
        self.run.agreed, self.run.weights.modules = False, None
        self.run.given &= all(isinstance(p, torch.nn.Parameter) for p in group["params"])
        for key, default in list(self.options.items()):
            if isinstance(group[key], Tensor) and group["params"]:
                given = group[key]
                group[key] = on(group["params"][0].device, given)
                if given is default:  # later groups share the moved tensor
                    self.options[key] = group[key]

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state and our hyperparameters (tensors as numbers); the base optimizer can load it too.

        Raises:
            RuntimeError: inside `perturbed()`.
        """
        self._not_while_perturbed("state_dict()")
        packed = super().state_dict()
        for group in packed["param_groups"]:
            for key in self.options:
                group[key] = number(group[key]) if isinstance(group[key], Tensor) else plain(group[key])
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a `state_dict()` of this optimizer or of the base: hyperparameters not in it do not change.

        Raises:
            RuntimeError: inside `perturbed()`.
            ValueError: for other parameter groups.
        """
        self._not_while_perturbed("load_state_dict()")
        kept = [{key: group[key] for key in self.options} for group in self.param_groups]
        # davda54/sam keeps copies of the weights in its state; entries with nothing else would look like the base's
        # state.
        state = {k: without(s, "old_p") for k, s in state_dict["state"].items()}
        super().load_state_dict(
            {**state_dict, "state": {k: s for k, s in state.items() if not isinstance(s, dict) or s}}
        )
        written: dict[Tensor, Any] = {}
        for group, old in zip(self.param_groups, kept):
            for key, value in old.items():
                loaded = group.setdefault(key, value)
                if isinstance(value, Tensor) and loaded is not value:
                    if written.setdefault(value, loaded) != loaded:  # groups that shared a tensor now differ
                        value = value.clone()
                    group[key] = value.fill_(signed(loaded))  # in place, because captured CUDA graphs read it there
        self.run.stage, self.run.agreed, self.run.default_seed = Stage.IDLE, False, False


_seeded: tuple[int, int] = (-1, 0)  # torch's seed, and how many optimizers have derived theirs from it


def _default_seed() -> int:
    """A seed derived from torch's, a different one for each optimizer."""
    global _seeded
    seed = torch.initial_seed()
    _seeded = seed, (_seeded[1] + 1 if _seeded[0] == seed else 0)
    return int.from_bytes(hashlib.blake2b(repr(_seeded).encode(), digest_size=8).digest(), "little")


def without(entry: Any, key: str) -> Any:
    """An entry of `state` without one of its keys; an entry that is no dict (some bases keep such) as is."""
    return {k: v for k, v in entry.items() if k != key} if isinstance(entry, dict) else entry
