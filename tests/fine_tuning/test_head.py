"""The head, and the loss that it is trained with."""

import functools
import re

import numpy as np
import pytest
import torch
from small_models import LOSSES, assert_same_model, of_kind, quick, small, state_of
from torch import nn
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from sktransfer import FineTuningRegressor

SINGLE_NUMBER = r"loss=.* returns a single number .* one value per row.*reduction="


# -- head ------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [0, -3, 2.5, True, "a", None, [4]], ids=str)
def test_hidden_sizes_are_positive_integers(stripes, size):
    with pytest.raises(ValueError, match=r"head=\(8, .*\) has the hidden size .*positive int"):
        small(head=(8, size)).fit(*stripes)


def test_hidden_layers(stripes):
    X, y = stripes
    linear, deep = (small(unfreeze=0, head=head, lr=0.1).fit(X, y) for head in ("linear", [4, 5]))
    shapes = {tuple(value.shape) for value in state_of(deep).values()}
    assert {(4, 6), (5, 4), (3, 5), (3, 6)} <= shapes
    assert np.abs(linear.predict_proba(X) - deep.predict_proba(X)).max() > 1e-3
    quick(head=(np.int64(4),)).fit(X, y)


def test_a_module_as_head(stripes):
    head = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    before = {name: value.clone() for name, value in head.state_dict().items()}
    model = small(head=head, lr=0.1).fit(*stripes)
    assert all(torch.equal(before[name], value) for name, value in head.state_dict().items())
    assert not np.array_equal(state_of(model)["head.0.weight"], before["0.weight"].numpy())


class Odd(nn.Module):
    """A linear layer of which a function is returned."""

    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(6, 3), function

    def forward(self, x):
        return self.function(self.linear(x))


FAILS = r"fails on embeddings of shape \(2, 6\) \(\w+: "
ODD_HEADS = {
    "wrong width": (nn.Linear(7, 3), FAILS + "mat1 and mat2 shapes"),
    "wrong outputs": (nn.Linear(6, 5), r"returns float32 scores of shape \(2, 5\) for 2"),
    "class": (nn.Linear, "is a class: give an instance of it"),
    "dict": (Odd(lambda scores: {"scores": scores}), "returns an object of type dict for 2 embed"),
    "tuple": (nn.LSTM(6, 3), "returns an object of type tuple"),
    "float64": (nn.Linear(6, 3).double(), FAILS + ".*Float and Double"),
    "half": (nn.Linear(6, 3).half(), FAILS + ".*Float and Half"),
    "float64 scores": (Odd(torch.Tensor.double), r"returns float64 scores of shape \(2, 3\)"),
    "flat": (Odd(lambda scores: scores[:, 0]), r"returns float32 scores of shape \(2,\)"),
    "convolution": (nn.Conv2d(6, 3, 1), FAILS + "Expected 3D"),
    "embedding": (nn.Embedding(6, 3), FAILS),
    "no forward": (nn.ModuleList([nn.Linear(6, 3)]), FAILS + ".*missing the required"),
    "on meta": (nn.Linear(6, 3, device="meta"), FAILS + ".*no data"),
    "no parameters": (nn.AdaptiveAvgPool1d(3), "returns scores that depend on no parameter"),
    "detached": (Odd(torch.Tensor.detach), "returns scores that depend on no parameter"),
}


@pytest.mark.parametrize(("head", "message"), ODD_HEADS.values(), ids=ODD_HEADS)
def test_a_head_that_cannot_be_trained(stripes, head, message):
    """The message says what comes in and what must come out."""
    takes = r"A head takes float32 embeddings \(n, 6\) and returns float32 scores \(n, 3\)"
    with pytest.raises(ValueError, match=f"^head=.{{1,90}} {message}(.|\n)*{takes}"):
        small(head=head).fit(*stripes)


def test_a_head_that_computes_in_float32_alone(stripes):
    """It could not predict, which is found out before training."""
    head = Odd(lambda scores: scores @ torch.eye(3))
    with pytest.raises(ValueError, match=r"head=.* fails .*computes in float64 after double\(\)"):
        small(head=head).fit(*stripes)


@pytest.mark.parametrize(("n", "batch_size"), [(1, 32), (3, 1), (3, 2)])
def test_batch_norm_in_a_head_needs_several_rows(coded, n, batch_size):
    X, k = coded
    head = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))
    model = quick(head=head, batch_size=batch_size)
    with pytest.raises(ValueError, match=r"batch norm of `head`.* got a batch of one row"):
        model.partial_fit(X[:n], k[:n], classes=[0, 1, 2])
    quick(head=head, batch_size=3).fit(X[:4], k[:4])


def test_a_frozen_head(stripes):
    head = nn.Linear(6, 3).requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train: no parameter of `head` requires"):
        quick(head=head).fit(*stripes)
    model = small(head=head, unfreeze=1).fit(*stripes)
    np.testing.assert_array_equal(state_of(model)["head.weight"], head.weight.numpy())


def test_a_lazy_head(stripes):
    lazy = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(3))
    models = [small(head=lazy).fit(*stripes) for _ in range(2)]
    assert_same_model(*models, rtol=0, atol=0)


def test_dropout_is_for_training_alone(stripes):
    X, y = stripes
    model = small(head=(4,), dropout=0.5).fit(X, y)
    drops = [part.p for part in model.net_.module_.head.modules() if isinstance(part, nn.Dropout)]
    assert drops == [0.5, 0.5]
    np.testing.assert_array_equal(model.predict_proba(X), model.predict_proba(X))
    assert not np.array_equal(model.predict_proba(X), small(head=(4,)).fit(X, y).predict_proba(X))


# -- loss ------------------------------------------------------------------------------------
MODULES = {
    "labels": nn.CrossEntropyLoss(reduction="none"),
    "indicators": nn.BCEWithLogitsLoss(reduction="none"),
    "numbers": nn.MSELoss(reduction="none"),
}


@pytest.mark.parametrize("losses", [LOSSES, MODULES], ids=["function", "module"])
@pytest.mark.parametrize("kind", LOSSES)
def test_the_usual_losses_can_be_given(coded, kind, losses):
    """A module's values of several columns are averaged to one a row."""
    cls, X, y = of_kind(coded, kind)
    weight = np.linspace(0.5, 2, len(X))
    settings = {"lr": 0.01, "unfreeze": 1}
    auto = small(cls, **settings).fit(X, y, weight)
    own = small(cls, loss=losses[kind], **settings).fit(X, y, weight)
    assert_same_model(auto, own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_label_smoothing_is_that_of_the_formula(coded, share):
    X, k = coded
    loss = nn.CrossEntropyLoss(label_smoothing=share, reduction="none")
    model = quick(loss=loss, lr=1e-12, batch_size=64, early_stopping=False)
    model.fit(X, k, X_val=X[:9], y_val=k[:9])
    target = np.eye(3)[k] * (1 - share) + share / 3
    losses = -(target * model.predict_log_proba(X)).sum(axis=1)
    assert model.history_[-1]["train_loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert model.history_[-1]["valid_loss"] == pytest.approx(losses[:9].mean(), rel=1e-5)


def test_a_loss_that_gives_one_number_needs_equal_weights(stripes):
    X, y = stripes
    auto = small(lr=0.01).fit(X, y)
    for loss in (nn.CrossEntropyLoss(), F.cross_entropy):
        own = small(lr=0.01, loss=loss).fit(X, y)
        assert_same_model(auto, own, rtol=1e-4, atol=1e-6)
        with pytest.raises(ValueError, match=SINGLE_NUMBER):
            small(loss=loss).fit(X, y, sample_weight=np.linspace(1, 2, len(X)))
        # Equal rows are merged: one image is there twice.
        with pytest.raises(ValueError, match=SINGLE_NUMBER):
            small(loss=loss).fit([*X, X[0]], [*y, y[0]])
        with pytest.raises(ValueError, match=SINGLE_NUMBER):
            small(loss=loss, class_weight={"down": 3}).fit(X, y)
    twice = np.concatenate([X, X]), np.concatenate([y, y])  # all of weight 2
    assert_same_model(auto, small(lr=0.01, loss=nn.CrossEntropyLoss()).fit(*twice), rtol=1e-4)


def test_a_loss_of_another_shape(stripes):
    with pytest.raises(
        ValueError, match=r"loss=.* shape \(2,\) for float32 scores .* one value per row"
    ):
        small(loss=lambda scores, target: scores[:2, 0]).fit(*stripes)


def test_a_loss_that_broadcasts_rows_against_rows(numbers):
    wrong = {"loss": lambda scores, target: (scores[:, 0] - target) ** 2, "batch_size": 24}
    with pytest.raises(
        ValueError, match=r"\(24, 24\) for .*\(24, 1\) and float32 targets .*\(24, 1"
    ):
        small(FineTuningRegressor, **wrong).fit(*numbers)


def test_a_loss_that_returns_no_tensor(stripes):
    with pytest.raises(TypeError, match=r"loss=.* returns None for float32 scores .*: it must"):
        small(loss=lambda scores, target: None).fit(*stripes)
    for loss in (nn.CrossEntropyLoss(reduction="none"), lambda s, t: s.argmax(1) == t):
        with pytest.raises(ValueError, match=r"values of shape \(24,\) that depend on no score"):
            small(loss=lambda s, t, loss=loss: loss(s.detach(), t)).fit(*stripes)
    double = nn.CrossEntropyLoss(torch.ones(3, dtype=torch.float64), reduction="none")
    with pytest.raises(RuntimeError, match="expected scalar type Float") as caught:
        small(loss=double).fit(*stripes)
    assert re.match(r"loss=CrossEntropyLoss\(\) was called with float32", caught.value.__notes__[0])
    with pytest.raises(TypeError, match=r"CrossEntropyLoss'> is a class: give an instance of it"):
        small(loss=nn.CrossEntropyLoss).fit(*stripes)


def test_what_the_loss_is_given(coded):
    seen = {}

    def note(kind):
        def loss(scores, target):
            seen[kind] = scores.shape, target.dtype, target.shape
            return LOSSES[kind](scores, target)

        return loss

    for kind in LOSSES:
        cls, X, y = of_kind(coded, kind)
        quick(cls, loss=note(kind), batch_size=64).fit(X, y)
    assert seen == {
        "labels": ((48, 3), torch.int64, (48,)),
        "indicators": ((48, 2), torch.float32, (48, 2)),
        "numbers": ((48, 1), torch.float32, (48, 1)),
    }


@pytest.mark.parametrize("n_targets", [1, 2])
def test_huber_is_torchs(coded, n_targets):
    X, k = coded
    y = k * 5.0 if n_targets == 1 else np.stack([k * 5.0, -k], 1)
    weight = np.linspace(0.5, 2, len(X))
    named, own = (
        small(FineTuningRegressor, loss=loss, lr=0.01).fit(X, y, weight)
        for loss in ("huber", lambda s, t: F.huber_loss(s, t, reduction="none").mean(1))
    )
    assert_same_model(named, own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_weight_of_two_is_the_row_twice_under_any_loss(coded, kind):
    cls, X, y = of_kind(coded, kind)
    settings = {"loss": LOSSES[kind], "lr": 0.01, "unfreeze": 1, "batch_size": 16}
    if kind == "labels":
        settings["class_weight"] = "balanced"
    again = [0, 1, 4, 4]
    weighted = small(cls, **settings).fit(X, y, 1 + np.bincount(again, minlength=len(X)))
    repeated = small(cls, **settings).fit([*X, *X[again]], [*y, *y[again]])
    assert_same_model(weighted, repeated, rtol=0, atol=0)


FOCAL = {  # Lin et al. 2017, as in the guide
    "labels": lambda s, t: (1 - s.softmax(1).gather(1, t[:, None])[:, 0]) ** 2 * F.cross_entropy(
        s, t, reduction="none"
    ),
    "indicators": functools.partial(sigmoid_focal_loss, alpha=-1, reduction="none"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOCAL)
def test_focal_loss_is_that_of_the_formula(coded, kind):
    cls, X, y = of_kind(coded, kind)
    model = quick(cls, loss=FOCAL[kind], lr=1e-12, batch_size=64).fit(X, y)
    p = model.predict_proba(X)
    right = p[np.arange(48), y] if kind == "labels" else np.where(y == 1, p, 1 - p)
    losses = -((1 - right) ** 2) * np.log(right)
    assert model.history_[-1]["train_loss"] == pytest.approx(losses.mean(), rel=1e-4)


@pytest.mark.parametrize("outlier", [5_000.0, 1e16])
@pytest.mark.parametrize("loss", ["huber", nn.HuberLoss(reduction="none"), F.l1_loss])
def test_a_robust_loss_endures_an_outlier(numbers, loss, outlier):
    """One such target among 0…20 changes neither the scale nor the start."""
    X, y = numbers
    y = (y - y.min()) / np.ptp(y) * 20
    loss = functools.partial(F.l1_loss, reduction="none") if loss is F.l1_loss else loss
    clean = small(FineTuningRegressor, loss=loss).fit(X, y)
    broken = np.where(np.arange(48) == 7, outlier, y)
    error, squared = (
        np.abs(small(FineTuningRegressor, loss=given).fit(X, broken).predict(X) - y).mean()
        for given in (loss, "auto")
    )
    assert error < np.abs(clean.predict(X) - y).mean() + 1.5
    assert squared > 20


def test_the_loss_is_checked(stripes):
    for loss in ("huber", "mse", 3):
        with pytest.raises(ValueError, match="The 'loss' parameter of FineTuningClassifier"):
            small(loss=loss).fit(*stripes)
    with pytest.raises(ValueError, match="The 'loss' parameter of FineTuningRegressor"):
        small(FineTuningRegressor, loss="mse").fit(stripes[0], np.arange(48.0))
