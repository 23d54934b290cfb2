"""A tensor of our own for each parameter in `optimizer.state`: the Fisher F of ARWP and SSAM."""

from __future__ import annotations

import abc
from typing import Any

from torch import Tensor

from flatops import distributed
from flatops.distributed import local
from flatops.optim.base import Flat
from flatops.optim.groups import without


class KeepsFisher(Flat):
    """An optimizer with a running F for each parameter, which checkpoints hold in the base optimizer's state."""

    def _construct(self, params: Any, options: dict[str, Any], base_kwargs: dict[str, Any]) -> None:
        self.fisher: dict[Tensor, Tensor] = {}
        super()._construct(params, options, base_kwargs)

    @abc.abstractmethod
    def _keeps_fisher(self, group: dict[str, Any]) -> bool:
        """Whether the parameters of a group have an F."""

    @abc.abstractmethod
    def _new_fisher(self, p: Tensor) -> Tensor:
        """A parameter's initial F."""

    def _fisher(self, p: Tensor) -> Tensor:
        if p not in self.fisher:
            self.fisher[p] = self._new_fisher(p)
        return self.fisher[p]

    def _after_step(self) -> None:
        self._keep_fisher()

    def _keep_fisher(self) -> None:
        """Puts F into `state`, for checkpoints.

        Only into entries that the base has made, because it would take an entry with only F for its own; into all if
        the base keeps no state.
        """
        stateless = not any(map(_of_the_base, self.state.values()))
        for group in self.param_groups:
            for p in group["params"] if self._keeps_fisher(group) else []:
                entry = self.state.get(p)
                if p.requires_grad and (stateless or entry) and isinstance(entry, dict | None):
                    self.state[p]["fisher"] = self._fisher(p)

    def state_dict(self) -> dict[str, Any]:
        packed = super().state_dict()
        state = dict(packed["state"])
        for group, ours in zip(packed["param_groups"], self.param_groups):
            for i, p in zip(group["params"], ours["params"]):
                if not packed["state"] and p in self.fisher:  # before the first step
                    state[i] = {"fisher": self.fisher[p]}
        return {**packed, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Without F, which the base would cast to the parameter's dtype.
        saved = state_dict["state"]
        fisher = {i: entry["fisher"] for i, entry in saved.items() if isinstance(entry, dict) and "fisher" in entry}
        super().load_state_dict({**state_dict, "state": {i: without(entry, "fisher") for i, entry in saved.items()}})
        # In place, because captured CUDA graphs read it there. The loaded F may be this very tensor: zero only others.
        for group, saved in zip(self.param_groups, state_dict["param_groups"]):
            for i, p in zip(saved["params"], group["params"]):
                if i in fisher:
                    local(self._fisher(p)).copy_(distributed.shard_of(p, fisher[i]))
                elif p in self.fisher:
                    local(self.fisher[p]).zero_()
        if any(not isinstance(entry, dict) or entry for entry in self.state.values()):
            self._keep_fisher()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "fisher": self.fisher}


def _of_the_base(entry: Any) -> bool:
    """Whether an entry of `state` holds more than our F."""
    return not isinstance(entry, dict) or bool(entry.keys() - {"fisher"})
