"""A batch for which memory does not suffice runs in parts, or the error says what to change."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from skorch.callbacks import Callback
from small_models import assert_same_model, small
from torch import nn

MESSAGES = {
    "CPU": "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried",
    "Windows": "DefaultCPUAllocator: not enough memory: you tried to allocate 38535168 bytes.",
    "oneDNN": "could not create a primitive",
    "cuDNN": "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuBLAS": "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA": "CUDA error: out of memory",
    "MPS": "MPS backend out of memory (MPS allocated: 17.5 GB, other allocations: 1.2 GB)",
    "XPU": "Native API failed. Native API returns: UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY",
}
EXHAUSTED = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
HALVED = "Out of memory in training with 24 images: the network runs 12 of them at once"
SETTINGS = {"lr": 0.01, "max_epochs": 1, "memory": False}


class Bounded(torch.autograd.Function):
    """The identity, for which memory may not suffice."""

    @staticmethod
    def forward(ctx, x, error, is_backward):
        ctx.error = error
        if error and not is_backward:
            raise error
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.error:
            raise ctx.error
        return grad, None, None


class Keep(Callback):
    pickles = []  # noqa: RUF012

    def on_batch_end(self, net, **kwargs):
        self.pickles.append(pickle.dumps(net))


@pytest.fixture
def bound():
    """Bound how many images the first layer, or another kind of layer, can take."""
    handles = []

    def set_bound(most, error=EXHAUSTED, *, is_backward=False, layer=nn.Conv2d, is_training=True):
        def check(module, inputs):
            is_first = getattr(module, "in_channels", 3) == 3
            if not isinstance(module, layer) or not is_first:
                return None
            if torch.is_grad_enabled() != is_training:
                return None
            x = inputs[0].requires_grad_() if is_backward else inputs[0]
            return (Bounded.apply(x, error if len(x) > most else None, is_backward),)

        handles.append(nn.modules.module.register_module_forward_pre_hook(check))

    yield set_bound
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("text", MESSAGES.values(), ids=MESSAGES)
def test_every_name_of_it_halves_the_batch(stripes, bound, text):
    expected = small(**SETTINGS).fit(*stripes)
    bound(13, RuntimeError(text))
    with pytest.warns(UserWarning, match=HALVED):
        model = small(**SETTINGS).fit(*stripes)
    assert_same_model(expected, model, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Out of memory in training")
@pytest.mark.parametrize(
    "settings",
    [{}, {"unfreeze": 1, "augment": "light"}, {"precision": "bfloat16"}, {"early_stopping": True}],
    ids=str,
)
def test_gradients_are_those_of_the_whole_batch(stripes, bound, settings):
    settings = {**SETTINGS, "max_epochs": 2, **settings}
    expected = small(**settings).fit(*stripes)
    bound(3, is_backward=True)
    model = small(**settings).fit(*stripes)
    tolerance = 0.02 if "precision" in settings else 1e-4
    assert_same_model(expected, model, rtol=tolerance, atol=tolerance / 10)


def test_prediction_halves_the_batch(stripes, bound):
    X, _ = stripes
    model = small(memory=False, precision="float32").fit(*stripes)
    expected = model.predict_proba(X)
    bound(5, RuntimeError(MESSAGES["oneDNN"]), is_training=False)
    with pytest.warns(UserWarning, match="Out of memory with"):
        np.testing.assert_allclose(model.predict_proba(X), expected, rtol=1e-4)


def test_a_net_that_is_pickled_in_training_works(stripes, bound):
    Keep.pickles.clear()
    bound(12)
    with pytest.warns(UserWarning, match=HALVED):
        model = small(**SETTINGS, callbacks=[Keep()]).fit(*stripes)
    x = torch.zeros(4, 1, 3, 16, 16, dtype=torch.uint8)
    assert pickle.loads(Keep.pickles[0]).predict_proba(x).shape == (4, 3)
    assert "train_step_single" not in model.net_.get_params()


@pytest.mark.parametrize(
    ("settings", "layer"),
    [
        ({}, nn.Conv2d),
        ({"unfreeze": 0, "memory": None}, nn.Linear),
        ({"backbone": "builtin", "weights": None}, nn.Conv2d),
    ],
    ids=["one image", "the head", "moving batch norms"],
)
@pytest.mark.filterwarnings("ignore:Out of memory in training")
def test_where_parts_do_not_help_the_error_says_what_to_change(stripes, bound, settings, layer):
    bound(0, layer=layer)
    message = r"not suffice for training \(CUDA out of .*\(it is 32\), smaller images"
    # torch 2.6 keeps the hooks of a checkpoint that failed, which a thread has of its own.
    with ThreadPoolExecutor(1) as pool, pytest.raises(MemoryError, match=message):
        pool.submit(small(**SETTINGS | settings).fit, *stripes).result()


def test_other_errors_are_not_taken_for_it(stripes, bound):
    bound(8, RuntimeError("could not create a primitive descriptor iterator"))
    with pytest.raises(RuntimeError, match=r"^could not create a primitive descriptor iterator$"):
        small(**SETTINGS).fit(*stripes)
