"""What frozen stages make of pictures: computed once, shared by fits, bounded."""

import os

import numpy as np
import pytest
from sklearn.model_selection import GridSearchCV
from test_fine_tuning import assert_same_model, small

from sktransfer import embedding_store
from sktransfer.fine_tuning import _base as _fine_tuning_base
from sktransfer.fine_tuning import _boundary as boundary
from sktransfer.fine_tuning._module import TunedModule
from sktransfer.store._store import MemoryStore

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def passes(monkeypatch):
    """How many pictures went through frozen stages, call by call."""
    seen = []
    run_frozen = TunedModule.run_frozen
    monkeypatch.setattr(
        TunedModule, "run_frozen",
        lambda self, x, stop: seen.append(len(x)) or run_frozen(self, x, stop),
    )  # fmt: skip
    return seen


@pytest.mark.parametrize("memory", [None, False])
def test_frozen_part_runs_once(stripes, passes, memory):
    X, y = stripes
    small(unfreeze=1, max_epochs=4, memory=memory).fit(X, y)
    assert sum(passes) == len(X)


def test_fits_of_a_search_share_it(stripes, passes, decoded):
    X, y = stripes
    grid = {"lr": [1e-3, 1e-2], "layer_decay": [0.5, 1.0], "unfreeze": [1]}
    search = GridSearchCV(small(max_epochs=1), grid, cv=3, error_score="raise").fit(X, y)
    assert len(search.cv_results_["params"]) == 4
    assert sum(passes) == len(X)
    # Once for the frozen embeddings, once for those of the corners, once for the boundary, and in
    # each of 12 fits the third that it is scored on, through a network of its own.
    assert len(decoded) == len(X) * (1 + 1 + 1 + 4)
    alone = small(max_epochs=1, memory=False, **search.best_params_).fit(X, y)
    assert_same_model(search.best_estimator_, alone, rtol=1e-5, atol=1e-6)


def test_other_stages_weights_and_sizes_are_others(stripes, passes):
    X, y = stripes
    network = {"backbone": "builtin", "max_epochs": 1}
    small(**network, unfreeze=1).fit(X, y)
    small(**network, unfreeze=2).fit(X, y)
    small(**network, unfreeze=1, preprocessing={"size": 32, "crop": 32}).fit(X, y)
    small(**network, unfreeze=1, weights=None, batch_norm="fixed").fit(X, y)
    small(**network, unfreeze=1, precision="bfloat16").fit(X, y)
    assert sum(passes) == 5 * len(X)
    small(**network, unfreeze=1).fit(X, y)
    assert sum(passes) == 5 * len(X)


def test_trained_stages_that_are_frozen_again_are_not_shared(stripes):
    X, y = stripes

    def trained_in_two_steps(memory):
        model = small(unfreeze="all", lr=0.05, warm_start=True, memory=memory).fit(X, y)
        return model.set_params(unfreeze=1).fit(X, y)

    small(unfreeze=1).fit(X, y)  # leaves what the pre-trained stages make of them
    assert_same_model(trained_in_two_steps(None), trained_in_two_steps(False), rtol=0, atol=0)
    fresh = small(unfreeze=1).fit(X, y)
    alone = small(unfreeze=1, memory=False).fit(X, y)
    assert_same_model(fresh, alone, rtol=1e-5, atol=1e-6)


def test_bound(stripes, passes, monkeypatch):
    X, y = stripes
    small(unfreeze=1).fit(X[:24], y[:24])
    assert boundary.activations.info().n_rows == 24
    # Rows at hand are taken, but what does not fit as a whole stays with the fit.
    monkeypatch.setattr(boundary, "MAX_ACTIVATION_BYTES", 1000)
    over = small(unfreeze=1).fit(X, y)
    assert sum(passes) == len(X)
    assert boundary.activations.info().n_rows == 24
    alone = small(unfreeze=1, memory=False).fit(X, y)
    assert_same_model(over, alone, rtol=1e-5, atol=1e-6)
    # Rows that are driven out meanwhile are those of the fit still.
    monkeypatch.undo()
    monkeypatch.setattr(boundary, "activations", MemoryStore(5000))
    driven_out = small(unfreeze=1).fit(X, y)
    assert 0 < boundary.activations.info().n_rows < len(X)
    assert_same_model(driven_out, alone, rtol=1e-5, atol=1e-6)


def test_clearing_the_store_of_this_process_frees_them(stripes):
    small(unfreeze=1).fit(*stripes)
    assert boundary.activations.info().n_bytes > 0
    embedding_store().clear()
    assert boundary.activations.info().n_bytes == 0


def test_unreadable_pictures_leave_nothing(stripes, picture_files, tmp_path):
    X = [*picture_files[:6], str(tmp_path / "missing.png")]
    y = ["a", "b"] * 3 + ["a"]
    model = small(unfreeze=1, on_error="skip", head_init="random")
    for _ in range(2):
        with pytest.warns(UserWarning, match="left out of training"):
            model.fit(X, y)
        assert boundary.activations.info().n_rows == 6
    again = small(unfreeze=1, head_init="random").fit(X[:6], y[:6])
    np.testing.assert_allclose(again.predict_proba(X[:6]), model.predict_proba(X[:6]), rtol=1e-5)


def test_a_picture_that_vanishes_meanwhile_is_an_error(picture_files, monkeypatch):
    fit_probe = _fine_tuning_base.fit_probe

    def lose_one(*arguments):
        os.remove(picture_files[3])
        return fit_probe(*arguments)

    monkeypatch.setattr(_fine_tuning_base, "fit_probe", lose_one)
    with pytest.raises(ValueError, match=r"row 3.*picture_03[\s\S]*could be read at the start"):
        small(unfreeze=1).fit(picture_files, ["a", "b"] * 6)
    assert boundary.activations.info().n_rows == 0
