"""The state for the next epoch of partial_fit: that of the optimizer, and the history."""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np
import torch
from skorch import NeuralNet
from skorch.history import History


class TrainingState(NamedTuple):
    """The state of a training, on the CPU and independent of its net.

    The optimizer's state is in `numbers` and `tensors` by ``"<position of the parameter>.<name>"``.
    It is empty after ``fit``, which may keep other weights than those of its last step.
    """

    optimizer: str  # its class
    history: list[dict]  # skorch's numbers of each epoch, without those of the batches
    rates: list[dict[str, float]]  # "lr" and "initial_lr" of groups that a scheduler has changed
    numbers: dict[str, object]
    tensors: dict[str, torch.Tensor]


def training_state_of(net: NeuralNet) -> TrainingState:
    """Copy the state of a net."""
    optimizer = net.optimizer_
    moments = optimizer.state_dict()["state"]
    flat = {f"{i}.{name}": value for i, own in moments.items() for name, value in own.items()}
    tensors = {k: v.detach().to("cpu", copy=True) for k, v in flat.items() if torch.is_tensor(v)}
    return TrainingState(
        _name_of(optimizer),
        [_numbers(epoch) for epoch in net.history_],
        [
            {key: float(group[key]) for key in ("lr", "initial_lr")}
            for group in optimizer.param_groups
            if "initial_lr" in group
        ],
        copy.deepcopy({k: v for k, v in flat.items() if k not in tensors}),
        tensors,
    )


def continue_from(net: NeuralNet, state: TrainingState, has_scheduler: bool) -> None:
    """Set a new net's history and optimizer's state to those of the previous epochs."""
    net.history_ = History({**epoch, "batches": []} for epoch in state.history)
    optimizer = net.optimizer_
    if state.optimizer == _name_of(optimizer):
        fresh = optimizer.state_dict()
        n_parameters = sum(len(group["params"]) for group in optimizer.param_groups)
        # The head is first and lower stages are last, so that their number changes no position.
        for key, value in {**state.tensors, **state.numbers}.items():
            i, _, name = key.partition(".")
            if int(i) < n_parameters:
                is_map = isinstance(value, torch.Tensor) and value.ndim == 4  # as its parameter
                layout = torch.channels_last if is_map else torch.preserve_format
                own = value.clone(memory_format=layout) if torch.is_tensor(value) else value
                fresh["state"].setdefault(int(i), {})[name] = own
        optimizer.load_state_dict(fresh)
    if has_scheduler:  # it continues from the last epoch's rates, which torch keeps in the groups
        for group, own in zip(optimizer.param_groups, state.rates, strict=False):
            group.update(own)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])


def _numbers(epoch: dict) -> dict:
    values = {k: v.item() if isinstance(v, np.generic) else v for k, v in epoch.items()}
    return {k: v for k, v in values.items() if isinstance(v, (bool, int, float, str))}


def _name_of(optimizer: torch.optim.Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
