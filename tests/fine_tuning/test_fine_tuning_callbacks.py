"""skorch's callbacks in a fine-tuning, and its net afterwards."""

import pickle
import sys
import threading

import numpy as np
import pytest
import torch
from skorch.callbacks import (
    Callback,
    Checkpoint,
    EarlyStopping,
    LRScheduler,
    TensorBoard,
    TrainEndCheckpoint,
)
from test_fine_tuning import small

pytestmark = pytest.mark.usefixtures("one_thread")


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
    own = ("board", callback) if has_name else callback
    small(callbacks=[own], unfreeze=0).fit(*stripes)
    assert "Loss/train_loss" in writer.names
    assert writer.names[-1] == "closed"


def test_callbacks_that_hold_each_other(stripes):
    class Counter(Callback):
        n = 0

        def on_epoch_end(self, net, **kwargs):
            self.n += 1

    class Watcher(Callback):
        def __init__(self, other):
            self.other, self.seen = other, []

        def on_train_end(self, net, **kwargs):
            self.seen.append(self.other.n)

    counter = Counter()
    model = small(callbacks=[counter, ("watcher", Watcher(counter))], unfreeze=0).fit(*stripes)
    assert dict(model.net_.callbacks_)["watcher"].seen == [2]
    assert counter.n == 0


def test_a_scheduler_of_skorch_and_stages_that_join_later(stripes):
    scheduler = LRScheduler(policy="StepLR", step_size=1, gamma=0.1)
    settings = {"callbacks": [scheduler], "lr_schedule": "constant", "max_epochs": 4}
    for unfreeze in ("gradual", {1: 1, 3: 2}):
        for method in ("fit", "partial_fit"):
            with pytest.raises(ValueError, match=r"knows no stage that joins in a later epoch"):
                getattr(small(unfreeze=unfreeze, **settings), method)(*stripes)
    small(unfreeze={1: "all"}, **settings).fit(*stripes)


@pytest.mark.parametrize(
    "callback", [EarlyStopping(), Checkpoint()], ids=lambda c: type(c).__name__
)
@pytest.mark.skipif(sys.version_info < (3, 11), reason="add_note is of Python 3.11")
def test_a_callback_that_watches_no_validation_part(stripes, callback, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match="valid_loss") as caught:
        small(callbacks=[callback]).fit(*stripes)
    assert "There is no validation part" in "".join(caught.value.__notes__)


@pytest.mark.parametrize("augment", [None, torch.nn.Identity()], ids=["kept", "new"])
@pytest.mark.parametrize("unfreeze", [1, "gradual", "all"])
def test_the_net_can_be_pickled(stripes, unfreeze, augment, tmp_path):
    X, y = stripes
    callbacks = [
        Checkpoint(f_pickle="epoch_{last_epoch[epoch]}.pkl", monitor=None, dirname=tmp_path),
        TrainEndCheckpoint(f_pickle="end.pkl", dirname=tmp_path),
    ]
    settings = {"preprocessing": {"size": 20, "crop": 20}, "augment": augment}
    settings |= {"early_stopping": False}
    model = small(unfreeze=unfreeze, callbacks=callbacks, **settings)
    model.fit(X, y, X_val=X, y_val=y)
    # One of an epoch in the middle takes pictures, too, and has none with it.
    file = (tmp_path / "epoch_1.pkl").read_bytes()
    pixels = torch.from_numpy(X).permute(0, 3, 1, 2)[:, None]
    score = (model.classes_[pickle.loads(file).predict(pixels)] == y).mean()
    assert score == model.history_[1]["valid_score"]
    assert len(file) < 60_000
    pixels = torch.from_numpy(X).permute(0, 3, 1, 2)[:, None]
    for net in (
        pickle.loads(pickle.dumps(model.net_)),
        pickle.loads((tmp_path / "train_end_end.pkl").read_bytes()),
    ):
        np.testing.assert_allclose(net.predict_proba(pixels), model.predict_proba(X), atol=1e-5)


@pytest.mark.parametrize("unfreeze", [1, "gradual", "all"])
def test_the_net_takes_pictures_itself(stripes, unfreeze):
    X, y = stripes
    model = small(preprocessing={"size": 20, "crop": 20}, unfreeze=unfreeze).fit(X, y)
    pixels = torch.from_numpy(X).permute(0, 3, 1, 2)[:, None]
    np.testing.assert_allclose(model.net_.predict_proba(pixels), model.predict_proba(X), atol=1e-5)


class Refuse(Callback):
    """Fails in the epoch `net.history` says."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_epoch_end(self, net, **kwargs):
        if len(net.history) == self.epoch:
            raise RuntimeError("refused")


@pytest.mark.parametrize("unfreeze", [0, 1, {1: 0, 4: 1, 5: "all"}], ids=str)
@pytest.mark.parametrize("fault", ["label", "loss", "callback"])
def test_a_partial_fit_that_fails_takes_nothing_from_the_optimizer(stripes, unfreeze, fault):
    X, y = stripes

    def run(fails):
        model = small(unfreeze=unfreeze, lr=1e-2, batch_size=16, callbacks=[Refuse(99)])
        for _ in range(3):
            model.partial_fit(X, y)
        net = model.net_
        if fails and fault == "label":
            with pytest.raises(ValueError, match="nope"):
                model.partial_fit(X[:2], ["nope", "down"])
        elif fails and fault == "loss":
            with pytest.raises(ValueError, match="training loss became"):
                model.set_params(lr=1e30, gradient_clip=1e9, dropout=0.9, batch_size=5).partial_fit(
                    X, y
                )
            assert net.batch_size == 16
            assert {p.p for p in net.module_.modules() if isinstance(p, torch.nn.Dropout)} == {0.0}
            model.set_params(lr=1e-2, gradient_clip=None, dropout=0.0, batch_size=16)
        elif fails:
            own = next(c for _, c in net.callbacks_ if isinstance(c, Refuse))
            own.epoch = 4
            with pytest.raises(RuntimeError, match="refused"):
                model.partial_fit(X, y)
            own.epoch = 99
        assert model.net_ is net
        assert len(net.history) == 3
        for _ in range(2):
            model.partial_fit(X, y)
        return model

    whole, mended = run(False), run(True)
    np.testing.assert_array_equal(whole.predict_proba(X), mended.predict_proba(X))
    assert [row["train_loss"] for row in whole.history_] == [
        row["train_loss"] for row in mended.history_
    ]
