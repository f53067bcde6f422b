"""The linear probe is made less sure before it teaches stages."""

import numpy as np
import pytest
import torch
from skorch.callbacks import Callback
from test_fine_tuning import assert_same_model, small, state_of
from torch.nn import functional as F

from sktransfer import FineTuningClassifier, FineTuningRegressor
from sktransfer.fine_tuning._head import LinearHead
from sktransfer.fine_tuning._tempering import auto_temperature

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHT, BIAS = "head.linear.weight", "head.linear.bias"


class NoteHead(Callback):
    """Keeps the head's weights as each epoch's first step finds them."""

    found = []  # noqa: RUF012 - the training has a copy of the callback

    def on_train_begin(self, net, **kwargs):
        self.found.clear()

    def on_batch_begin(self, net, training=False, **kwargs):
        if training and len(net.history[-1, "batches"]) == 1:
            self.found.append(net.module_.head.linear.weight.detach().numpy().copy())


def probe_of(X, y, **parameters):
    return state_of(small(max_epochs=0, probe_views=3, **parameters).fit(X, y))


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_auto_halves_what_a_guess_loses(kind):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, 6)).astype(np.float32)
    weight = rng.uniform(0.5, 2, 50)
    head = LinearHead(6, 3)
    torch.nn.init.normal_(head.linear.weight, std=3)
    scores = head(torch.from_numpy(rows)).detach().double()
    share = weight / weight.sum()
    if kind == "multiclass":
        target = scores.argmax(1).numpy()
        counts = np.array([weight[target == k].sum() for k in range(3)])
        guess = -(share @ np.log(counts / counts.sum())[target])
        y = torch.from_numpy(target)
    else:
        target = (scores > 0).numpy().astype(np.float32)
        mean = share @ target
        guess = -(share @ (target * np.log(mean) + (1 - target) * np.log(1 - mean))).mean()
        y = torch.from_numpy(target).double()
    found = auto_temperature(head, rows, target, weight, kind)
    assert found > 1
    if kind == "multiclass":
        losses = F.cross_entropy(scores / found, y, reduction="none")
    else:
        losses = F.binary_cross_entropy_with_logits(scores / found, y, reduction="none").mean(1)
    assert share @ losses.numpy() == pytest.approx(guess / 2, rel=1e-6)
    # One that is unsure already stays as it is.
    head.divide_scores(2 * found)
    assert auto_temperature(head, rows, target, weight, kind) == 1
    np.testing.assert_allclose(head(torch.from_numpy(rows)).detach(), scores / found / 2, rtol=1e-4)


@pytest.mark.parametrize("unfreeze", [1, "all"])
def test_the_first_step_finds_it_divided(stripes, unfreeze):
    X, y = stripes
    settings = {"unfreeze": unfreeze, "callbacks": [NoteHead()]}
    probe = probe_of(X, y)
    small(**settings).fit(X, y)
    np.testing.assert_allclose(NoteHead.found[0], probe[WEIGHT])
    small(probe_temperature=4, **settings).fit(X, y)
    np.testing.assert_allclose(NoteHead.found[0], probe[WEIGHT] / 4, rtol=1e-6)
    small(probe_temperature="auto", **settings).fit(X, y)
    ratio = probe[WEIGHT] / NoteHead.found[0]
    assert ratio.min() > 1.5
    np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-5)


def test_it_is_divided_when_the_first_stages_join(stripes):
    X, y = stripes
    settings = {"unfreeze": {1: 0, 3: 1, 4: "all"}, "max_epochs": 5, "lr": 1e-12}
    small(probe_temperature=4, callbacks=[NoteHead()], **settings).fit(X, y)
    sizes = [np.abs(weight).sum() for weight in NoteHead.found]
    np.testing.assert_allclose(sizes[0] / np.array(sizes), [1, 1, 4, 4, 4], rtol=1e-5)


def test_the_way_of_wise_ft_begins_there(stripes):
    X, y = stripes
    probe = probe_of(X, y)
    settings = {"unfreeze": {1: 0, 2: 1}, "probe_temperature": 4, "lr": 0.01, "max_epochs": 3}
    settings |= {"probe_views": 3, "callbacks": [NoteHead()]}
    end = state_of(small(weight_averaging=None, **settings).fit(X, y))
    start = NoteHead.found[1]
    kept = state_of(small(weight_averaging="wise_ft", **settings).fit(X, y))
    np.testing.assert_allclose(kept[WEIGHT], (start + end[WEIGHT]) / 2, rtol=1e-4, atol=1e-6)
    assert np.abs(start - probe[WEIGHT] / 4).max() > 1e-3


@pytest.mark.parametrize("kind", ["ema", "last"])
def test_averages_begin_there(stripes, kind):
    X, y = stripes
    settings = {"unfreeze": {1: 0, 4: 1}, "max_epochs": 4, "lr": 1e-12, "weight_averaging": kind}
    one, other = (state_of(small(probe_temperature=t, **settings).fit(X, y)) for t in (1, 20))
    np.testing.assert_allclose(other[WEIGHT] * 20, one[WEIGHT], rtol=1e-5)


def test_epoch_zero_is_the_probe_as_it_is(stripes):
    X, y = stripes
    rows = {"X_val": X, "y_val": y}
    with pytest.warns(UserWarning, match=r"linear probe \(epoch 0\) is kept"):
        model = small(lr=1e-12, probe_temperature=9).fit(X, y, **rows)
    probe = small(unfreeze=0, max_epochs=0).fit(X, y)
    np.testing.assert_allclose(model.predict_proba(X), probe.predict_proba(X), atol=1e-5)
    epochs = {row["epoch"]: row for row in model.history_}
    # It predicts the same afterwards, less surely.
    assert epochs[1]["valid_score"] == epochs[0]["valid_score"]
    assert epochs[1]["valid_loss"] > 2 * epochs[0]["valid_loss"]


@pytest.mark.parametrize(
    "settings",
    [{"unfreeze": 0}, {"unfreeze": {1: 0, 9: 1}}, {"max_epochs": 0}, {"head_init": "random"}],
    ids=str,
)
def test_where_no_stage_learns_from_it_nothing_is_divided(stripes, settings):
    one, other = (small(probe_temperature=t, **settings).fit(*stripes) for t in (1, 50))
    assert_same_model(one, other, rtol=0, atol=0)


def test_what_goes_on_is_not_divided(stripes):
    X, y = stripes
    one, other = (small(probe_temperature=t).partial_fit(X, y) for t in (1, 50))
    assert_same_model(one, other, rtol=0, atol=0)
    one, other = (
        small(max_epochs=1, warm_start=True).fit(X, y).set_params(probe_temperature=t).fit(X, y)
        for t in (1, 50)
    )
    assert_same_model(one, other, rtol=0, atol=0)


def test_hidden_layers_are_divided_alike():
    head = LinearHead(4, 3, (5,))
    torch.nn.init.normal_(head.hidden[-1].weight)
    x = torch.randn(7, 4)
    before = head(x).detach()
    head.divide_scores(3.0)
    torch.testing.assert_close(head(x).detach(), before / 3)


def test_it_is_for_classifiers(stripes):
    assert "probe_temperature" not in FineTuningRegressor().get_params()
    with pytest.raises(ValueError, match="'probe_temperature' parameter"):
        FineTuningClassifier(probe_temperature=0.5).fit(*stripes)
