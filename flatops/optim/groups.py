"""Hyper-parameters of ours beside the base optimizer's: in its groups, its checkpoints, and its range checks."""

from __future__ import annotations

import abc
import hashlib
from typing import Any

import torch
from torch import Tensor

from flatops import distributed, ops
from flatops.optim import scaler
from flatops.optim.run import Run, Stage
from flatops.scalars import number, on, plain
from flatops.weights import DTYPES


class Groups(torch.optim.Optimizer):
    """An optimizer built around a base one, with options of its own in `param_groups`."""

    base: Any = None  # the class that steps
    run: Run

    def _construct(self, params: Any, options: dict[str, Any], base_kwargs: dict[str, Any]) -> None:
        """Builds the base optimizer around our options, which live in param_groups beside lr."""
        self.run = Run(default_seed="seed" in options and options["seed"] is None)
        if self.run.default_seed:
            options["seed"] = _default_seed()
        self.options = options = {key: plain(value) for key, value in options.items()}
        self._check_group(options)
        scaler.forget(self)
        self.base.__init__(self, params, **base_kwargs)
        if taken := options.keys() & self.defaults.keys():
            raise ValueError(
                f"base {self.base.__name__} has a hyper-parameter {', '.join(sorted(taken))} of its own: use another"
            )
        if any(options.keys() - group.keys() for group in self.param_groups):
            raise TypeError(
                f"base {self.base.__name__} has the parameter groups of an optimizer inside it: give the inner one to flatops as "
                f"base, and the flatops optimizer to {self.base.__name__}"
            )
        self.defaults.update(options)
        params = self._all_params()
        self.run.given = bool(params) and all(isinstance(p, torch.nn.Parameter) for p in params)

    @abc.abstractmethod
    def _check_group(self, group: dict[str, Any]) -> None:
        """Raises for a hyper-parameter out of range."""

    def _check_groups(self) -> None:
        """Raises for a group that no pass can run with: a user or a scheduler may have written to it since it was added."""
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
        """(device, *values of keys) -> parameters and their positions: one operator call each, groups that agree merged.

        A tensor agrees with itself alone: to compare values would be to wait for the device.
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
        """Adds a group, with this optimizer's hyper-parameters where it does not set its own.

        Raises:
            ValueError, TypeError: for a hyper-parameter out of range or a parameter of an unsupported dtype or placement; nothing
                is added.
        """
        self._not_while_perturbed("add_param_group()")
        if isinstance(param_group, dict):  # torch refuses what is none
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
        except (TypeError, ValueError):
            del self.param_groups[-1]
            raise
        self.run.agreed, self.run.weights.modules = False, None
        self.run.given &= all(isinstance(p, torch.nn.Parameter) for p in group["params"])
        for key, default in list(self.options.items()):
            if isinstance(group[key], Tensor) and group["params"]:
                given = group[key]
                group[key] = on(group["params"][0].device, given)
                if given is default:  # groups that share it go on sharing it
                    self.options[key] = group[key]

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state and our hyper-parameters, in a form that the base optimizer alone loads too.

        Those that are tensors on a device are written as numbers.

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
        """Goes on from `state_dict()`, or from one of the base optimizer alone: what it lacks stays as it is.

        Raises:
            RuntimeError: inside `perturbed()`.
            ValueError: for other parameter groups.
        """
        self._not_while_perturbed("load_state_dict()")
        kept = [{key: group[key] for key in self.options} for group in self.param_groups]
        # davda54/sam leaves copies of the weights in its state; an entry of nothing else would pass for the base's own.
        state = {k: without(s, "old_p") for k, s in state_dict["state"].items()}
        super().load_state_dict(
            {**state_dict, "state": {k: s for k, s in state.items() if not isinstance(s, dict) or s}}
        )
        written: dict[Tensor, Any] = {}
        for group, old in zip(self.param_groups, kept):
            for key, value in old.items():
                loaded = group.setdefault(key, value)
                if isinstance(value, Tensor) and loaded is not value:
                    if written.setdefault(value, loaded) != loaded:  # groups shared it and part now
                        value = value.clone()
                    # In place: a captured graph goes on reading it there.
                    group[key] = value.fill_(ops.signed(loaded))
        self.run.stage, self.run.agreed, self.run.default_seed = Stage.IDLE, False, False


_seeded: tuple[int, int] = (-1, 0)  # torch's seed, and how many optimizers have taken theirs from it since it was set


def _default_seed() -> int:
    """A seed that follows torch's, for the next optimizer: two of them do not draw the same noise."""
    global _seeded
    theirs = torch.initial_seed()
    _seeded = theirs, (_seeded[1] + 1 if _seeded[0] == theirs else 0)
    return int.from_bytes(hashlib.blake2b(repr(_seeded).encode(), digest_size=8).digest(), "little")


def without(entry: Any, key: str) -> Any:
    """An entry of `state` without one of its keys; bases also keep entries that are no dict, one for all parameters."""
    return {k: v for k, v in entry.items() if k != key} if isinstance(entry, dict) else entry
