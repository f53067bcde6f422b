"""FineTuningClassifier and FineTuningRegressor: what they promise."""

import copy
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from sklearn import config_context
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import RandomForestClassifier, StackingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from skorch.callbacks import Callback, EarlyStopping, EpochScoring, LRScheduler
from tiny_networks import tiny_network

import sktransfer
from sktransfer import (
    FineTuningClassifier,
    FineTuningRegressor,
    Optimizer,
    PretrainedFeatureExtractor,
    load_backbone,
)
from sktransfer._threads import own_random_state
from sktransfer.embedding._batches import cpu_batch_size
from sktransfer.fine_tuning import _base as _fine_tuning_base
from sktransfer.fine_tuning import _boundary as boundary
from sktransfer.fine_tuning import _module as tuned_module
from sktransfer.fine_tuning import _probe as linear_probe
from sktransfer.fine_tuning import _rows as training_rows
from sktransfer.fine_tuning import _train as _training
from sktransfer.fine_tuning._tuned_network import learnt
from sktransfer.images._images import as_images

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"preprocessing": {"size": 16, "crop": 16}, "random_state": 0}


def small(cls=FineTuningClassifier, **parameters):
    return cls(**{"backbone": tiny_network, **SMALL, "max_epochs": 2, **parameters})


def state_of(model):
    return {k: v.copy() for k, v in model._tuned.trained_state().items()} | {
        f"head.{k}": v.numpy().copy() for k, v in model._tuned.head.state_dict().items()
    }


def assert_same_model(a, b, **tolerance):
    left, right = state_of(a), state_of(b)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_allclose(left[name], right[name], err_msg=name, **tolerance)


# -- parts of a batch ------------------------------------------------------------------------
@pytest.mark.parametrize("unfreeze", [1, "all", "gradual"])
def test_a_batch_in_parts_trains_the_same_model(stripes, monkeypatch, unfreeze):
    whole = small(unfreeze=unfreeze).fit(*stripes)
    parts = []
    monkeypatch.setattr(tuned_module, "cpu_batch_size", lambda shape: parts.append(shape) or 3)
    in_parts = small(unfreeze=unfreeze, memory=False).fit(*stripes)
    assert parts
    assert_same_model(in_parts, whole, rtol=1e-4, atol=1e-5)


def test_statistics_that_move_are_those_of_whole_batches(stripes, monkeypatch):
    whole = small(batch_norm="moving").fit(*stripes)
    monkeypatch.setattr(tuned_module, "cpu_batch_size", lambda shape: 3)
    assert_same_model(small(batch_norm="moving").fit(*stripes), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("shape", "n"), [
    ((3, 224, 224), 8), ((1, 224, 224), 8), ((3, 1000, 1000), 4), ((3, 80, 80), 32),
    ((24, 56, 56), 16), ((32, 112, 112), 4), ((96, 14, 14), 32), ((197, 768), 7),
])  # fmt: skip
def test_how_much_goes_through_a_cpu_at_once(shape, n):
    assert cpu_batch_size(shape) == n


# -- the start -------------------------------------------------------------------------------
@pytest.mark.parametrize("head", ["linear", (5,)])
@pytest.mark.parametrize("unfreeze", [0, 1, "all"])
def test_epoch_zero_is_the_linear_probe(stripes, head, unfreeze):
    X, y = stripes
    probe = small(max_epochs=0, unfreeze=0).fit(X, y)
    start = small(max_epochs=0, unfreeze=unfreeze, head=head).fit(X, y)
    np.testing.assert_allclose(
        start.decision_function(X), probe.decision_function(X), rtol=1e-4, atol=1e-4
    )
    # It is a logistic regression on standardised embeddings: gradient of its loss and penalty.
    rows = probe.transform(X).astype(float)
    coef = probe._tuned.head.linear.weight.detach().numpy() * rows.std(axis=0)
    z = (rows - rows.mean(axis=0)) / rows.std(axis=0)
    error = probe.predict_proba(X) - (y[:, None] == probe.classes_)
    gradient = error.T @ z
    strength = -np.median(coef / gradient)
    assert strength > 0
    np.testing.assert_allclose(coef, -strength * gradient, atol=0.02 * abs(coef).max())


def test_probe_of_two_classes_and_of_numbers(stripes):
    X, y = stripes
    two = small(max_epochs=0).fit(X[y != "plain"], y[y != "plain"])
    assert two.decision_function(X).shape == (len(X),)
    numbers = small(FineTuningRegressor, max_epochs=0).fit(X, X.mean(axis=(1, 2, 3)))
    assert numbers.score(X, X.mean(axis=(1, 2, 3))) > 0.5


def test_never_below_the_probe_on_the_validation_part(stripes):
    X, y = stripes
    with pytest.warns(UserWarning, match="did not improve on the linear probe"):
        model = small(lr=0.5, early_stopping=True, validation_fraction=0.4, max_epochs=3).fit(X, y)
    scores = [row["valid_score"] for row in model.history_]
    assert [row["epoch"] for row in model.history_] == [0, 1, 2, 3]
    assert model.best_epoch_ == 0
    assert max(scores) == scores[0]
    for name, value in load_backbone(tiny_network, preprocessing=SMALL["preprocessing"]
                                     ).network.module.state_dict().items():  # fmt: skip
        np.testing.assert_array_equal(model._tuned._root.state_dict()[name], value, err_msg=name)


@pytest.mark.parametrize("scale", [1e-3, 50])
def test_the_scale_of_weights_does_not_matter(stripes, scale):
    X, y = stripes
    start = small(max_epochs=0).fit(X, y)
    weighted = small(max_epochs=0).fit(X, y, sample_weight=np.full(len(y), scale))
    np.testing.assert_allclose(weighted.predict_proba(X), start.predict_proba(X), atol=1e-3)


@pytest.mark.parametrize("scale", [1e-15, 1e12])
def test_the_scale_of_numbers_does_not_matter(stripes, scale):
    X, y = stripes
    numbers = np.unique(y, return_inverse=True)[1] + 1.0
    model, scaled = (small(FineTuningRegressor).fit(X, numbers * s) for s in (1, scale))
    np.testing.assert_allclose(scaled.predict(X) / scale, model.predict(X), rtol=1e-4)


# -- what is frozen --------------------------------------------------------------------------
# Every family of torchvision's classification builders, at a size it accepts.
FAMILIES = {
    "resnet18": 32, "mobilenet_v3_small": 32, "squeezenet1_1": 32, "shufflenet_v2_x0_5": 32,
    "alexnet": 64, "convnext_tiny": 32, "densenet121": 32, "efficientnet_b0": 32,
    "efficientnet_v2_s": 32, "googlenet": 64, "inception_v3": 96, "maxvit_t": 224,
    "mnasnet0_5": 32, "mobilenet_v2": 32, "regnet_y_400mf": 32, "resnext50_32x4d": 32,
    "swin_t": 32, "swin_v2_t": 64, "vgg11_bn": 32, "vit_b_32": 224, "wide_resnet50_2": 32,
}  # fmt: skip


def test_every_family_is_among_them():
    def families(names):
        return {torchvision.models.get_model_builder(name).__module__ for name in names}

    assert families(FAMILIES) == families(torchvision.models.list_models(torchvision.models))


def check_frozen_stages(name):
    size = FAMILIES[name]
    rng = np.random.default_rng(0)
    X = rng.integers(0, 256, (4, size, size, 3), dtype=np.uint8)
    model = FineTuningClassifier(
        name, weights=None, preprocessing={"size": size, "crop": size}, unfreeze=1, max_epochs=1,
        batch_norm="moving", augment="light", lr=0.1, head_init="random", random_state=0,
    ).fit(X, [0, 1, 0, 1])  # fmt: skip
    module = model.net_.module_
    before = model.backbone_.stages
    assert 0 < module.n_frozen == model._tuned.lowest
    moved = 0
    for i, (stage, old) in enumerate(zip(module.stages, before, strict=False)):
        state = learnt(stage)
        for key, value in learnt(old.module).items():
            same = torch.equal(state[key], value)
            if i < module.n_frozen:
                assert same, (old.name, key)
            moved += not same
    assert moved > 0
    in_optimizer = {id(p) for g in model.net_.optimizer_.param_groups for p in g["params"]}
    for i, stage in enumerate(module.stages):
        for parameter in stage.parameters():
            assert parameter.requires_grad == (i >= module.n_frozen)
            assert (id(parameter) in in_optimizer) == (i >= module.n_frozen)


@pytest.mark.parametrize("name", list(FAMILIES)[:4])
def test_frozen_stages_are_bit_identical(name):
    check_frozen_stages(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FAMILIES)[4:])
def test_frozen_stages_are_bit_identical_in_every_family(name):
    check_frozen_stages(name)


def test_frozen_stages_stay_in_eval_mode_and_norms_keep_their_statistics(stripes):
    X, y = stripes
    model = small(unfreeze=1).fit(X, y)
    module = model.net_.module_.train()
    assert [stage.training for stage in module.stages] == [False, True, True]
    fixed = dict(model._tuned._root.named_buffers())
    for name, value in model.backbone_.network.module.named_buffers():
        assert torch.equal(fixed[name], value), name
    moving = small(unfreeze=1, batch_norm="moving").fit(X, y)
    buffers = dict(moving._tuned._root.named_buffers())
    assert not torch.equal(buffers["4.running_mean"], fixed["4.running_mean"])


def test_layer_decay_is_in_lr(stripes):
    X, y = stripes
    model = small(layer_decay=0.5, lr=0.01, lr_schedule="constant").fit(X, y)
    rates = {g["stage"]: g["lr"] for g in model.net_.optimizer_.param_groups}
    names = model.net_.module_.stage_names
    assert rates["head"] == 0.01
    assert rates[names[1]] == pytest.approx(0.005)
    assert rates["stem"] == pytest.approx(0.0025)
    decays = {g["weight_decay"] for g in model.net_.optimizer_.param_groups}
    assert decays == {0.0, 0.01}


class Spy(Callback):
    seen = []  # noqa: RUF012

    def on_batch_end(self, net, training=False, **kwargs):
        if training:
            head = net.module_.head.linear.weight
            Spy.seen.append(
                (len(net.optimizer_.param_groups), int(net.optimizer_.state[head]["step"]))
            )


@pytest.mark.parametrize("unfreeze", ["gradual", {1: 0, 3: 1, 4: "all"}])
def test_stages_join_without_resetting_the_others(stripes, unfreeze):
    X, y = stripes
    Spy.seen.clear()
    model = small(unfreeze=unfreeze, max_epochs=4, batch_size=64, callbacks=[Spy()]).fit(X, y)
    n_groups, steps = zip(*Spy.seen, strict=True)
    assert list(steps) == [1, 2, 3, 4]
    assert sorted(n_groups) == list(n_groups)
    assert len(set(n_groups)) >= 2
    n_unfrozen = [row["n_unfrozen"] for row in model.history_]
    assert n_unfrozen[0] == 0
    assert n_unfrozen[-1] == 2


@pytest.mark.parametrize(
    ("unfreeze", "message"),
    [(9, "2 stages below its head"), ({0: 1}, "count from 1"), ({1: 2, 2: 1}, "must not fall")],
)
def test_unfreeze_is_checked(stripes, unfreeze, message):
    with pytest.raises(ValueError, match=message):
        small(unfreeze=unfreeze).fit(*stripes)


# -- fast and slow ---------------------------------------------------------------------------
@pytest.mark.parametrize("unfreeze", [0, 1, "gradual"])
def test_fast_and_slow_ways_agree(stripes, unfreeze, monkeypatch):
    X, y = stripes
    fast = small(unfreeze=unfreeze, lr=1e-2).fit(X, y)
    # Pictures that stay as they are: the frozen stages run again in every epoch.
    slow = small(unfreeze=unfreeze, lr=1e-2, augment=lambda picture: picture).fit(X, y)
    assert_same_model(fast, slow, rtol=2e-3, atol=2e-3)
    monkeypatch.setattr(training_rows, "MAX_MEMORY_BYTES", 0)
    on_disk = small(unfreeze=unfreeze, lr=1e-2, memory=False).fit(X, y)
    monkeypatch.setattr(training_rows, "MAX_DISK_BYTES", 0)
    decoded_again = small(unfreeze=unfreeze, lr=1e-2, memory=False).fit(X, y)
    for model in (on_disk, decoded_again):
        assert_same_model(fast, model, rtol=2e-3, atol=2e-3)


# -- weights ---------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:.*did not improve")
@pytest.mark.parametrize("cls", [FineTuningClassifier, FineTuningRegressor])
def test_weight_two_is_the_row_twice(stripes, cls):
    X, y = stripes
    y = y if cls is FineTuningClassifier else X.mean(axis=(1, 2, 3))
    weight = np.arange(len(X)) // 3 % 3
    twice = np.repeat(np.arange(len(X)), weight)[::-1]
    kwargs = {"batch_size": 8, "early_stopping": True, "lr": 0.01, "validation_fraction": 0.2}
    if cls is FineTuningClassifier:
        kwargs["class_weight"] = "balanced"
    weighted = small(cls, **kwargs)
    repeated = small(cls, **kwargs)
    weighted.fit(X, y, sample_weight=weight)
    repeated.fit(X[twice], y[twice])
    assert_same_model(weighted, repeated, rtol=1e-6)


def test_class_weight(stripes):
    X, y = stripes
    rare = np.flatnonzero((y != "down") | (np.arange(len(y)) < 8))
    plain = small(max_epochs=0).fit(X[rare], y[rare]).predict_proba(X)[:, 1].mean()
    parameters = [{"class_weight": "balanced"}, {"class_weight": {"down": 5}}]
    for more in parameters:
        assert (
            small(max_epochs=0, **more).fit(X[rare], y[rare]).predict_proba(X)[:, 1].mean() > plain
        )


# -- targets ---------------------------------------------------------------------------------
@pytest.mark.parametrize("labels", [["a", "b", "c"], [10, 20, 30], [1.0, 2.0, 3.0], [-1, 0, 1]])
def test_labels_come_back_as_they_went_in(stripes, labels):
    X, y = stripes
    y = np.array(labels)[np.unique(y, return_inverse=True)[1]]
    model = small(max_epochs=0).fit(X, y)
    assert model.predict(X).dtype == y.dtype
    assert set(model.predict(X)) <= set(labels)
    proba = model.predict_proba(X)
    assert proba.dtype == np.float64
    np.testing.assert_allclose(proba.sum(axis=1), 1, rtol=1e-12)


def test_booleans_and_categories(stripes):
    X, y = stripes
    assert small(max_epochs=0).fit(X, y == "down").predict(X).dtype == bool
    categories = pd.Series(y, dtype="category")
    assert small(max_epochs=0).fit(X, categories).score(X, categories) > 0.6


def test_several_labels_per_row(stripes):
    X, y = stripes
    Y = np.stack([y == "down", y != "plain", np.zeros(len(y))], axis=1).astype(int)
    model = small(unfreeze=1, label_smoothing=0.1, mixup=0.2, class_weight="balanced").fit(X, Y)
    assert model.predict(X).shape == Y.shape
    assert model.predict_proba(X).shape == Y.shape
    assert (model.predict(X)[:, 2] == 0).all()
    assert model.score(X, Y) > 0.5


def test_several_targets(stripes):
    X, _ = stripes
    Y = np.stack([X.mean(axis=(1, 2, 3)), 1000 + X.std(axis=(1, 2, 3))], axis=1)
    predicted = small(FineTuningRegressor, unfreeze=1).fit(X, Y).predict(X)
    assert predicted.shape == Y.shape
    np.testing.assert_allclose(predicted.mean(axis=0), Y.mean(axis=0), rtol=0.1)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (["a"] * 48, "one class only: 'a'"),
        ([np.nan] + [1.0] * 47, "contains NaN"),
        ([None] + ["a", "b"] * 23 + ["a"], "contains NaN or None: the label of row 0 is None"),
        (np.linspace(0, 1, 48), "Unknown label type"),
        (["a", "b"], "inconsistent numbers of samples"),
        (None, "requires y to be passed"),
    ],
)
def test_bad_labels_are_clear_errors(stripes, y, message):
    y = None if y is None else np.array(y, dtype=object if y[0] is None else None)
    with pytest.raises(ValueError, match=message):
        small().fit(stripes[0], y)


@pytest.mark.parametrize("change", [lambda y: 2 * y, lambda y: 2 * y - 1], ids=["0, 2", "-1, 1"])
def test_indicators_are_0_and_1(stripes, change):
    X, y = stripes
    indicators = np.stack([y == "down", y != "plain"], axis=1).astype(int)
    with pytest.raises(ValueError, match="no indicator matrix of 0 and 1"):
        small().fit(X, change(indicators))


@pytest.mark.parametrize("factor", [-1.0, 0.0])
def test_impossible_class_weights_are_told(stripes, factor):
    X, y = stripes
    class_weight = dict.fromkeys(np.unique(y), factor)
    with pytest.raises(ValueError, match="none may be negative, NaN or infinite, and not all zero"):
        small(class_weight=class_weight).fit(X, y)


# -- training --------------------------------------------------------------------------------
def test_same_seed_same_model_and_global_seeds_left_alone(stripes, monkeypatch):
    X, y = stripes
    kwargs = {"augment": "strong", "dropout": 0.3, "mixup": 0.3, "head": (4,), "unfreeze": 1}
    first = small(**kwargs).fit(X, y)
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    states = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    second = small(**kwargs).fit(X, y)
    assert torch.equal(torch.get_rng_state(), states[0])
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert_same_model(first, second, rtol=0, atol=0)
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    small(**kwargs).fit(X, y)
    assert not seeded  # nor are those of devices on which nothing is trained
    other = small(**kwargs).set_params(random_state=1).fit(X, y)
    assert not np.allclose(other.predict_proba(X), first.predict_proba(X), rtol=1e-6)


def test_trainings_that_overlap_leave_the_callers_random_state(stripes):
    before = torch.get_rng_state()
    first, second = own_random_state(1), own_random_state(2)
    with ThreadPoolExecutor(1) as pool:
        first.__enter__()
        pool.submit(second.__enter__).result()
        torch.rand(3)
        first.__exit__(None, None, None)
        torch.rand(3)
        pool.submit(second.__exit__, None, None, None).result()
    assert torch.equal(torch.get_rng_state(), before)


def test_order_of_rows_does_not_matter(stripes):
    X, y = stripes
    order = np.random.default_rng(0).permutation(len(X))
    assert_same_model(small().fit(X, y), small().fit(X[order], y[order]), rtol=0, atol=0)


def test_training_learns(stripes):
    X, y = stripes
    model = small(lr=0.01, max_epochs=15).fit(X[:36], y[:36])
    assert model.history_[-1]["train_loss"] < 0.5 * model.history_[0]["train_loss"]
    assert len(pd.DataFrame(model.history_)) == model.n_iter_ == model.best_epoch_ == 15


@pytest.mark.parametrize(
    "parameters",
    [
        {"optimizer": "sgd", "lr_schedule": "cosine"},
        {"optimizer": Optimizer("sgd", nesterov=True), "gradient_clip": 0.1},
        {"optimizer": torch.optim.NAdam, "lr_schedule": lambda progress: 1 - progress},
        {"head": torch.nn.Sequential(torch.nn.Linear(6, 3))},
        {"precision": "bfloat16", "augment": "strong"},
        {"pooling": "max", "layer": None, "n_views": 3},
        {"layer": "stem", "n_views": 2, "label_smoothing": 0.1},
        {"l2_sp": 1.0, "weights": "DEFAULT"},
    ],
    ids=lambda p: next(iter(p)),
)
def test_options_train(stripes, parameters):
    X, y = stripes
    model = small(**parameters).fit(X, y)
    assert np.isfinite(model.predict_proba(X)).all()
    assert model.transform(X).shape == (48, model.n_features_out_)
    assert len(model.get_feature_names_out()) == model.n_features_out_


def test_l2_sp_keeps_near_the_pre_trained_weights(stripes):
    X, y = stripes

    def distance(model):
        own = dict(model._tuned._root.named_parameters())
        old = model.backbone_.network.module.named_parameters()
        return sum(float((own[name].detach() - value).square().sum()) for name, value in old)

    # As SGD takes the penalty's gradient as it is, and Adam normalises it.
    kwargs = {"optimizer": Optimizer("sgd", momentum=0.0), "lr": 0.01, "max_epochs": 5}
    free = distance(small(**kwargs).fit(X, y))
    assert distance(small(l2_sp=50.0, **kwargs).fit(X, y)) < 0.6 * free


def test_augmentation_is_for_training_alone(stripes):
    X, y = stripes
    calls = []

    def augment(picture):
        calls.append(picture.dtype)
        return picture

    model = small(augment=augment, max_epochs=3, early_stopping=False)
    model.fit(X[:40], y[:40], X_val=X[40:], y_val=y[40:])
    assert len(calls) == 3 * 40
    assert set(calls) == {torch.uint8}
    model.predict(X)
    assert len(calls) == 3 * 40


def test_validation_rows_can_be_given(stripes):
    X, y = stripes
    model = small(lr=0.01, max_epochs=4, random_state=1)
    model.fit(X[:30], y[:30], X_val=X[30:], y_val=y[30:])
    assert [row["epoch"] for row in model.history_] == [0, 1, 2, 3, 4]
    best = max(row["valid_score"] for row in model.history_)
    assert model.score(X[30:], y[30:]) == pytest.approx(best)
    with pytest.raises(ValueError, match="y_val is given without X_val"):
        small().fit(X, y, y_val=y)
    with pytest.raises(ValueError, match="y_val holds the label 'new' in row 1"):
        small().fit(X, y, X_val=X[:2], y_val=["down", "new"])


def test_patience_ends_training(stripes):
    X, y = stripes
    with pytest.warns(UserWarning, match="did not improve"):
        model = small(
            lr=1e-12, early_stopping=True, n_iter_no_change=2, max_epochs=9, tol=0.01
        ).fit(X, y)
    assert model.n_iter_ == 2


def test_infinite_loss_is_an_error_that_names_the_learning_rate(stripes):
    with pytest.raises(ValueError, match=r"loss became (nan|inf) in epoch.*lr=1e\+30"):
        small(lr=1e30, optimizer="sgd", max_epochs=5).fit(*stripes)


@pytest.mark.parametrize("method", ["fit", "partial_fit"])
def test_weights_that_became_infinite_in_the_last_step_are_an_error(stripes, method):
    class Spoil(Callback):
        def on_epoch_end(self, net, **kwargs):
            net.module_.head.linear.bias.data[1] = np.inf

    with pytest.raises(ValueError, match=r"weights head.linear.bias are no finite.*lr=0.1"):
        getattr(small(lr=0.1, max_epochs=1, callbacks=[Spoil()]), method)(*stripes)


def test_a_scheduler_of_skorch_sets_the_rates_where_they_are_constant(stripes):
    rates = []

    class Note(Callback):
        def on_batch_begin(self, net, training, **kwargs):
            rates.append(net.optimizer_.param_groups[0]["lr"])

    scheduler = LRScheduler(policy="StepLR", step_size=1, gamma=0.1)
    settings = {"callbacks": [("note", Note()), scheduler], "batch_size": 64, "lr": 1e-2}
    small(lr_schedule="constant", max_epochs=3, **settings).fit(*stripes)
    np.testing.assert_allclose(rates, [1e-2, 1e-3, 1e-4])
    with pytest.raises(ValueError, match="lr_schedule='one_cycle' would undo"):
        small(**settings).fit(*stripes)


@pytest.mark.parametrize("rows", [[0, 1, 2], slice(None)], ids=["one of each", "small part"])
def test_no_row_to_validate_on_is_told(stripes, rows):
    X, y = stripes
    model = small(early_stopping=True, validation_fraction=1e-3)
    with pytest.warns(UserWarning, match=r"no early stopping: validation_fraction=0.001 of \d+"):
        model.fit(X[rows], y[rows])
    assert_same_model(model, small(early_stopping=False).fit(X[rows], y[rows]), rtol=0, atol=0)


@pytest.mark.parametrize("is_deliberate", [False, True])
def test_ctrl_c_within_a_callback_is_no_wish_of_it(stripes, is_deliberate):
    class Stop(Callback):
        def on_epoch_end(self, net, **kwargs):
            if is_deliberate:
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGINT)
            time.sleep(10)

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = small(callbacks=[Stop()], max_epochs=5).fit(*stripes)
    assert model.n_iter_ == 1
    assert any("interrupted after 1 epochs" in str(w.message) for w in told) != is_deliberate


@pytest.mark.filterwarnings("ignore:.*did not improve")
def test_ctrl_c_keeps_the_best_epoch(stripes, monkeypatch):
    X, y = stripes
    real = sktransfer.fine_tuning._rows.Batches._fetch
    n_calls = []

    def fetch(self, batch):
        n_calls.append(1)
        if self.generator is not None and len(n_calls) > 8:
            raise KeyboardInterrupt
        return real(self, batch)

    monkeypatch.setattr(sktransfer.fine_tuning._rows.Batches, "_fetch", fetch)
    model = small(max_epochs=50, early_stopping=True)
    with pytest.warns(UserWarning, match="was interrupted after"):
        model.fit(X, y)
    assert 0 < model.n_iter_ < 50
    assert model.predict(X).shape == (48,)


# -- skorch ----------------------------------------------------------------------------------
def test_skorch_callbacks_work_and_do_not_break_clone(stripes):
    X, y = stripes
    callbacks = [EpochScoring("accuracy", name="acc"), ("stop", EarlyStopping(patience=1))]
    model = small(callbacks=callbacks, max_epochs=20, early_stopping=False, lr=1e-9)
    model.fit(X, y, X_val=X, y_val=y)
    assert model.n_iter_ < 20
    assert "acc" in model.net_.history[-1]
    assert model.callbacks is callbacks
    assert callbacks[0].__dict__ == EpochScoring("accuracy", name="acc").__dict__
    clone(model).fit(X, y, X_val=X, y_val=y)


def test_net_is_skorchs(stripes, capsys):
    X, y = stripes
    model = small(verbose=1, max_epochs=1).fit(X, y)
    assert "train_loss" in capsys.readouterr().out
    assert type(model.net_).__module__.startswith("skorch")
    assert type(small(FineTuningRegressor).fit(X, np.arange(48.0)).net_).__name__ == (
        "NeuralNetRegressor"
    )


# -- scikit-learn ----------------------------------------------------------------------------
def test_grid_search(stripes):
    X, y = stripes
    grid = [
        {"unfreeze": [0, 1], "lr": [1e-3, 1e-2]},
        {"optimizer": [Optimizer("sgd")], "optimizer__momentum": [0.5, 0.9]},
        {"layer_decay": [0.5], "backbone": ["builtin"], "unfreeze": [0]},
    ]
    search = GridSearchCV(small(max_epochs=1), grid, cv=2, error_score="raise").fit(X, y)
    assert len(search.cv_results_["params"]) == 7
    assert search.predict(X).dtype == y.dtype


@pytest.mark.slow
def test_search_in_two_processes(stripes):
    X, y = stripes
    model = FineTuningClassifier(unfreeze=0, max_epochs=1, random_state=0)
    search = GridSearchCV(model, {"lr": [1e-3, 1e-2]}, cv=2, n_jobs=2, error_score="raise")
    alone = GridSearchCV(model, {"lr": [1e-3, 1e-2]}, cv=2, error_score="raise")
    np.testing.assert_allclose(
        search.fit(X, y).cv_results_["mean_test_score"],
        alone.fit(X, y).cv_results_["mean_test_score"],
    )


def test_folds_lacking_a_class(stripes):
    X, y = stripes
    assert list(small(max_epochs=1).fit(X[y != "down"], y[y != "down"]).classes_) == [
        "across",
        "plain",
    ]


def test_calibration_stacking_and_cross_validation(stripes):
    X, y = stripes
    base = small(max_epochs=1, unfreeze=0)
    calibrated = CalibratedClassifierCV(base, cv=2).fit(X, y)
    np.testing.assert_allclose(calibrated.predict_proba(X).sum(axis=1), 1)
    frame = pd.DataFrame({"photo": list(X)})
    stack = StackingClassifier([("tuned", base)], cv=2).fit(frame[["photo"]], y)
    assert stack.predict(frame).shape == (48,)
    assert cross_val_score(base, X, y, cv=3).shape == (3,)


def test_tuned_network_before_a_classical_model(stripes):
    X, y = stripes
    pipe = make_pipeline(
        small(unfreeze=1).set_output(transform="pandas"), LogisticRegression(max_iter=10_000)
    )
    assert pipe.fit(X, y).score(X, y) > 0.6
    assert pipe[:-1].transform(X).columns[0].endswith("tuned_000")
    forest = make_pipeline(small(max_epochs=1), RandomForestClassifier(10, random_state=0))
    assert forest.fit(X, y).score(X, y) > 0.9


def test_validation_rows_through_a_pipeline(stripes):
    from sklearn import config_context
    from sklearn.preprocessing import FunctionTransformer

    X, y = stripes
    with config_context(enable_metadata_routing=True):
        model = small(early_stopping=False).set_fit_request(X_val=True, y_val=True)
        pipe = make_pipeline(FunctionTransformer(lambda X: X[:, ::-1]), model)
        pipe.set_params(transform_input=["X_val"])
        pipe.fit(X[:40], y[:40], X_val=X[40:], y_val=y[40:])
        assert "valid_score" in pipe[-1].history_[0]
        flipped = small(early_stopping=False)
        flipped.fit(X[:40, ::-1], y[:40], X_val=X[40:, ::-1], y_val=y[40:])
    assert_same_model(pipe[-1], flipped, rtol=0, atol=0)


def test_transform_of_a_frozen_network_is_the_extractors(stripes):
    X, y = stripes
    rows = PretrainedFeatureExtractor().fit_transform(X)
    model = FineTuningClassifier(unfreeze=0, max_epochs=1).fit(X, y)
    np.testing.assert_array_equal(model.transform(X), rows)


def test_predictions_share_one_pass(stripes, monkeypatch):
    X, y = stripes
    model = small(unfreeze=1).fit(X, y)
    proba = model.predict_proba(X)

    def refuse(*args, **kwargs):
        raise AssertionError("decoded again")

    monkeypatch.setattr(sktransfer.images._images.Images, "picture", refuse)
    np.testing.assert_array_equal(model.predict_proba(X), proba)
    assert model.transform(X[:3]).shape == (3, 6)
    with pytest.raises(AssertionError, match="decoded again"):
        model.predict(X[:, ::-1])


def test_several_image_columns(stripes):
    X, y = stripes
    frame = pd.DataFrame({"front": list(X), "back": list(X[::-1])})
    for unfreeze in (0, 1):
        model = small(unfreeze=unfreeze).fit(frame, y)
        assert model.n_features_in_ == 2
        assert model.n_features_out_ == 2 * model.backbone_.n_features
        assert model.transform(frame).shape == (48, model.n_features_out_)
        assert model.get_feature_names_out()[-1].startswith("back_")
        assert model.score(frame, y) > 0.6


# -- going on --------------------------------------------------------------------------------
def n_steps(model):
    return int(model.net_.optimizer_.state[model.net_.module_.head.linear.weight]["step"])


def test_partial_fit(stripes):
    X, y = stripes
    model = small(unfreeze=1, lr=1e-3)
    model.partial_fit(X[:24], y[:24], classes=["across", "down", "other", "plain"])
    steps = n_steps(model)
    assert model.n_iter_ == 1
    model.partial_fit(X[24:], y[24:])
    assert model.n_iter_ == 2
    assert n_steps(model) > steps
    assert list(model.classes_) == ["across", "down", "other", "plain"]
    assert model.predict_proba(X)[:, 2].max() < 0.3
    assert [row["epoch"] for row in model.history_] == [1, 2]
    with pytest.raises(ValueError, match="holds the label 'new'"):
        model.partial_fit(X[:1], ["new"])


def test_warm_start(stripes):
    X, y = stripes
    model = small(unfreeze=0, warm_start=True, max_epochs=3).fit(X, y)
    head = state_of(model)["head.linear.weight"]
    model.set_params(unfreeze="all", max_epochs=0).fit(X, y)
    np.testing.assert_array_equal(state_of(model)["head.linear.weight"], head)
    model.set_params(max_epochs=1).fit(X, y)
    assert model.net_.module_.n_frozen == 0
    with pytest.raises(ValueError, match="warm_start"):
        model.fit(X, np.char.upper(y))
    with pytest.raises(ValueError, match="Set warm_start=False"):
        model.set_params(backbone="builtin").fit(X, y)


def test_a_head_alone_goes_on_from_trained_stages(stripes, monkeypatch):
    X, y = stripes
    fast, slow = (small(unfreeze=1, lr=0.05, warm_start=True).fit(X, y) for _ in range(2))
    before = state_of(fast)
    fast.set_params(unfreeze=0, lr=1e-3).fit(X, y)
    monkeypatch.setattr(training_rows, "MAX_MEMORY_BYTES", 0)  # stages run in each epoch
    monkeypatch.setattr(training_rows, "MAX_DISK_BYTES", 0)
    slow.set_params(unfreeze=0, lr=1e-3, memory=False).fit(X, y)
    assert_same_model(fast, slow, rtol=1e-4, atol=1e-6)
    for name, value in state_of(fast).items():
        assert np.array_equal(value, before[name]) == (not name.startswith("head.")), name


@pytest.mark.parametrize("again", ["fit", "partial_fit"])
def test_what_may_change_when_training_goes_on(stripes, again):
    X, y = stripes
    model = small(head=(4,), batch_norm="fixed", unfreeze="all", warm_start=True)
    getattr(model, again)(X, y)
    before = state_of(model)
    model.set_params(dropout=0.5, batch_norm="moving", lr=0.1, layer_decay=0.5, batch_size=7)
    getattr(model, again)(X, y)
    net = model.net_
    drops = [part.p for part in net.module_.head.modules() if isinstance(part, torch.nn.Dropout)]
    assert drops == [0.5, 0.5]
    after = state_of(model)
    assert all(
        not np.array_equal(after[name], before[name]) for name in after if "running_mean" in name
    )
    assert {group["base_lr"] for group in net.optimizer_.param_groups} >= {0.1, 0.05}
    assert len(net.history[-1, "batches"]) == -(-len(X) // 7)
    assert_same_model(model, pickle.loads(pickle.dumps(model)), rtol=0, atol=0)


@pytest.mark.parametrize("again", ["fit", "partial_fit"])
def test_what_is_computed_anew_may_change_when_training_goes_on(stripes, again):
    X, y = stripes
    model = small(unfreeze=0, pooling="max", warm_start=True)
    for augment in (None, "light", None):  # embeddings, pictures, what stages give
        before = model._tuned.head.linear.weight.clone() if augment else None
        getattr(model.set_params(augment=augment), again)(X, y)
        assert before is None or not torch.equal(before, model._tuned.head.linear.weight)
    assert model.score(X, y) > 0.6


def test_partial_fit_on_another_device(stripes):
    X, y = stripes
    model = small(unfreeze=1).partial_fit(X, y)
    model.net_.device = "cuda"  # as if it had been there
    first = model.net_
    model.partial_fit(X, y)
    assert model.net_ is not first
    assert model.n_iter_ == 2


def test_partial_fit_with_another_optimizer_or_callback(stripes):
    X, y = stripes
    model = small(unfreeze=1, optimizer=Optimizer("sgd")).partial_fit(X, y)
    first = model.net_
    with config_context(print_changed_only=False):
        model.partial_fit(X, y)
    model.set_params(optimizer="sgd").partial_fit(X, y)
    assert model.net_ is first
    model.set_params(optimizer=Optimizer("sgd", momentum=0.5)).partial_fit(X, y)
    assert {group["momentum"] for group in model.net_.optimizer_.param_groups} == {0.5}
    seen = []

    class Watch(Callback):
        def on_epoch_end(self, net, **kwargs):
            seen.append(len(net.history))

    model.set_params(callbacks=[Watch()]).partial_fit(X, y)
    model.partial_fit(X, y)
    assert len(seen) == 2
    assert model.n_iter_ == 6
    again = pickle.loads(pickle.dumps(model.set_params(callbacks=None)))
    first = again.net_
    again.partial_fit(X, y)
    assert again.net_ is first


def test_partial_fit_freezes_stages_again(stripes):
    X, y = stripes
    model = small(unfreeze=1, augment="light", lr=0.01).partial_fit(X, y)
    before = state_of(model)
    model.set_params(unfreeze=0).partial_fit(X, y)
    assert model.net_.module_.n_unfrozen == 0
    for name, value in state_of(model).items():
        assert np.array_equal(value, before[name]) == (not name.startswith("head.")), name
    model.set_params(unfreeze="all").partial_fit(X, y)
    assert model.net_.module_.n_frozen == 0


def test_no_validation_row_can_be_read(stripes):
    X, y = stripes
    model = small(on_error="skip")
    with (
        pytest.warns(UserWarning, match="2 of 2 rows are left out of validation"),
        pytest.raises(ValueError, match="none of its 2 can be read"),
    ):
        model.fit(X, y, X_val=[b"no", b"picture"], y_val=y[:2])


@pytest.mark.parametrize("cls", [FineTuningClassifier, FineTuningRegressor])
def test_a_fit_that_fails_takes_nothing_away(stripes, cls):
    X, y = stripes
    numbers = X.mean(axis=(1, 2, 3))
    target = y if cls is FineTuningClassifier else numbers
    model = small(cls, unfreeze=1).fit(X, target)
    before, seen = model.predict(X[:5]), dict(vars(model))
    other = np.arange(4) % 2 if cls is FineTuningClassifier else np.eye(4)
    with pytest.raises(ValueError, match="could not be read"):
        model.fit([*X[:3], b"no picture"], other)
    with pytest.raises(ValueError, match="training loss became"):
        model.set_params(lr=1e30, optimizer="sgd").fit(X[:4], other)
    assert vars(model).keys() == seen.keys()
    np.testing.assert_array_equal(model.predict(X[:5]), before)


@pytest.mark.parametrize("method", ["fit", "partial_fit"])
def test_a_training_that_fails_leaves_the_last_model(stripes, method):
    X, y = stripes
    model = small(warm_start=True).partial_fit(X, y)
    before, proba = state_of(model), model.predict_proba(X)
    model.set_params(lr=1e30, optimizer="sgd", batch_size=8)
    with pytest.raises(ValueError, match="training loss became"):
        getattr(model, method)(X, y)
    np.testing.assert_array_equal(model.predict_proba(X), proba)
    np.testing.assert_equal(state_of(model), before)
    model.set_params(lr=1e-3, batch_size=32).partial_fit(X, y)
    assert np.isfinite(model.predict_proba(X)).all()


def test_classes_stay_those_of_the_first_call(stripes):
    X, y = stripes
    model = small().partial_fit(X, y, classes=["across", "down", "plain"])
    model.partial_fit(X, y, classes=["plain", "down", "across"])
    with pytest.raises(ValueError, match="not the same as in the first call to partial_fit"):
        model.partial_fit(X, y, classes=["across", "down"])


def test_a_head_that_is_built_otherwise_cannot_go_on(stripes):
    X, y = stripes
    model = small(unfreeze=0, warm_start=True, max_epochs=1).fit(X, y)
    before = state_of(model)
    for head in [(4,), torch.nn.Linear(model.n_features_out_, 3)]:
        with pytest.raises(ValueError, match=r"trained head is LinearHead[\s\S]*as it was"):
            model.set_params(head=head).fit(X, y)
    np.testing.assert_array_equal(
        state_of(model)["head.linear.weight"], before["head.linear.weight"]
    )
    module = torch.nn.Sequential(torch.nn.Dropout(0.1), torch.nn.Linear(model.n_features_out_, 3))
    model.set_params(head=module, warm_start=False).fit(X, y)
    model.set_params(head=copy.deepcopy(module), warm_start=True).fit(X, y)
    module[0].p = 0.2
    with pytest.raises(ValueError, match="trained head is Sequential"):
        model.set_params(head=module).fit(X, y)


# -- bad images ------------------------------------------------------------------------------
@pytest.mark.parametrize("unfreeze", [0, 1])
@pytest.mark.parametrize("head_init", ["linear_probe", "random"])
def test_bad_images(stripes, picture_files, tmp_path, unfreeze, head_init):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    X = [*picture_files[:6], str(tmp_path / "missing.png"), str(tmp_path / "broken.png")]
    y = ["a", "b"] * 4
    model = small(unfreeze=unfreeze, head_init=head_init)
    with pytest.raises(ValueError, match=r"2 of 8 rows[\s\S]*row 6[\s\S]*missing.png[\s\S]*skip"):
        model.fit(X, y)
    with pytest.warns(UserWarning, match=r"2 of 8 rows are left out of training") as told:
        model.set_params(on_error="skip").fit(X, y)
    assert [bad.row for bad in model.bad_images_] == [6, 7]
    assert told[0].filename == __file__
    with pytest.warns(UserWarning, match=r"left out of prediction") as told:
        proba = model.predict_proba(X)
    assert told[0].filename == __file__
    np.testing.assert_allclose(proba[6:], 0.5, atol=1e-3)
    assert_same_model(
        model, small(unfreeze=unfreeze, head_init=head_init).fit(X[:6], y[:6]), rtol=0
    )


@pytest.mark.parametrize(
    ("parameters", "n_bytes"), [({"unfreeze": 1}, None), ({"augment": "light"}, None),
                                ({"unfreeze": "all"}, 0), ({"unfreeze": 0, "mixup": 0.5}, 0)]
)  # fmt: skip
def test_pictures_that_vanish_while_training(picture_files, monkeypatch, parameters, n_bytes):
    X, y = picture_files, ["a", "b"] * 6
    if n_bytes is not None:  # pictures are decoded in each epoch
        monkeypatch.setattr(training_rows, "MAX_MEMORY_BYTES", n_bytes)
        monkeypatch.setattr(training_rows, "MAX_DISK_BYTES", n_bytes)
    data = pathlib.Path(X[3]).read_bytes()

    def fit_probe(*arguments):
        os.remove(X[3])
        return linear_probe.fit_probe(*arguments)

    monkeypatch.setattr(_fine_tuning_base, "fit_probe", fit_probe)
    model = small(memory=False, **parameters)
    with pytest.raises(ValueError, match=r"row 3.*picture_03[\s\S]*could be read at the start"):
        model.fit(X, y)
    pathlib.Path(X[3]).write_bytes(data)
    with pytest.warns(UserWarning, match=r"1 of 12 rows are left out of the rest of training"):
        model.set_params(on_error="skip").fit(X, y)
    assert [bad.row for bad in model.bad_images_] == [3]
    assert boundary.activations.info().n_rows == 0


def test_a_vanished_picture_weighs_nothing(picture_files):
    images = as_images(picture_files)
    pixels = training_rows.Pixels(images, 1, load_backbone("builtin").preprocessing, 1, "skip")
    os.remove(picture_files[2])
    rows = training_rows.TrainingSet(pixels, np.arange(12), np.arange(12), np.full(12, 3.0))
    x, _, weight = rows.take(np.array([1, 2]))
    assert weight.tolist() == [1.0, 0.0]
    assert x[0].any()
    assert not x[1].any()
    assert [bad.row for bad in pixels.bad] == [2]


def test_pictures_are_let_go_once_frozen_stages_have_seen_them(stripes, monkeypatch):
    seen = []
    train = _training.train

    def note(tuned, train_set, *args, **kwargs):
        seen.append(sum(p._kept is not None for p in made))
        return train(tuned, train_set, *args, **kwargs)

    made = []
    create = training_rows.Pixels.__init__
    monkeypatch.setattr(
        training_rows.Pixels, "__init__", lambda self, *a: made.append(self) or create(self, *a)
    )
    monkeypatch.setattr(_training, "train", note)
    small(unfreeze=1, head_init="random").fit(*stripes)
    small(unfreeze="all", head_init="random").fit(*stripes)
    assert len(made) == 2
    assert seen == [0, 1]


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_missing_file_without_weight_is_not_there(picture_files, tmp_path, on_error):
    paths, y = [*picture_files, str(tmp_path / "none.png")], np.arange(len(picture_files) + 1) % 2
    weight = np.ones(len(y))
    weight[-1] = 0
    model = small(max_epochs=1, on_error=on_error).fit(paths, y, sample_weight=weight)
    assert model.bad_images_ == []
    assert_same_model(model, small(max_epochs=1).fit(paths[:-1], y[:-1]), rtol=0, atol=0)


class NanForEven(torch.nn.Module):
    """Divides by the spread of a picture, of which even ones have none."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 2)

    def forward(self, x):
        x = x / (x.amax((1, 2, 3), keepdim=True) - x.amin((1, 2, 3), keepdim=True))
        return self.head(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize("method", ["predict", "predict_proba", "decision_function"])
def test_a_network_that_gives_nan_is_an_error(stripes, method):
    X, y = stripes
    X, y, even = X[y != "plain"], y[y != "plain"], np.full_like(X[:3], 7)
    model = small(
        backbone=NanForEven(), preprocessing={"mean": [0] * 3, "std": [1] * 3, "size": 16}
    )
    model.fit(X, y)
    for on_error in ("raise", "skip"):
        model.set_params(on_error=on_error)
        with pytest.raises(ValueError, match=r"NaN or infinity for 3 of 8 rows, .* row 5"):
            getattr(model, method)([*X[:5], *even])
    with pytest.raises(ValueError, match=f"NaN or infinity for 2 of 34 rows.* row {len(X)}[.]"):
        clone(model).fit([*X, *even], [*y, *y[:3]])


# -- pickling --------------------------------------------------------------------------------
@pytest.mark.parametrize("unfreeze", [0, 1, "all"])
@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_predict_the_same(stripes, unfreeze, again):
    X, y = stripes
    model = small(unfreeze=unfreeze, memory=False).fit(X, y)
    copied = again(model)
    np.testing.assert_allclose(copied.predict_proba(X), model.predict_proba(X), rtol=1e-6)
    assert_same_model(model, copied, rtol=0, atol=0)
    assert copied.net_.module_.n_frozen == model.net_.module_.n_frozen
    copied.partial_fit(X, y)
    assert copied.n_iter_ == model.n_iter_ + 1


def test_pickles_hold_what_was_trained_alone(stripes):
    X, y = stripes
    head = FineTuningClassifier(unfreeze=0, max_epochs=1).fit(X, y)
    stage = FineTuningClassifier(unfreeze=1, max_epochs=1).fit(X, y)
    assert len(pickle.dumps(head)) < 4 * 1408 * 3 + 15_000
    n_trained = sum(p.numel() for p in stage.net_.module_.parameters() if p.requires_grad)
    assert len(pickle.dumps(stage)) < 4.2 * n_trained + 60_000


def test_parameters_are_never_written_to(stripes):
    model = small(head=[4], preprocessing={"size": 16, "crop": 16}, unfreeze={1: 1})
    before = {name: copy.deepcopy(value) for name, value in model.get_params().items()
              if name != "backbone"}  # fmt: skip
    model.fit(*stripes)
    after = model.get_params()
    assert all(after[name] == value for name, value in before.items())


def test_joblib(stripes, tmp_path):
    X, y = stripes
    model = small(unfreeze=1).fit(X, y)
    joblib.dump(model, tmp_path / "model.joblib")
    loaded = joblib.load(tmp_path / "model.joblib")
    np.testing.assert_allclose(loaded.predict_proba(X), model.predict_proba(X), rtol=1e-6)


def test_module_given_is_left_alone(stripes):
    X, y = stripes
    module = torchvision.models.squeezenet1_1(num_classes=4).eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    parameters = {"size": 64, "crop": 64}
    model = FineTuningClassifier(module, preprocessing=parameters, max_epochs=1, lr=0.01)
    model.fit(X[:12], y[:12])
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not module.training


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_the_cpu_and_its_pickle_opens_there(stripes):
    X, y = stripes
    on_cpu = small(unfreeze=1, device="cpu").fit(X, y)
    on_gpu = small(unfreeze=1, device="cuda").fit(X, y)
    assert_same_model(on_cpu, on_gpu, rtol=1e-2, atol=1e-3)
    moved = pickle.loads(pickle.dumps(on_gpu)).set_params(device="cpu")
    np.testing.assert_allclose(moved.predict_proba(X), on_cpu.predict_proba(X), atol=1e-2)


def test_constructing_and_cloning_load_no_torch():
    code = (
        "import sys\n"
        "from sklearn.base import clone\n"
        "from sktransfer import FineTuningClassifier, FineTuningRegressor, Optimizer\n"
        "clone(FineTuningClassifier(optimizer=Optimizer())).set_params(optimizer__name='sgd')\n"
        "repr(clone(FineTuningRegressor('resnet50')))\n"
        "print(sorted({'torch', 'torchvision', 'skorch', 'timm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
