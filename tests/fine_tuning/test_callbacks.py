"""skorch's callbacks, its net, and how a training is ended."""

import pickle
import threading

import numpy as np
import pytest
import torch
from sklearn.base import clone
from skorch.callbacks import (
    Callback,
    Checkpoint,
    EarlyStopping,
    EpochScoring,
    LRScheduler,
    TensorBoard,
)
from small_models import quick, small, state_of

from sktransfer import FineTuningRegressor


# -- the user's callbacks --------------------------------------------------------------------
def test_callbacks_work_and_do_not_break_clone(stripes):
    X, y = stripes
    callbacks = [EpochScoring("accuracy", name="acc"), ("stop", EarlyStopping(patience=1))]
    model = small(callbacks=callbacks, max_epochs=20, early_stopping=False, lr=1e-9)
    model.fit(X, y, X_val=X, y_val=y)
    assert model.n_iter_ < 20
    assert "acc" in model.net_.history[-1]
    assert model.callbacks is callbacks
    assert callbacks[0].__dict__ == EpochScoring("accuracy", name="acc").__dict__
    clone(model).fit(X, y, X_val=X, y_val=y)


class Writer:
    """What a TensorBoard writer is for `copy`: it holds a lock."""

    def __init__(self):
        self.lock, self.names = threading.Lock(), []

    def add_scalar(self, tag, *args, **kwargs):
        self.names.append(tag)

    def close(self):
        self.names.append("closed")


@pytest.mark.parametrize("has_name", [False, True])
def test_a_callback_that_cannot_be_copied_is_shared(stripes, has_name):
    writer = Writer()
    callback = TensorBoard(writer)
    quick(callbacks=[("board", callback) if has_name else callback]).fit(*stripes)
    assert "Loss/train_loss" in writer.names
    assert writer.names[-1] == "closed"


@pytest.mark.parametrize("callbacks", [[3], [("a",)], [()]], ids=str)
def test_other_objects_are_refused(stripes, callbacks):
    with pytest.raises(TypeError, match=r"callbacks holds .*skorch's callbacks are accepted"):
        quick(callbacks=callbacks).fit(*stripes)


@pytest.mark.parametrize("callback", [EarlyStopping(), Checkpoint()], ids=["stop", "checkpoint"])
def test_a_callback_without_a_validation_part_to_watch(stripes, callback, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match="valid_loss") as caught:
        quick(callbacks=[callback]).fit(*stripes)
    notes = "".join(caught.value.__notes__)
    assert "There is no validation part" in notes
    assert "give X_val and y_val, or early_stopping=True" in notes


# -- learning rates --------------------------------------------------------------------------
class Rates(Callback):
    seen = []  # noqa: RUF012 - the training has a copy of the callback

    def on_batch_begin(self, net, training=False, **kwargs):
        if training:
            self.seen.append(net.optimizer_.param_groups[0]["lr"])


@pytest.mark.parametrize("has_name", [False, True])
def test_a_scheduler_of_skorch_switches_the_built_in_schedule_off(stripes, has_name):
    Rates.seen.clear()
    scheduler = LRScheduler(policy="StepLR", step_size=1, gamma=0.1)
    callbacks = [("rates", Rates()), ("scheduler", scheduler) if has_name else scheduler]
    settings = {"callbacks": callbacks, "max_epochs": 3, "batch_size": 64}
    model = small(**settings, lr=1e-2, layer_decay=0.5).fit(*stripes)
    np.testing.assert_allclose(Rates.seen, [1e-2, 1e-3, 1e-4])
    last = {group["lr"] for group in model.net_.optimizer_.param_groups}
    np.testing.assert_allclose(sorted(last), [2.5e-6, 5e-6, 1e-5])


def test_a_scheduler_continues_with_partial_fit(stripes):
    scheduler = LRScheduler(policy="StepLR", step_size=1, gamma=0.1)
    model = quick(callbacks=[scheduler], lr=1e-2).fit(*stripes)
    for _ in range(2):
        model.partial_fit(*stripes)
    rates = [row["lr"] for row in model.history_]
    assert rates[0] == 1e-2 > rates[1] > rates[2]


def test_the_built_in_schedule_is_in_the_history(stripes):
    Rates.seen.clear()
    model = quick(callbacks=[Rates()], max_epochs=8, batch_size=64, lr=1.0).fit(*stripes)
    assert np.argmax(Rates.seen) in (1, 2)
    assert Rates.seen[-1] < 0.05
    np.testing.assert_allclose([row["lr"] for row in model.history_], Rates.seen)


# -- Ctrl-C ----------------------------------------------------------------------------------
class Interrupt(Callback):
    """Raises what Ctrl-C raises, in the middle or at the end of an epoch."""

    def __init__(self, epoch, event):
        self.epoch, self.event = epoch, event

    def on_batch_end(self, net, training=False, **kwargs):
        if self.event == "on_batch_end" and training and len(net.history) == self.epoch:
            raise KeyboardInterrupt

    def on_epoch_end(self, net, **kwargs):
        if self.event == "on_epoch_end" and len(net.history) == self.epoch:
            raise KeyboardInterrupt


def test_an_interrupt_keeps_what_was_trained(stripes):
    model = small(callbacks=[Interrupt(3, "on_batch_end")], max_epochs=50)
    with pytest.warns(UserWarning, match="was interrupted in epoch 3; the weights of epoch 2"):
        model.fit(*stripes)
    assert model.n_iter_ == len(model.history_) == 2
    assert model.score(*stripes) > 0.6


def test_a_callback_may_end_the_training_after_an_epoch(stripes):
    """As skorch's EarlyStopping does; there is nothing to warn of."""
    model = small(callbacks=[Interrupt(3, "on_epoch_end")], max_epochs=50).fit(*stripes)
    assert model.n_iter_ == len(model.history_) == 3


@pytest.mark.filterwarnings("ignore:.*was interrupted")
def test_an_interrupt_keeps_the_best_epoch(stripes):
    X, y = stripes
    model = small(callbacks=[Interrupt(4, "on_batch_end")], lr=0.05, max_epochs=50)
    model.fit(X, y, X_val=X, y_val=y)
    best = max(row["valid_score"] for row in model.history_)
    assert model.n_iter_ == 3
    assert model.history_[model.best_epoch_]["valid_score"] == best
    assert model.score(X, y) == pytest.approx(best)


# -- the net ---------------------------------------------------------------------------------
def test_net_is_skorchs(stripes, capsys):
    X, y = stripes
    model = quick(verbose=1).fit(X, y)
    assert "train_loss" in capsys.readouterr().out
    assert type(model.net_).__name__ == "NeuralNetClassifier"
    regressor = quick(FineTuningRegressor).fit(X, np.arange(48.0))
    assert type(regressor.net_).__name__ == "NeuralNetRegressor"
    with pytest.raises(AttributeError, match="not fitted yet, so it has no net_"):
        clone(model).net_  # noqa: B018


def pixels_of(X):
    return torch.from_numpy(X).permute(0, 3, 1, 2)[:, None]


@pytest.mark.parametrize("unfreeze", [0, 1, "gradual", "all"])
def test_the_net_takes_images_and_can_be_pickled(stripes, unfreeze):
    X, y = stripes
    model = small(preprocessing={"size": 20, "crop": 20}, unfreeze=unfreeze).fit(X, y)
    # Where nothing else is trained it is the head alone.
    rows = torch.from_numpy(model.transform(X))[:, None] if unfreeze == 0 else pixels_of(X)
    loaded = pickle.loads(pickle.dumps(model)).net_
    for net in (model.net_, pickle.loads(pickle.dumps(model.net_)), loaded):
        np.testing.assert_allclose(net.predict_proba(rows), model.predict_proba(X), atol=1e-5)
    np.testing.assert_equal(state_of(loaded), state_of(model))


@pytest.mark.parametrize("augment", [None, torch.nn.Identity()], ids=["kept", "new"])
@pytest.mark.parametrize("unfreeze", [1, "gradual"])
def test_checkpoints_hold_no_rows(stripes, unfreeze, augment, tmp_path):
    X, y = stripes
    name = "epoch_{last_epoch[epoch]}.pkl"
    checkpoint = Checkpoint(f_pickle=name, monitor=None, dirname=tmp_path)
    settings = {"preprocessing": {"size": 20, "crop": 20}, "augment": augment}
    model = small(unfreeze=unfreeze, callbacks=[checkpoint], early_stopping=False, **settings)
    model.fit(X, y, X_val=X, y_val=y)
    file = (tmp_path / "epoch_1.pkl").read_bytes()
    score = (model.classes_[pickle.loads(file).predict(pixels_of(X))] == y).mean()
    assert score == model.history_[1]["valid_score"]
    assert len(file) < 60_000


@pytest.mark.parametrize("unfreeze", [0, 1, "all"])
def test_the_net_of_a_pickle_trains_the_same_weights(stripes, unfreeze):
    model = small(unfreeze=unfreeze).fit(*stripes)
    nets = model.net_, pickle.loads(pickle.dumps(model)).net_
    trained, again = (
        {n for n, p in net.module_.named_parameters() if p.requires_grad} for net in nets
    )
    assert trained == again
    assert any(name.startswith("stages.") for name in again) == (unfreeze != 0)
