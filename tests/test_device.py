"""Another device gives the CPU's rows and models, and no operation mixes devices.

The device is `fake_device`: no hardware is needed. What only CUDA can show is marked `cuda`.
"""

import numpy as np
import pytest
import torch
from fake_device import FakeDevice
from PIL import Image

from sktransfer import PretrainedFeatureExtractor, load_backbone


def as_callable(image):
    return image[:32, :32].transpose(2, 0, 1).astype(np.float32) / 255


@pytest.fixture
def files_of_sizes(tmp_path):
    """JPEG files of three sizes, one upright by its EXIF only, and one that is damaged."""
    rng = np.random.default_rng(0)
    paths = []
    for i, size in enumerate([(90, 60), (60, 90), (50, 50)] * 4):
        coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        paths.append(tmp_path / f"{i}.jpg")
        Image.fromarray(coarse).resize(size).save(paths[-1])
    paths[5].write_bytes(b"\xff\xd8 no more")
    return paths


def close(rows, expected):
    np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-4 * np.nanmax(np.abs(expected)))


# -- the device itself --------------------------------------------------------------------------
def test_the_device_fails_where_cuda_would(monkeypatch):
    with FakeDevice(monkeypatch) as device:
        host = torch.ones(3)
        here = host.to("meta:0")
        assert (here + here).cpu().tolist() == [2, 2, 2]
        with pytest.raises(RuntimeError, match="of the host and of the device"):
            here + host
        with pytest.raises(RuntimeError, match="numpy"):
            here.numpy()
        back = here.to("cpu", non_blocking=True)
        assert back.isnan().all()
        device.stream.record_event().synchronize()
        assert back.tolist() == [1, 1, 1]

        module = torch.get_device_module("meta")
        uploads, computing = module.Stream(), module.current_stream("meta")
        pinned = torch.empty(2, pin_memory=True).fill_(1)
        with module.stream(uploads):
            copied = pinned.to("meta:0", non_blocking=True)
        with pytest.raises(RuntimeError, match="has not waited"):
            copied.sum()
        computing.wait_stream(uploads)
        with pytest.raises(RuntimeError, match="not recorded"):
            copied.sum()
        copied.record_stream(computing)
        pinned.fill_(2)
        with pytest.raises(RuntimeError, match="was changed"):
            copied.sum()


# -- embedding ----------------------------------------------------------------------------------
@pytest.mark.parametrize("is_streaming", [True, False])
@pytest.mark.parametrize(
    "preprocessing", ["auto", as_callable, {"resize_on": "device"}], ids=["auto", "own", "device"]
)
def test_rows_are_those_of_the_cpu(files_of_sizes, preprocessing, is_streaming, monkeypatch):
    options = {"preprocessing": preprocessing, "on_error": "nan", "memory": False, "n_jobs": 3}
    X = [*files_of_sizes, np.full((40, 40, 3), 99, np.uint8), files_of_sizes[0]]
    expected = PretrainedFeatureExtractor(device="cpu", **options).fit_transform(X)
    with FakeDevice(monkeypatch, is_streaming) as device:
        extractor = PretrainedFeatureExtractor(device="meta", batch_size=4, **options)
        rows = extractor.fit_transform(X)
    assert device.n_uploads
    assert [bad.row for bad in extractor.bad_images_] == [5]
    close(rows, expected)


def test_out_of_memory_halves_the_batches(pictures, monkeypatch):
    expected = PretrainedFeatureExtractor(memory=False).fit_transform(pictures)
    with FakeDevice(monkeypatch, most_images=3):
        extractor = PretrainedFeatureExtractor(device="meta", memory=False).fit(pictures)
        with pytest.warns(UserWarning, match="batches of") as caught:
            close(extractor.transform(pictures), expected)
    assert [str(w.message).split(":")[0] for w in caught] == [
        "Out of memory with a batch of 12",
        "Out of memory with a batch of 6",
    ]


def test_rows_of_the_store_need_no_network(pictures, tmp_path, monkeypatch):
    options = {"weights": None, "memory": tmp_path}
    expected = PretrainedFeatureExtractor("resnet18", **options).fit_transform(pictures)
    with FakeDevice(monkeypatch) as device:
        extractor = PretrainedFeatureExtractor("resnet18", device="meta", **options)
        np.testing.assert_array_equal(extractor.fit_transform(pictures), expected)
    assert device.n_uploads == 0


def test_images_on_the_device_are_copied_from_it_once(pictures, monkeypatch):
    expected = PretrainedFeatureExtractor(memory=False).fit_transform(pictures)
    with FakeDevice(monkeypatch) as device:
        X = torch.from_numpy(pictures).permute(0, 3, 1, 2).to("meta:0")
        extractor = PretrainedFeatureExtractor(device="meta", memory=False).fit(X)
        device.n_downloads = 0
        close(extractor.transform(X), expected)
    assert device.n_downloads == 2  # the images, and their rows


# -- CUDA ---------------------------------------------------------------------------------------
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [("float32", 1e-4), ("tf32", 1e-2), ("bfloat16", 5e-2), ("float16", 1e-2)],
)
def test_cuda_agrees_with_the_cpu(pictures, precision, tolerance):
    options = {"memory": False, "precision": precision}
    expected = PretrainedFeatureExtractor(memory=False, device="cpu").fit_transform(pictures)
    rows = PretrainedFeatureExtractor(device="cuda", **options).fit_transform(pictures)
    assert np.linalg.norm(rows - expected) < tolerance * np.linalg.norm(expected)


@pytest.mark.cuda
@needs_cuda
def test_cuda_tensors_are_images_as_others(pictures):
    X = torch.from_numpy(pictures).permute(0, 3, 1, 2).cuda()
    extractor = PretrainedFeatureExtractor(memory=False)
    close(extractor.fit_transform(X), extractor.fit_transform(pictures))


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_cuda_resizes_as_the_cpu(pictures, interpolation):
    options = {"interpolation": interpolation, "resize_on": "device"}
    preprocessing = load_backbone(preprocessing=options).preprocessing
    images = list(torch.from_numpy(pictures))
    on_cpu = preprocessing.join(images)
    on_gpu = preprocessing.join(images, "cuda").cpu()
    assert (on_cpu.int() - on_gpu.int()).abs().max() <= 1
