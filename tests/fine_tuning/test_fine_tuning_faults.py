"""Fine-tuning where the machine fails it: threads, full disks, files that vanish, Ctrl-C."""

import os
import pickle
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from skorch.callbacks import Callback
from test_fine_tuning import small

from sktransfer.fine_tuning import _callbacks as _training_callbacks
from sktransfer.fine_tuning import _rows as training_rows
from sktransfer.fine_tuning import _train as _training
from sktransfer.fine_tuning._tuned_network import TunedNetwork

pytestmark = pytest.mark.usefixtures("one_thread")


# -- threads ---------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:.*left out of prediction")
def test_threads_predict_with_one_estimator(stripes):
    X, y = stripes
    model = small(unfreeze=1, max_epochs=1, on_error="skip", memory=False).fit(X, y)
    broken, whole = list(X), list(X[:3])
    broken[::5] = [None] * len(broken[::5])
    expected = [model.predict_proba(rows) for rows in (broken, whole)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(lambda k: model.predict_proba((broken, whole)[k % 2]), range(60)))
    finally:
        sys.setswitchinterval(before)
    for k, proba in enumerate(got):
        np.testing.assert_array_equal(proba, expected[k % 2])


def test_threads_that_are_first_to_predict(stripes, monkeypatch):
    X, y = stripes
    model = small(unfreeze="all", lr=0.1, max_epochs=3, memory=False).fit(X, y)
    expected = model.predict_proba(X)
    copied = pickle.loads(pickle.dumps(model))
    load, second = TunedNetwork.put_into, threading.Event()

    def slowly(*args):
        second.wait(1)  # until the other thread is there, too
        load(*args)

    monkeypatch.setattr(TunedNetwork, "put_into", slowly)

    def predict(k):
        if k:
            second.set()
        return copied.predict_proba(X)

    with ThreadPoolExecutor(2) as pool:
        for proba in pool.map(predict, range(2)):
            np.testing.assert_allclose(proba, expected, atol=1e-6)


# -- disks -----------------------------------------------------------------------------------
@pytest.mark.parametrize("fault", ["no folder", "no place"])
def test_without_a_temporary_file_it_is_computed_again(stripes, monkeypatch, fault):
    X, y = stripes
    settings = {"unfreeze": 1, "memory": False, "max_epochs": 2}
    expected = small(**settings).fit(X, y).predict_proba(X)
    monkeypatch.setattr(training_rows, "MAX_MEMORY_BYTES", 0)
    if fault == "no folder":
        monkeypatch.setattr(tempfile, "tempdir", "/nonexistent/folder")
    else:

        def full(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    assert training_rows.allocate((4, 5), np.float32) is None
    model = small(**settings).fit(X, y)
    np.testing.assert_allclose(model.predict_proba(X), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system has no fallocate")
def test_a_temporary_file_has_its_place(monkeypatch):
    monkeypatch.setattr(training_rows, "MAX_MEMORY_BYTES", 0)
    taken = []
    fallocate = os.posix_fallocate
    monkeypatch.setattr(
        os, "posix_fallocate", lambda *args: taken.append(args[1:]) or fallocate(*args)
    )
    array = training_rows.allocate((100, 7), np.float32)
    assert taken == [(0, 2800)]
    array[:] = 3
    assert float(array.sum()) == 2100


# -- files that vanish -----------------------------------------------------------------------
class Remove(Callback):
    """Removes files after an epoch."""

    def __init__(self, paths, epoch):
        self.paths, self.epoch = paths, epoch

    def on_epoch_end(self, net, **kwargs):
        if len(net.history) == self.epoch:
            for path in self.paths:
                os.remove(path)


@pytest.fixture
def keeps_nothing(monkeypatch):
    monkeypatch.setattr(training_rows, "MAX_MEMORY_BYTES", 0)
    monkeypatch.setattr(training_rows, "MAX_DISK_BYTES", 0)


@pytest.mark.usefixtures("keeps_nothing")
@pytest.mark.filterwarnings("ignore:Fine-tuning did not improve")
def test_all_validation_pictures_vanish(picture_files):
    paths, y = picture_files[:12], ["a", "b", "c"] * 4
    model = small(unfreeze="all", on_error="skip", max_epochs=4, callbacks=[Remove(paths[9:], 2)])
    with pytest.warns(UserWarning, match="left out of the rest of validation"):
        model.fit(paths[:9], y[:9], X_val=paths[9:], y_val=y[9:])
    scores = [row["valid_score"] for row in model.history_]
    assert np.isfinite(scores).tolist() == [True, True, True, False, False]
    assert model.best_epoch_ <= 2
    assert np.isfinite(model.predict_proba(paths[:9])).all()


@pytest.mark.usefixtures("keeps_nothing")
def test_the_first_pictures_asked_for_have_vanished(picture_files, monkeypatch):
    paths, y = picture_files[:12], ["a", "b", "c"] * 4
    train = _training.train

    def after_all_is_gone(*args, **kwargs):
        for path in paths:
            os.remove(path)
        return train(*args, **kwargs)

    monkeypatch.setattr("sktransfer.fine_tuning._train.train", after_all_is_gone)
    with pytest.raises(
        ValueError, match=r"None of the 12 rows' pictures[\s\S]*can be read any more"
    ):
        small(unfreeze="all", on_error="skip", probe_views=1).fit(paths, y)


# -- Ctrl-C ----------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:.*was interrupted")
def test_ctrl_c_while_the_best_epoch_is_copied(stripes, monkeypatch):
    X, y = stripes
    snapshot, n_taken = _training_callbacks.snapshot, []

    def interrupted(*args):
        n_taken.append(1)
        if len(n_taken) == 3:
            raise KeyboardInterrupt
        return snapshot(*args)

    monkeypatch.setattr(_training_callbacks, "snapshot", interrupted)
    model = small(head_init="random", lr=0.05, max_epochs=20, early_stopping=True)
    model.fit(X, y, X_val=X, y_val=y)
    assert len(n_taken) == 3
    assert model.history_[model.best_epoch_]["valid_score"] == model.score(X, y)
    assert model.n_iter_ == model.history_[-1]["epoch"]


@pytest.mark.parametrize("callbacks", [[3], [("a",)], [()]], ids=str)
def test_what_is_no_callback_is_told(stripes, callbacks):
    with pytest.raises(TypeError, match=r"callbacks holds .*skorch's callbacks are accepted"):
        small(callbacks=callbacks, max_epochs=1).fit(*stripes)
