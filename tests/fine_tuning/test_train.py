"""Training against naive loops; schedule, optimizer, averaging and the choice of the epoch."""

import functools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from skorch.callbacks import Callback
from small_models import LOSSES, Record, assert_same_model, of_kind, quick, small, state_of
from tiny_networks import tiny_network
from torch import nn

SGD = functools.partial(torch.optim.SGD, momentum=0.9)


# -- a naive loop ----------------------------------------------------------------------------
def one_cycle(progress):
    """From 1/25 to 1 in the first quarter, then to 1e-5, along two half cosines."""
    start, end, share = (1 / 25, 1, 4 * progress)
    if progress >= 0.25:
        start, end, share = (1, 1e-5, (progress - 0.25) / 0.75)
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def naive_training(X, target, weight, start, loss_of, *, optimizer, n_steps, lr, decay):
    """Full-batch training of the tiny network, its batch norm in eval mode."""
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    x = (torch.from_numpy(X).permute(0, 3, 1, 2) / 255 - mean) / std
    network = tiny_network().eval()
    network.fc = nn.Linear(6, len(start["head.linear.bias"]))
    network.fc.weight.data = torch.tensor(start["head.linear.weight"])
    network.fc.bias.data = torch.tensor(start["head.linear.bias"])
    parts = [network.stage1, network.stage2, network.fc]
    groups = [
        {"params": [p for p in part.parameters() if (p.ndim > 1) == decays],
         "weight_decay": 0.01 * decays, "base": lr * decay**distance}
        for part, distance in zip(parts, (2, 1, 0), strict=True) for decays in (True, False)
    ]  # fmt: skip
    optimizer = optimizer(groups, lr=lr)
    weight = torch.from_numpy(weight / weight.mean()).float()
    for step in range(n_steps):
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * one_cycle((step + 0.5) / n_steps)
        optimizer.zero_grad()
        (loss_of(network(x), target) * weight).mean().backward()
        optimizer.step()
    return [p.detach().numpy() for part in parts for p in part.parameters()]


def weights_of(model):
    module = model.net_.module_
    return [p.detach().numpy() for part in (*module.stages, module.head) for p in part.parameters()]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("kind", LOSSES)
def test_training_is_that_of_a_naive_loop(coded, kind, optimizer):
    cls, X, y = of_kind(coded, kind)
    weight = np.linspace(0.5, 2, len(X))
    settings = {"preprocessing": {"size": 20, "crop": 20}, "max_epochs": 5, "batch_size": 64}
    lr = 0.01 if optimizer == "adamw" else 1e-3
    settings |= {"lr": lr, "layer_decay": 0.6, "optimizer": optimizer, "head_init": "random"}
    record = Record()
    model = small(cls, callbacks=[record], **settings).fit(X, y, weight)

    target = torch.from_numpy(y)
    if kind == "numbers":  # brought to mean 0 and variance 1
        mean = np.average(target, weights=weight)
        std = np.sqrt(np.average((target - mean) ** 2, weights=weight))
        target = ((target - mean) / std)[:, None]
    expected = naive_training(
        X, target if kind == "labels" else target.float(), weight, record.start, LOSSES[kind],
        optimizer=torch.optim.AdamW if optimizer == "adamw" else SGD, n_steps=5, lr=lr, decay=0.6,
    )  # fmt: skip
    for got, value in zip(weights_of(model), expected, strict=True):
        np.testing.assert_allclose(got, value, rtol=1e-3, atol=2e-5)


def test_a_cpu_batch_in_parts_trains_the_same_model(coded, first_inputs):
    X, k = coded
    X = X[:12].repeat(12, 1).repeat(12, 2)
    settings = {"preprocessing": {"size": 240, "crop": 240}, "max_epochs": 3, "lr": 0.01}
    record = Record()
    model = small(head_init="random", callbacks=[record], layer_decay=1.0, **settings)
    model.fit(X, k[:12])
    assert max(len(batch) for batch in first_inputs) < 12
    expected = naive_training(
        X, torch.from_numpy(k[:12]), np.ones(12), record.start, LOSSES["labels"],
        optimizer=torch.optim.AdamW, n_steps=3, lr=0.01, decay=1.0,
    )  # fmt: skip
    for got, value in zip(weights_of(model), expected, strict=True):
        np.testing.assert_allclose(got, value, rtol=1e-3, atol=2e-5)


# -- learning rates --------------------------------------------------------------------------
def network_without_norms():
    network = tiny_network()
    network.stage2[1] = nn.Identity()
    return network


@pytest.mark.parametrize(
    ("backbone", "unfreeze", "lr"),
    [(tiny_network, 1, 3e-4), (network_without_norms, 1, 1e-4), (network_without_norms, 0, 3e-4)],
)
def test_auto_rate_is_smaller_where_nothing_normalises(stripes, backbone, unfreeze, lr):
    settings = {"backbone": backbone, "unfreeze": unfreeze}
    auto, given = (small(**settings, lr=rate).fit(*stripes) for rate in ("auto", lr))
    assert_same_model(auto, given, rtol=0, atol=0)
    twice = small(**settings, lr=lr * 2).fit(*stripes)
    assert not np.array_equal(auto.predict_proba(stripes[0]), twice.predict_proba(stripes[0]))


# -- optimizers ------------------------------------------------------------------------------
def test_a_partial_or_a_class_is_an_optimizer(stripes):
    one, other = (small(optimizer=o, lr=0.01).fit(*stripes) for o in ("sgd", SGD))
    assert_same_model(one, other, rtol=0, atol=0)
    model = small(optimizer=torch.optim.NAdam).fit(*stripes)
    assert isinstance(model.net_.optimizer_, torch.optim.NAdam)
    assert {g["weight_decay"] for g in model.net_.optimizer_.param_groups} == {0.0, 0.01}


def test_a_callable_that_returns_no_optimizer(stripes):
    with pytest.raises(TypeError, match=r"optimizer=.* returns None: it must return a torch.optim"):
        small(optimizer=lambda groups, lr: None).fit(*stripes)


# -- averaging -------------------------------------------------------------------------------
def share_of_the_way(model, start, end):
    """How far the kept weights are on the way from `start` to `end`: one share for all."""
    shares = []
    for name, kept in state_of(model).items():
        if name.endswith("num_batches_tracked") or np.abs(end[name] - start[name]).max() < 1e-4:
            continue
        way = (end[name] - start[name]).ravel().astype(float)
        shares.append((kept - start[name]).ravel() @ way / (way @ way))
        expected = start[name] + shares[0] * (end[name] - start[name])
        np.testing.assert_allclose(kept, expected, rtol=1e-3, atol=1e-5, err_msg=name)
    assert len(shares) >= 4
    return shares[0]


@pytest.mark.parametrize(("n_rows", "share"), [(48, 0.5), (400, 0.625), (700, 0.75)])
def test_weights_between_start_and_end_are_kept(n_rows, share):
    X = np.random.default_rng(0).integers(0, 256, (n_rows, 8, 8, 3), dtype=np.uint8)
    record = Record()
    model = small(lr=0.01, callbacks=[record]).fit(X, np.arange(n_rows) % 3)
    found = share_of_the_way(model, record.before[0], record.after[-1])
    assert found == pytest.approx(share, rel=1e-3)


def test_the_way_begins_where_stages_join_the_head(stripes):
    record = Record()
    settings = {"unfreeze": {1: 0, 2: 1}, "lr": 0.01, "max_epochs": 3, "batch_size": 16}
    model = small(callbacks=[record], **settings).fit(*stripes)
    found = share_of_the_way(model, record.before[3], record.after[-1])
    assert found == pytest.approx(0.5, rel=1e-3)


@pytest.mark.filterwarnings("ignore:.*did not improve")
@pytest.mark.parametrize(
    "settings",
    [{"early_stopping": True, "validation_fraction": 0.3}, {"head_init": "random"},
     {"unfreeze": 0}, {"backbone": "builtin", "weights": None, "preprocessing": "auto"}],
    ids=str,
)  # fmt: skip
def test_when_the_last_weights_are_kept(stripes, settings):
    record = Record()
    settings = {"lr": 1e-3, "max_epochs": 1, "callbacks": [record]} | settings
    model = small(**settings).fit(stripes[0][:24], stripes[1][:24])
    if model.best_epoch_ == 1:
        np.testing.assert_equal(state_of(model), record.after[-1])
    else:
        np.testing.assert_equal(state_of(model), record.start)


# -- the epoch that is kept ------------------------------------------------------------------
def test_never_below_the_probe_on_the_validation_part(stripes):
    X, y = stripes
    with pytest.warns(UserWarning, match="did not improve on the linear probe"):
        model = small(lr=0.5, early_stopping=True, validation_fraction=0.4, max_epochs=3).fit(X, y)
    scores = [row["valid_score"] for row in model.history_]
    assert [row["epoch"] for row in model.history_] == [0, 1, 2, 3]
    assert model.best_epoch_ == 0
    assert max(scores) == scores[0]
    start = small(unfreeze=0, max_epochs=0).fit(X, y)
    np.testing.assert_allclose(model.transform(X), start.transform(X), rtol=1e-5)


def test_validation_rows_can_be_given(stripes):
    X, y = stripes
    model = small(lr=0.01, max_epochs=4, random_state=1)
    model.fit(X[:30], y[:30], X_val=X[30:], y_val=y[30:])
    assert [row["epoch"] for row in model.history_] == [0, 1, 2, 3, 4]
    best = max(row["valid_score"] for row in model.history_)
    assert model.score(X[30:], y[30:]) == pytest.approx(best)
    losses = {row["epoch"]: row["valid_loss"] for row in model.history_}
    proba = model.predict_proba(X[30:])
    own = proba[np.arange(18), np.searchsorted(model.classes_, y[30:])]
    assert -np.log(own).mean() == pytest.approx(losses[model.best_epoch_], rel=1e-4)
    with pytest.raises(ValueError, match="y_val is given without X_val: give both, or neither"):
        small().fit(X, y, y_val=y)
    with pytest.raises(ValueError, match="X_val is given without y_val"):
        small().fit(X, y, X_val=X)
    with pytest.raises(ValueError, match="y_val holds the label 'new' in row 1"):
        small().fit(X, y, X_val=X[:2], y_val=["down", "new"])


def test_errors_of_validation_images_name_them(stripes):
    X, y = stripes
    frame = pd.DataFrame({"a": list(X), "b": list(X)})
    flat = X[:, ::2, ::2, 0].reshape(48, -1) / 255
    one, pixels = quick(), quick(image_shape=(10, 10))
    for model, train, valid, message in (
        (one, frame[["a"]], frame[["a", "b"]], "^X_val: The feature names should match"),
        (one, X, [[a, a] for a in X], r"^X_val: X has 2 image column\(s\)"),
        (one, X, [], "^X_val: Found array with 0 sample"),
        (one, X, (a for a in X), "^X_val: X is of type generator"),
        (pixels, flat, flat[:, :64], "^X_val: X has 64 features"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            model.fit(train, y, X_val=valid, y_val=y)


def test_patience_ends_training(stripes):
    model = small(lr=1e-12, early_stopping=True, n_iter_no_change=2, max_epochs=9)
    with pytest.warns(UserWarning, match="did not improve"):
        model.fit(*stripes)
    assert model.n_iter_ == 2


@pytest.mark.parametrize("rows", [[0, 1, 2], slice(None)], ids=["one of each", "small part"])
def test_no_row_to_validate_on(stripes, rows):
    X, y = stripes
    model = small(early_stopping=True, validation_fraction=1e-3)
    with pytest.warns(UserWarning, match=r"no early stopping: validation_fraction=0.001 of \d+"):
        model.fit(X[rows], y[rows])
    assert_same_model(model, small(early_stopping=False).fit(X[rows], y[rows]), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*did not improve")
@pytest.mark.parametrize("n_rows", [999, 1000])
def test_a_thousand_rows_are_enough_to_split(n_rows):
    X = np.random.default_rng(0).integers(0, 256, (n_rows, 4, 4, 3), dtype=np.uint8)
    model = quick().fit(X, np.arange(n_rows) % 2)
    assert ("valid_score" in model.history_[-1]) == (n_rows == 1000)


# -- numbers that are not finite -------------------------------------------------------------
def test_infinite_loss_is_an_error_that_names_the_learning_rate(stripes):
    message = r"loss became (nan|inf) in epoch.*learning rate that is too large: lr=1e\+30"
    with pytest.raises(ValueError, match=message):
        small(lr=1e30, optimizer="sgd", max_epochs=5).fit(*stripes)


@pytest.mark.parametrize("method", ["fit", "partial_fit"])
def test_weights_that_became_infinite_in_the_last_step_are_an_error(stripes, method):
    class Spoil(Callback):
        def on_epoch_end(self, net, **kwargs):
            net.module_.head.linear.bias.data[1] = np.inf

    with pytest.raises(ValueError, match=r"weights head\.linear\.bias .*finite.*lr=0\.1"):
        getattr(small(lr=0.1, max_epochs=1, callbacks=[Spoil()]), method)(*stripes)


# -- precision and repeatability -------------------------------------------------------------
def test_bfloat16_ends_near_float32(stripes):
    settings = {"unfreeze": 1, "lr": 0.03, "max_epochs": 4, "optimizer": "sgd"}
    full = small(**settings).fit(*stripes)
    half = small(precision="bfloat16", **settings).fit(*stripes)
    assert {v.dtype for v in state_of(half).values()} <= {np.dtype("float32"), np.dtype("int64")}
    X, _ = stripes
    np.testing.assert_allclose(half.predict_proba(X), full.predict_proba(X), atol=0.1)


def test_same_seed_same_model_and_global_seeds_stay(stripes, monkeypatch):
    settings = {"augment": "strong", "dropout": 0.3, "head": (4,), "unfreeze": 1}
    first = small(**settings).fit(*stripes)
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    states = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    second = small(**settings).fit(*stripes)
    assert torch.equal(torch.get_rng_state(), states[0])
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert_same_model(first, second, rtol=0, atol=0)
    other = small(**settings | {"random_state": 1}).fit(*stripes)
    X, _ = stripes
    assert not np.allclose(other.predict_proba(X), first.predict_proba(X), rtol=1e-6)
