"""partial_fit on a copy of a model: the same training as on the model itself, to the last bit."""

import copy
import functools
import pickle

import numpy as np
import pytest
import torch
from skorch.callbacks import LRScheduler
from small_models import assert_same_model, of_kind, quick, small
from torch import nn

from sktransfer import FineTuningRegressor

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "net": lambda model: (copied := copy.deepcopy(model), copied.net_)[0],
}
SETTINGS = {
    "head": {"unfreeze": 0, "head": (4,)},
    "stages": {"unfreeze": "all", "optimizer": functools.partial(torch.optim.SGD, momentum=0.9)},
    "numbers": {"unfreeze": 1, "optimizer": torch.optim.NAdam, "dropout": 0.3},
    "plain SGD": {"unfreeze": 1, "optimizer": torch.optim.SGD},
    "gradual": {"unfreeze": {1: 0, 3: 1, 4: "all"}, "augment": "light"},
    "scheduler": {"callbacks": [LRScheduler("StepLR", step_size=1, gamma=0.5)]},
    "random weights": {"weights": None, "unfreeze": 1},
}


def assert_equal(a, b, X):
    np.testing.assert_array_equal(a.predict(X), b.predict(X))
    assert_same_model(a, b, rtol=0, atol=0)
    assert [row["train_loss"] for row in a.history_] == [row["train_loss"] for row in b.history_]
    assert [row["lr"] for row in a.history_] == [row["lr"] for row in b.history_]
    assert a.net_.history[:, "train_loss"] == b.net_.history[:, "train_loss"]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("again", COPIES.values(), ids=COPIES)
def test_a_copy_continues_alike(stripes, again, settings):
    X, y = stripes
    one = small(lr=0.01, batch_size=16, **settings)
    for start in (one.fit, one.partial_fit):
        other = again(start(X[:36], y[:36]))
        for _ in range(2):
            one.partial_fit(X, y)
            other = again(other).partial_fit(X, y)
        assert_equal(one, other, X)


@pytest.mark.parametrize("kind", ["indicators", "numbers"])
def test_other_targets(coded, kind):
    cls, X, y = of_kind(coded, kind)
    one = small(cls, unfreeze=1, lr=0.01).partial_fit(X, y)
    other = COPIES["pickle"](one)
    assert_equal(one.partial_fit(X, y), other.partial_fit(X, y), X)


def test_the_optimizers_state_is_kept_where_partial_fit_was_used(stripes):
    X, y = stripes
    model = quick(backbone="builtin", unfreeze=1)
    n_bytes = len(pickle.dumps(model.fit(X, y)))
    assert len(pickle.dumps(model.partial_fit(X, y))) > 2 * n_bytes
    assert len(pickle.dumps(model.fit(X, y))) < 1.01 * n_bytes


# -- a reloaded net ----------------------------------------------------------------------------
@pytest.mark.parametrize("unfreeze", [0, "all"])
@pytest.mark.parametrize("again", COPIES.values(), ids=COPIES)
def test_the_net_of_a_copy_is_in_eval_mode(numbers, again, unfreeze):
    """Otherwise dropout is random and batch norm in an own head moves."""
    X, y = numbers
    head = nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 1))
    model = small(FineTuningRegressor, head=head, unfreeze=unfreeze).fit(X, y)
    copied = again(model)
    module = copied.net_.module_
    assert not any(part.training for part in module.modules())
    before = copied.predict(X)
    inputs = torch.zeros(5, 1, 3, 16, 16) if unfreeze else torch.zeros(5, 1, 6)
    with torch.no_grad():
        assert torch.equal(module(inputs), module(inputs))
    np.testing.assert_array_equal(copied.predict(X), before)
    np.testing.assert_allclose(before, model.predict(X), rtol=1e-6)
