"""Devices: their names, how workers share them, and how their batches are made."""

import itertools
import multiprocessing
import tempfile
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_device import FakeDevice
from tiny_networks import tiny_network

from sktransfer import PretrainedFeatureExtractor, embedding_store, load_backbone
from sktransfer.embedding import _batches
from sktransfer.networks._inference import tensor_float_32

SMALL = {"size": 16, "crop": 16}


@pytest.fixture
def many_images():
    return np.random.default_rng(0).integers(0, 256, (300, 20, 24, 3), dtype=np.uint8)


# -- names --------------------------------------------------------------------------------------
def test_a_device_has_one_network_whatever_its_name(monkeypatch):
    backbone = load_backbone(tiny_network, preprocessing=SMALL)
    assert backbone.inference_module("cpu:0") is backbone.inference_module()
    with FakeDevice(monkeypatch):
        here = backbone.inference_module("meta:0")
        assert backbone.inference_module("meta") is here
        assert backbone.inference_module(torch.device("meta")) is here
        assert backbone.inference_module("meta", "bfloat16") is not here


def test_workers_share_out_the_devices(monkeypatch, tmp_path):
    """Each call stands for a worker process."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: "one")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    # What a worker sees as its first device may be another one's second.
    order = [0, 1, 2]
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=f"GPU-{order[i]}")
    )
    locks = []
    monkeypatch.setattr(_batches, "_slots", locks)

    def dealt():
        _batches._dealt_device.cache_clear()
        device = _batches.resolve_device("auto")
        assert _batches.resolve_device("auto") == device
        return device

    assert [str(dealt()) for _ in range(4)] == ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]
    order[:] = [1, 2, 0]
    assert str(dealt()) == "cuda:0"  # GPU-1
    locks.pop(2).release()  # a worker that ends gives its device back
    assert str(dealt()) == "cuda:1"  # GPU-2
    _batches._dealt_device.cache_clear()
    for lock in locks:
        lock.release()


# -- precision ----------------------------------------------------------------------------------
def test_tf32_is_a_precision_of_its_own(pictures):
    options = {"backbone": tiny_network, "preprocessing": SMALL}
    rows = PretrainedFeatureExtractor(**options).fit_transform(pictures)
    n_kept = len(embedding_store())
    # A CPU has no TF32; what is kept is not mixed up with float32 all the same.
    other = PretrainedFeatureExtractor(precision="tf32", **options)
    np.testing.assert_array_equal(other.fit_transform(pictures), rows)
    assert len(embedding_store()) == 2 * n_kept


@pytest.mark.parametrize("is_allowed", [True, False])
def test_tf32_is_set_for_a_pass_and_set_back(is_allowed):
    def settings():
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        if not hasattr(cudnn, "conv"):
            return [matmul.allow_tf32, cudnn.allow_tf32]
        return [part.fp32_precision == "tf32" for part in (matmul, cudnn.conv, cudnn.rnn)]

    def fail_within():
        with tensor_float_32(torch.device("cuda"), is_allowed):
            assert set(settings()) == {is_allowed}
            raise KeyError("enough")

    before = settings()
    with pytest.raises(KeyError, match="enough"):
        fail_within()
    assert settings() == before
    with tensor_float_32(torch.device("cpu"), is_allowed):
        assert settings() == before


# -- batches ------------------------------------------------------------------------------------
def embedded_elsewhere(X, monkeypatch, backbone=tiny_network, **options):
    with FakeDevice(monkeypatch):
        extractor = PretrainedFeatureExtractor(backbone, device="meta", **options)
        return extractor.fit_transform(X)


@pytest.mark.parametrize("n", [1, 33, 300])
@pytest.mark.parametrize("memory", [None, False])
def test_an_accelerators_batches_give_the_same_rows(many_images, n, memory, monkeypatch):
    X = [*many_images[:n], *many_images[: n // 4]]
    options = {"preprocessing": SMALL, "n_jobs": 3}
    expected = PretrainedFeatureExtractor(tiny_network, memory=False, **options).fit_transform(X)
    rows = embedded_elsewhere(X, monkeypatch, memory=memory, **options)
    np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-4)


def test_an_accelerators_batches_grow_and_shrink(many_images, sizes_of_batches, monkeypatch):
    options = {"backbone": "builtin", "memory": False}
    embedded_elsewhere(many_images, monkeypatch, **options)
    assert sizes_of_batches == [32, 32, 40, 33, 32, 32, 32, 32, 32, 3]
    sizes_of_batches.clear()
    embedded_elsewhere(many_images, monkeypatch, batch_size=128, **options)
    assert sizes_of_batches == [128, 128, 44]


class Preprocessing:
    """Crops; calls a function with each image first."""

    fingerprint = "calls"

    def __init__(self, call):
        self.call = call

    def __deepcopy__(self, memo):
        return self

    def __call__(self, image):
        if image.shape == (20, 24, 3):  # not the one that shows the size
            self.call()
        return image[:16, :16].transpose(2, 0, 1).astype(np.float32)


def test_all_threads_decode_one_batch(many_images, monkeypatch):
    together = threading.Barrier(4, timeout=60)
    options = {"preprocessing": Preprocessing(together.wait), "n_jobs": 4, "memory": False}
    embedded_elsewhere(many_images[:16], monkeypatch, **options)


def test_images_are_read_while_others_are_decoded(many_images, monkeypatch):
    class Images:
        n_read = itertools.count(1)
        are_read = threading.Event()

        def __len__(self):
            return len(many_images)

        def __getitem__(self, i):
            if next(self.n_read) == 75:
                self.are_read.set()
            return many_images[i]

    images = Images()

    def wait():
        assert images.are_read.wait(60)

    options = {"preprocessing": Preprocessing(wait), "n_jobs": 1, "memory": False}
    embedded_elsewhere(images, monkeypatch, **options)
