"""partial_fit: one more epoch at a time, on a copy that replaces the model at the end."""

import functools
import pickle

import numpy as np
import pytest
import torch
from skorch.callbacks import Callback
from small_models import assert_same_model, quick, small, state_of
from torch import nn

from sktransfer import FineTuningRegressor

SGD = functools.partial(torch.optim.SGD, momentum=0.5)


def n_steps(model):
    """Steps that the optimizer has made with the head."""
    return int(model.net_.optimizer_.state[model.net_.module_.head.linear.weight]["step"])


def test_one_epoch_after_another(stripes):
    X, y = stripes
    model = small(unfreeze=1, lr=1e-3)
    model.partial_fit(X[:24], y[:24], classes=["across", "down", "other", "plain"])
    assert n_steps(model) == model.n_iter_ == 1
    model.partial_fit(X[24:], y[24:])
    assert n_steps(model) == model.n_iter_ == 2
    assert list(model.classes_) == ["across", "down", "other", "plain"]
    assert model.predict_proba(X)[:, 2].max() < 0.3
    assert [(row["epoch"], row["lr"]) for row in model.history_] == [(1, 1e-3), (2, 1e-3)]
    with pytest.raises(ValueError, match="holds the label 'new'"):
        model.partial_fit(X[:1], ["new"])


@pytest.mark.parametrize("again", [lambda m: m, lambda m: pickle.loads(pickle.dumps(m))])
def test_it_continues_from_fit(stripes, again):
    X, y = stripes
    model = again(small(unfreeze=1).fit(X, y))
    before = state_of(model)["head.linear.weight"]
    model.partial_fit(X, y)
    assert [row["epoch"] for row in model.history_] == [1, 2, 3]
    assert model.n_iter_ == 3
    assert not np.array_equal(state_of(model)["head.linear.weight"], before)


def test_classes_are_those_of_the_first_call(coded):
    X, k = coded
    model = quick().partial_fit(X, k, classes=[0, 1, 2]).partial_fit(X, k, classes=[2, 1, 0])
    with pytest.raises(ValueError, match="not the same as in the first call to partial_fit"):
        model.partial_fit(X, k, classes=[0, 1])
    with pytest.raises(ValueError, match="`classes` holds one class only: 1"):
        quick().partial_fit(X, k, classes=[1])
    with pytest.raises(ValueError, match="`classes` is empty"):
        quick().partial_fit(X, k, classes=[])
    Y = np.eye(3, dtype=int)[k]
    with pytest.raises(ValueError, match=r"several labels per row: .* the classes are the num"):
        quick().partial_fit(X, Y, classes=[0, 1])
    model = quick().partial_fit(X, Y, classes=[0, 1, 2]).partial_fit(X, Y, classes=[0, 1, 2])
    with pytest.raises(ValueError, match=r"y has shape \(48,\), but this .* was fitted on multil"):
        model.partial_fit(X, k)


def test_targets_are_those_of_the_first_call(numbers):
    X, y = numbers
    model = quick(FineTuningRegressor).partial_fit(X, y)
    before = model.predict(X)
    with pytest.raises(ValueError, match=r"y has 2 target\(s\), but .* was fitted on 1"):
        model.partial_fit(X, np.stack([y, y], 1))
    with pytest.raises(ValueError, match=r"The target 1e\+30 is too far from the others"):
        model.partial_fit(X, np.where(y > np.median(y), 1e30, y))
    np.testing.assert_array_equal(model.predict(X), before)


# -- what may change in between --------------------------------------------------------------
def test_what_may_change(stripes):
    X, y = stripes
    model = small(head=(4,), unfreeze="all").partial_fit(X, y)
    changes = {"lr": 0.1, "layer_decay": 0.5, "batch_size": 7, "augment": "light"}
    model.set_params(**changes).partial_fit(X, y)
    assert {group["lr"] for group in model.net_.optimizer_.param_groups} == {0.1, 0.05, 0.025}
    assert n_steps(model) == 2 + 7  # 48 rows in steps of 32, then of 7
    seen = []

    class Watch(Callback):
        def on_epoch_end(self, net, **kwargs):
            seen.append(net.module_.training)

    model.set_params(optimizer=SGD, callbacks=[Watch()]).partial_fit(X, y)  # start anew
    assert {group["momentum"] for group in model.net_.optimizer_.param_groups} == {0.5}
    model.partial_fit(X, y)
    assert len(seen) == 2
    assert model.n_iter_ == 4


@pytest.mark.parametrize("own", [False, True], ids=["sizes", "module"])
def test_the_head_may_change_its_dropout_but_not_its_shape(stripes, own):
    X, y = stripes

    def head(size):
        return nn.Sequential(nn.Linear(6, size), nn.Linear(size, 3)) if own else (size,)

    model = small(head=head(4)).fit(X, y)
    before = model.predict_proba(X)
    model.set_params(head=head(5))
    with pytest.raises(ValueError, match=r"head.s weights do not fit [\s\S]*call fit to start"):
        model.partial_fit(X, y)
    np.testing.assert_array_equal(model.predict_proba(X), before)
    model.set_params(head=head(4), dropout=0.5, lr=1e-9).partial_fit(X, y)
    np.testing.assert_allclose(model.predict_proba(X), before, atol=1e-4)
    if not own:
        assert model.net_.module_.head.dropout.p == 0.5


def test_stages_may_be_frozen_again(stripes):
    X, y = stripes
    model = small(unfreeze=1, augment="light", lr=0.01).partial_fit(X, y)
    before = state_of(model)
    model.set_params(unfreeze=0).partial_fit(X, y)
    for name, value in state_of(model).items():
        assert np.array_equal(value, before[name]) == (not name.startswith("head.")), name
    model.set_params(unfreeze="all").partial_fit(X, y)
    assert model.history_[-1]["n_unfrozen"] == 2


def test_trained_stages_that_are_frozen_again_are_not_shared(stripes):
    """Other fits find the results of the pre-trained stages."""
    X, y = stripes

    def trained(memory):
        model = small(unfreeze="all", lr=0.05, memory=memory).partial_fit(X, y)
        return model.set_params(unfreeze=1).partial_fit(X, y)

    small(unfreeze=1).fit(X, y)
    assert_same_model(trained(None), trained(False), rtol=1e-5, atol=1e-6)
    fresh, alone = (small(unfreeze=1, memory=memory).fit(X, y) for memory in (None, False))
    assert_same_model(fresh, alone, rtol=1e-5, atol=1e-6)


def test_stages_join_in_later_epochs(stripes):
    model = small(unfreeze={1: 0, 3: "all"})
    for _ in range(4):
        model.partial_fit(*stripes)
    assert [row["n_unfrozen"] for row in model.history_] == [0, 0, 2, 2]
    assert n_steps(model) == 8


# -- a call that fails -----------------------------------------------------------------------
class Refuse(Callback):
    """Fails in an epoch, as long as it is asked to."""

    asked = False

    def on_epoch_end(self, net, **kwargs):
        if Refuse.asked:
            raise RuntimeError("refused")


@pytest.mark.parametrize("unfreeze", [0, 1, {1: 0, 4: 1, 5: "all"}], ids=str)
@pytest.mark.parametrize("fault", ["label", "loss", "callback"])
def test_a_call_that_fails_changes_nothing(stripes, unfreeze, fault):
    """Neither what is predicted nor what later calls train, to the last bit."""
    X, y = stripes

    def run(fails):
        model = small(unfreeze=unfreeze, lr=1e-2, batch_size=16, callbacks=[Refuse()])
        for _ in range(3):
            model.partial_fit(X, y)
        before, history = model.predict_proba(X), list(model.history_)
        if fails and fault == "label":
            with pytest.raises(ValueError, match="nope"):
                model.partial_fit(X[:2], ["nope", "down"])
        elif fails and fault == "loss":
            model.set_params(lr=1e30, batch_size=5)
            with pytest.raises(ValueError, match="training loss became"):
                model.partial_fit(X, y)
            model.set_params(lr=1e-2, batch_size=16)
        elif fails:
            Refuse.asked = True
            with pytest.raises(RuntimeError, match="refused"):
                model.partial_fit(X, y)
            Refuse.asked = False
        np.testing.assert_array_equal(model.predict_proba(X), before)
        assert (model.history_, model.n_iter_) == (history, 3)
        for _ in range(2):
            model.partial_fit(X, y)
        return model

    one, other = run(False), run(True)
    np.testing.assert_array_equal(one.predict_proba(X), other.predict_proba(X))
    assert [r["train_loss"] for r in one.history_] == [r["train_loss"] for r in other.history_]
