"""partial_fit of what was loaded trains the same model as without the file."""

import functools

import numpy as np
import pytest
import torch
from tiny_networks import tiny_network

from sktransfer import FineTuningClassifier, load, save

SETTINGS = {
    "adamw": {"unfreeze": "all"},
    "the head": {"unfreeze": 0, "head": (4,)},
    "sgd": {"unfreeze": 1, "optimizer": "sgd"},
    "named": {"unfreeze": 1, "optimizer": functools.partial(torch.optim.NAdam, eps=1e-7)},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_file_continues_alike(stripes, one_thread, settings, tmp_path):
    X, y = stripes
    parameters = {"preprocessing": {"size": 16, "crop": 16}, "random_state": 0, "lr": 0.01}
    one = FineTuningClassifier(tiny_network, **parameters, **settings)
    for start in (one.set_params(max_epochs=1).fit, one.partial_fit):
        start(X, y)
        save(one, tmp_path / "model")
        other = load(tmp_path / "model", backbone=tiny_network)
        for _ in range(2):
            one.partial_fit(X, y)
            save(other.partial_fit(X, y), tmp_path / "model")
            other = load(tmp_path / "model", backbone=tiny_network)
        np.testing.assert_array_equal(one.predict_proba(X), other.predict_proba(X))
        assert one.net_.history[:, "train_loss"] == other.net_.history[:, "train_loss"]


def test_only_partial_fit_adds_to_a_file(stripes, tmp_path):
    X, y = stripes
    model = FineTuningClassifier(unfreeze=1, max_epochs=1).fit(X, y)
    sizes = []
    for change in (lambda: None, lambda: model.partial_fit(X, y), lambda: model.fit(X, y)):
        change()
        save(model, tmp_path / "model")
        sizes.append((tmp_path / "model").stat().st_size)
    assert sizes[1] > 2 * sizes[0] > 1.9 * sizes[2]


def test_loading_within_other_settings_of_torch(stripes, one_thread, tmp_path):
    X, y = stripes
    model = FineTuningClassifier(tiny_network, unfreeze=1, max_epochs=1).fit(X, y)
    save(model, tmp_path / "model")
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            loaded = load(tmp_path / "model", backbone=tiny_network)
    finally:
        torch.set_default_dtype(torch.float32)
    np.testing.assert_array_equal(loaded.predict_proba(X), model.predict_proba(X))
    loaded.partial_fit(X, y)
