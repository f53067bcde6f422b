"""Fine-tuning on another device: no operation mixes devices, and no copy is read too early."""

import gc
import weakref

import numpy as np
import pytest
import torch
from fake_device import FakeDevice
from skorch.callbacks import EpochTimer
from small_models import small
from tiny_networks import Tiny, tiny_network
from torch.nn import functional as F


class Untraced(Tiny):
    """torch.fx cannot follow it, so hooks cut it."""

    def forward(self, x):
        return super().forward(x) if x.sum() < 1e9 else x


def mirrored(image):
    """A function of NumPy's: it gets a uint8 tensor of the host, whatever the device."""
    assert image.dtype == torch.uint8
    return torch.from_numpy(np.flip(image.numpy(), 2).copy())


@pytest.mark.parametrize("is_streaming", [True, False])
@pytest.mark.parametrize(
    "options",
    [{"unfreeze": 1}, {"unfreeze": 0}, {"augment": ["light", mirrored]}, {"augment": mirrored}],
    ids=["stage", "head", "views", "function"],
)
def test_fits_are_those_of_the_cpu(stripes, options, is_streaming, monkeypatch):
    X, y = stripes[0][:24], stripes[1][:24]

    def fitted(device):
        model = small(device=device, early_stopping=True, lr=1e-3, memory=False, **options)
        before = model.fit(X, y).predict_proba(X)
        model.partial_fit(X, y)
        return np.concatenate([before, model.predict_proba(X)]), model.transform(X)

    expected = fitted("cpu")
    with FakeDevice(monkeypatch, is_streaming) as device:
        found = fitted("meta")
    assert device.n_uploads
    for values, reference in zip(found, expected, strict=True):
        np.testing.assert_allclose(values, reference, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("early_stopping", [False, True])
def test_an_epoch_reads_from_the_device_as_often_with_more_batches(
    stripes, early_stopping, monkeypatch
):
    """Each read waits until the device has computed all that it was given."""
    X, y = stripes[0][:24], stripes[1][:24]
    options = {"memory": False, "unfreeze": "all", "early_stopping": early_stopping, "lr": 1e-3}

    def n_reads(n_batches):
        with FakeDevice(monkeypatch) as device:
            model = small(device="meta", batch_size=24 // n_batches, **options).fit(X, y)
        losses = [batch.get("train_loss", 1.0) for batch in model.net_.history[-1]["batches"]]
        assert all(type(loss) is float for loss in losses)
        return device.n_downloads

    assert n_reads(4) == n_reads(1)


@pytest.mark.parametrize("callbacks", [None, [EpochTimer()]])
def test_a_loss_that_is_not_finite_is_named_on_a_device(stripes, callbacks, monkeypatch):
    options = {"optimizer": "sgd", "batch_size": 8, "callbacks": callbacks, "device": "meta"}
    with (
        FakeDevice(monkeypatch),
        pytest.raises(ValueError, match=r"loss became (nan|inf) in epoch 1, batch 2"),
    ):
        small(lr=1e30, early_stopping=False, **options).fit(stripes[0][:24], stripes[1][:24])


def test_training_computes_in_full_float32(stripes, monkeypatch):
    """Whatever the caller lets CUDA round to TF32."""
    matmul, seen = torch.backends.cuda.matmul, []
    is_new = hasattr(torch.backends.cudnn, "conv")  # since torch 2.9
    name, tf32 = ("fp32_precision", "tf32") if is_new else ("allow_tf32", True)

    def loss(scores, target):
        seen.append(getattr(matmul, name))
        return F.cross_entropy(scores, target, reduction="none")

    before = getattr(matmul, name)
    setattr(matmul, name, tf32)
    try:
        with FakeDevice(monkeypatch):
            small(loss=loss, device="meta").fit(stripes[0][:24], stripes[1][:24])
        assert getattr(matmul, name) == tf32
    finally:
        setattr(matmul, name, before)
    assert set(seen) == {"ieee" if is_new else False}


@pytest.mark.parametrize("backbone", [tiny_network, Untraced], ids=["graph", "hooks"])
def test_a_model_frees_its_memory_at_once(stripes, backbone):
    """No circle keeps weights in a device's memory until a garbage collection."""
    X, y = stripes[0][:24], stripes[1][:24]
    options = {"backbone": backbone, "memory": False, "lr": 1e-3}
    small(**options).fit(X, y)
    gc.collect()
    gc.disable()
    try:
        model = small(**options).fit(X, y)
        model.predict(X)
        kept = [weakref.ref(p) for p in model.net_.module_.parameters()]
        del model
        assert not [ref for ref in kept if ref() is not None]
    finally:
        gc.enable()


def test_a_fit_keeps_no_gradients(stripes):
    X, y = stripes[0][:24], stripes[1][:24]
    model = small(memory=False).fit(X, y)
    assert not [p for p in model.net_.module_.parameters() if p.grad is not None]
    assert not model.net_.optimizer_.state
    model.partial_fit(X, y)
    assert not [p for p in model.net_.module_.parameters() if p.grad is not None]
    assert model.net_.optimizer_.state


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_cuda_agrees_with_the_cpu(stripes, precision):
    X, y = stripes
    on_cpu = small(unfreeze=1, lr=1e-3, device="cpu").fit(X, y)
    on_gpu = small(unfreeze=1, lr=1e-3, device="cuda", precision=precision).fit(X, y)
    np.testing.assert_allclose(on_gpu.predict_proba(X), on_cpu.predict_proba(X), atol=0.1)
