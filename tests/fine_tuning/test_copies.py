"""Copies, pickles and threads."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from small_models import assert_same_model, small

from sktransfer import FineTuningClassifier


@pytest.mark.parametrize("unfreeze", [0, 1, "all"])
@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_predict_the_same(stripes, unfreeze, again):
    X, y = stripes
    model = small(unfreeze=unfreeze, memory=False).fit(X, y)
    copied = again(model)
    np.testing.assert_allclose(copied.predict_proba(X), model.predict_proba(X), rtol=1e-6)
    assert_same_model(model, copied, rtol=0, atol=0)
    copied.partial_fit(X, y)
    assert copied.n_iter_ == model.n_iter_ + 1
    np.testing.assert_array_equal(model.predict_proba(X), model.predict_proba(X))


def test_pickles_hold_only_what_was_trained(stripes):
    X, y = stripes
    head = FineTuningClassifier(unfreeze=0, max_epochs=1).fit(X, y)
    stage = FineTuningClassifier(unfreeze=1, max_epochs=1).fit(X, y)
    assert len(pickle.dumps(head)) < 4 * head.n_features_out_ * 3 + 15_000
    n_trained = sum(p.numel() for p in stage.net_.module_.parameters() if p.requires_grad)
    assert len(pickle.dumps(stage)) < 4.2 * n_trained + 60_000


# -- threads ---------------------------------------------------------------------------------
def test_threads_that_use_an_unpickled_model_first(stripes):
    X, y = stripes
    model = small(unfreeze="all", lr=0.1, memory=False).fit(X, y)
    expected = model.predict_proba(X)
    for _ in range(5):
        copied = pickle.loads(pickle.dumps(model))
        with ThreadPoolExecutor(4) as pool:
            for proba in pool.map(lambda _: copied.predict_proba(X), range(4)):  # noqa: B023
                np.testing.assert_allclose(proba, expected, atol=1e-6)


def test_fits_in_threads_are_those_of_one_after_another(stripes):
    X, y = stripes
    models = [
        small(unfreeze=1, random_state=seed, dropout=0.2, augment=augment)
        for seed in (0, 1) for augment in (None, "light")
    ]  # fmt: skip
    alone = [copy.deepcopy(model).fit(X, y) for model in models]
    state = torch.get_rng_state()
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda model: model.fit(X, y), models))
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(alone, together, strict=True):
        assert_same_model(one, other, rtol=1e-6)
