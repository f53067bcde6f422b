"""torch's settings of the caller change no model, and are the caller's again afterwards."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from small_models import assert_same_model, quick, small

from sktransfer import PretrainedFeatureExtractor, load_backbone


@contextlib.contextmanager
def using(set_it, value, before):
    set_it(value)
    try:
        yield
    finally:
        set_it(before)


def dtype(value):
    return lambda: using(torch.set_default_dtype, value, torch.float32)


def device(value):
    return lambda: using(torch.set_default_device, value, None)


AMBIENT = {
    "float64": dtype(torch.float64),
    "bfloat16": dtype(torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "gradients off": lambda: using(torch.set_grad_enabled, False, True),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "on meta": device("meta"),
    "on the CPU": device("cpu"),
    "within meta": lambda: torch.device("meta"),
    "deterministic": lambda: using(torch.use_deterministic_algorithms, True, False),
}


def settings():
    """Those of torch that a call could leave behind."""
    return (
        torch.get_default_dtype(),
        torch.empty(0).device,
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.are_deterministic_algorithms_enabled(),
    )


def work(X, y, parameters):
    """Fit, predict, transform and continue."""
    model = small(lr=0.01, memory=False, **parameters).fit(X, y)
    results = [model.predict_proba(X), model.transform(X)]
    model.partial_fit(X, y)
    results += [model.predict_proba(X)]
    extractor = PretrainedFeatureExtractor("builtin", memory=False)
    results += [extractor.set_params(preprocessing={"size": 32, "crop": 32}).fit_transform(X[:6])]
    return model, results


TINY = {"unfreeze": 1, "head": (4,), "augment": "light"}
RANDOM = {"backbone": "builtin", "weights": None}


@pytest.mark.parametrize(
    ("ambient", "parameters"),
    [*((name, TINY) for name in AMBIENT), ("float64", RANDOM), ("within meta", RANDOM)],
    ids=lambda value: value if isinstance(value, str) else value.get("backbone", "tiny"),
)
def test_the_callers_settings_change_nothing(stripes, ambient, parameters):
    X, y = (part[:12] for part in stripes)
    one, expected = work(X, y, parameters)
    with AMBIENT[ambient]():
        before = settings()
        other, results = work(X, y, parameters)
        assert settings() == before
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, wanted)
    # What was made within serves without.
    assert_same_model(one.partial_fit(X, y), other.partial_fit(X, y), rtol=0, atol=0)


def test_a_network_that_is_first_loaded_in_inference_mode_can_be_trained(stripes):
    with torch.inference_mode():
        expected = load_backbone("builtin").network.module
    assert not any(p.is_inference() for p in expected.parameters())
    quick(backbone="builtin", unfreeze=1).fit(*stripes)


def test_a_call_that_fails_gives_the_settings_back(stripes):
    with AMBIENT["float64"](), pytest.raises(ValueError, match="no such network"):
        quick(backbone="no such network").fit(*stripes)
    with AMBIENT["float64"]():
        assert torch.zeros(1).dtype == torch.float64


def test_threads_share_the_default_dtype(stripes):
    X, y = stripes
    expected = small(lr=0.01).fit(X, y)
    with AMBIENT["float64"](), ThreadPoolExecutor(3) as pool:
        models = list(pool.map(lambda _: small(lr=0.01).fit(X, y), range(3)))
        assert torch.get_default_dtype() == torch.float64
    for model in models:
        assert_same_model(model, expected, rtol=0, atol=0)
