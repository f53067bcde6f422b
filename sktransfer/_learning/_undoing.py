"""A training that fails takes nothing away from the network that it went on from."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch

from sktransfer._learning._tuned_network import TunedNetwork


@contextlib.contextmanager
def undone_on_failure(tuned: TunedNetwork | None) -> Iterator[None]:
    """Bring `tuned` back to what it is now, should the block that trains it further fail.

    Its weights, its net with the optimizer's state and skorch's history, and what is frozen. The
    user's callbacks keep what they saw.
    """
    if tuned is None:
        yield
        return
    before = dict(vars(tuned))
    module, net = tuned._module, tuned.net
    weights = tuned.trained_state()
    head = copy.deepcopy(tuned.head.state_dict())
    place = None if module is None else (module.n_frozen, module.entry)
    n_epochs, optimizer = (0, {}) if net is None else (len(net.history), _state_of(net))
    try:
        yield
    except BaseException:
        vars(tuned).update(before)
        tuned.head.load_state_dict(head)
        if module is not None and place is not None:
            tuned.change(tuned.moves_statistics, tuned.precision)
            tuned.put_into(module, weights)
            module.freeze(place[0])
            module.entry = place[1]
        if net is not None:
            del net.history[n_epochs:]
            groups = net.optimizer_.param_groups
            del groups[len(optimizer["param_groups"]) :]
            net.optimizer_.load_state_dict(optimizer)
        raise


def _state_of(net: Any) -> dict[str, Any]:
    with torch.no_grad():
        return copy.deepcopy(net.optimizer_.state_dict())
