"""A training that fails takes nothing away from the network that it went on from."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch

from sktransfer.fine_tuning._head import take_settings
from sktransfer.fine_tuning._tuned_network import TunedNetwork


@contextlib.contextmanager
def undone_on_failure(tuned: TunedNetwork | None, *, keeps_net: bool) -> Iterator[None]:
    """Bring `tuned` back to what it is now, should the block that trains it further fail.

    Its weights, its net with skorch's history, and what is frozen; the optimizer's state, too,
    where it may step on (`keeps_net`). The user's callbacks keep what they saw.
    """
    if tuned is None:
        yield
        return
    before = dict(vars(tuned))
    module, net = tuned._module, tuned.net
    weights, head = tuned.trained_state(), copy.deepcopy(tuned.head)
    n_frozen = 0 if module is None else module.n_frozen
    optimizer = _on_cpu(net.optimizer_.state_dict()) if net is not None and keeps_net else None
    settings = None
    if net is not None:
        settings = len(net.history), net.batch_size, net.criterion_.label_smoothing
    try:
        yield
    except BaseException:
        vars(tuned).update(before)
        take_settings(tuned.head, head)
        tuned.head.load_state_dict(head.state_dict())
        if module is not None:
            tuned.change(tuned.moves_statistics, tuned.precision)
            tuned.put_into(module, weights)
            module.freeze(n_frozen)
        if settings is not None:
            n_epochs, net.batch_size, net.criterion_.label_smoothing = settings
            del net.history[n_epochs:]
        if optimizer is not None:
            del net.optimizer_.param_groups[len(optimizer["param_groups"]) :]
            net.optimizer_.load_state_dict(optimizer)
        raise


def _on_cpu(state: Any) -> Any:
    """A copy of an optimizer's state, beside the device that is to be trained on."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _on_cpu(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_on_cpu(value) for value in state]
    return copy.deepcopy(state)
