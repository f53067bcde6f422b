"""Resizing and cropping equal torchvision's presets pixel for pixel."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import get_model_weights
from torchvision.transforms import functional as F
from torchvision.transforms import v2

from sktransfer import PretrainedFeatureExtractor, load_backbone
from sktransfer.networks._preprocessing import (
    CallablePreprocessing,
    Preprocessing,
    resolve_preprocessing,
)

SHAPES = [
    (224, 224), (256, 256), (500, 375), (375, 500), (301, 449), (57, 91), (90, 33), (8, 8),
    (1, 1), (1, 16), (180, 12), (233, 231), (1080, 1920),
]  # fmt: skip


def make_image(shape, seed=0):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (shape[0] // 7 + 1, shape[1] // 5 + 1, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize(shape[::-1], Image.Resampling.BICUBIC))


def torchvision_pixels(preset, image):
    """What torchvision's preset does before it normalises."""
    resized = F.resize(
        Image.fromarray(image),
        preset.resize_size,
        interpolation=preset.interpolation,
        antialias=preset.antialias,
    )
    return np.asarray(F.center_crop(resized, preset.crop_size))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b0", "inception_v3", "vit_h_14"])
def test_equals_torchvision(name, shape):
    preset = get_model_weights(name).DEFAULT.transforms()
    preprocessing = Preprocessing(
        preset.resize_size[0],
        preset.crop_size[0],
        preset.mean,
        preset.std,
        preset.interpolation.value,
    )
    image = make_image(shape)
    got = preprocessing.resize_crop(image)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, torchvision_pixels(preset, image))
    np.testing.assert_array_equal(preprocessing.resize_crop(Image.fromarray(image)), got)


def test_equals_torchvision_for_many_shapes():
    preset = get_model_weights("resnet18").DEFAULT.transforms()
    preset.crop_size, preset.resize_size = [28], [32]
    preprocessing = Preprocessing(32, 28)
    rng = np.random.default_rng(0)
    for seed in range(300):
        image = make_image(tuple(rng.integers(9, 130, 2)), seed)
        np.testing.assert_array_equal(
            preprocessing.resize_crop(image), torchvision_pixels(preset, image)
        )


@pytest.mark.parametrize("shape", [(20, 33), (64, 64), (41, 40)])
def test_pads_what_is_smaller_than_the_crop(shape):
    preset = get_model_weights("resnet18").DEFAULT.transforms()
    preset.crop_size, preset.resize_size = [45], [32]
    got = Preprocessing(32, 45).resize_crop(make_image(shape))
    np.testing.assert_array_equal(got, torchvision_pixels(preset, make_image(shape)))


@pytest.mark.parametrize("shape", [(1, 100_000), (100_000, 1), (2, 60_000)])
def test_extreme_proportions_need_no_memory(shape):
    image = np.zeros((*shape, 3), np.uint8)
    image[shape[0] // 2 :, shape[1] // 2 :] = 255
    got = Preprocessing(256, 224).resize_crop(image)
    assert got.shape == (224, 224, 3)
    assert got.min() < 20
    assert got.max() > 235


def test_extreme_proportions_give_nearly_the_same():
    preset = get_model_weights("resnet18").DEFAULT.transforms()
    preset.crop_size, preset.resize_size = [28], [32]
    for shape in [(2, 300), (300, 2), (3, 2000), (999, 3)]:
        got = Preprocessing(32, 28).resize_crop(make_image(shape)).astype(int)
        assert abs(got - torchvision_pixels(preset, make_image(shape))).max() <= 1


def test_squeezes_into_a_pair():
    image = make_image((50, 90))
    got = Preprocessing((64, 48), (64, 48)).resize_crop(image)
    expected = np.asarray(Image.fromarray(image).resize((48, 64), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(got, expected)


def test_grey():
    preprocessing = Preprocessing(32, 28, mean=0.5, std=0.25)
    assert preprocessing.input_size == (1, 28, 28)
    for shape in [(40, 60), (32, 32)]:
        got = preprocessing.resize_crop(make_image(shape))
        assert got.shape == (28, 28, 1)


def test_reduced_decoding_leaves_twice_the_target():
    assert Preprocessing(256, 224).min_size == (512, 512)
    assert Preprocessing((64, 48), (64, 48)).min_size == (128, 96)
    assert Preprocessing(256, 224, fast_decode=False).min_size is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"sise": 32}, "unknown key 'sise'; accepted are .*Did you mean 'size'"),
        ({"size": 0}, "'size' is 0: give a positive number of pixels"),
        ({"crop": (3, 4, 5)}, r"'crop' is \(3, 4, 5\)"),
        ({"mean": [1, 2]}, r"'mean' is \[1, 2\]: give 3 numbers"),
        ({"mean": (123.7, 116.3, 103.5)}, "for pixels in 0…1, not 0…255"),
        ({"mean": "imagenet"}, "'mean' is 'imagenet': give 3 numbers"),
        ({"std": {"red": 1}}, "'std' is {'red': 1}: give 3 numbers"),
        ({"std": [[1], [1, 2]]}, r"'std' is \[\[1\], \[1, 2\]\]: give 3 numbers"),
        ({"interpolation": ["box"]}, r"'interpolation' is \['box'\]: one of"),
        ({"std": (1, 0, 1)}, "it divides"),
        ({"mean": 0.5}, "'mean' has 1 values, 'std' 3"),
        ({"interpolation": "cubic"}, "'interpolation' is 'cubic': one of"),
        ({"fast_decode": [0]}, r"'fast_decode' is \[0\]: True or False"),
        ({"resize_on": "cuda"}, "'resize_on' is 'cuda': 'cpu' or 'device' is accepted"),
        ({"resize_on": "device", "interpolation": "box"}, "'box': with resize_on='device' one of"),
        ("imagenet", "preprocessing is 'imagenet': 'auto', a dict"),
    ],
)
def test_wrong_overrides(override, message):
    with pytest.raises(ValueError, match=message):
        resolve_preprocessing(override, Preprocessing())


@pytest.mark.parametrize(
    ("override", "size", "crop"),
    [
        ({"crop": 64}, 256, (64, 64)),
        ({"crop": 448}, 512, (448, 448)),
        ({"size": 128}, 128, (128, 128)),
        ({"size": 240}, 240, (224, 224)),
        ({"size": 64, "crop": 96}, 64, (96, 96)),
        ({"crop": (64, 32)}, (64, 32), (64, 32)),
    ],
)
def test_overrides_leave_no_black_border_unasked(override, size, crop):
    default = Preprocessing(256, 224)
    if isinstance(size, tuple):
        default = Preprocessing((64, 64), (64, 64))
    got = resolve_preprocessing(override, default)
    assert (got.size, got.crop) == (size, crop)
    assert (got.mean, got.interpolation) == (default.mean, default.interpolation)


def halves(image):
    return np.transpose(image[:32, :32], (2, 0, 1)) / 510


def test_scalars_of_numpy_are_those_of_python():
    plain = {"size": 40, "mean": 0.5, "std": 0.25, "interpolation": "bicubic", "fast_decode": False}
    given = {name: np.asarray(value)[()] for name, value in plain.items()}
    assert repr(Preprocessing(**given)) == repr(Preprocessing(**plain))


def test_a_callable():
    backbone = load_backbone("builtin", preprocessing=halves)
    assert backbone.input_size == (3, 32, 32)
    assert isinstance(backbone.preprocessing, CallablePreprocessing)
    assert backbone.preprocessing.resize_crop(make_image((50, 60))).dtype == np.float32
    assert backbone.fingerprint != load_backbone("builtin").fingerprint
    assert backbone.fingerprint == load_backbone("builtin", preprocessing=halves).fingerprint


def test_a_callable_may_write_into_the_image():
    def without_red(image):
        image[..., 0] = 0
        return image.transpose(2, 0, 1) / np.float32(255)

    X = np.full((2, 32, 32, 3), 200, np.uint8)
    rows = PretrainedFeatureExtractor(preprocessing=without_red, memory=False).fit_transform(X)
    assert (X == 200).all()
    X[..., 0] = 0
    expected = PretrainedFeatureExtractor(preprocessing=without_red, memory=False).fit_transform(X)
    np.testing.assert_array_equal(rows, expected)


def test_a_callable_that_returns_the_wrong_thing():
    message = re.escape("returned ndarray of shape (240, 320, 3) for an image of shape (240, 320")
    with pytest.raises(ValueError, match=message):
        load_backbone("builtin", preprocessing=lambda image: image)
    transforms = get_model_weights("resnet18")["DEFAULT"].transforms()
    with pytest.raises(TypeError, match=r"got a uint8 array .* needs v2.ToImage\(\) before it"):
        load_backbone("builtin", preprocessing=transforms)
    load_backbone("builtin", preprocessing=v2.Compose([v2.ToImage(), transforms]))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("mean", [(0.5, 0.4, 0.3), (0.5,)], ids=["colours", "grey"])
@pytest.mark.parametrize(("size", "crop"), [(64, 56), ((48, 80), (48, 80)), (40, 64)])
def test_resizing_together_is_within_two_of_pillow(interpolation, mean, size, crop):
    by_pillow = Preprocessing(size, crop, mean, mean, interpolation)
    together = replace(by_pillow, resize_on="device")
    images = [make_image(shape, i) for i, shape in enumerate([*SHAPES[:-1], *SHAPES[:3], (4, 99)])]
    tensors = [torch.tensor(np.asarray(together.prepare(image))) for image in images]
    pixels = together.join(tensors)
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    off = []
    for image, got in zip(images, pixels.permute(0, 2, 3, 1).numpy(), strict=True):
        expected = by_pillow.resize_crop(image).astype(int)
        assert np.abs(got - expected).max() <= 2
        off.append((got != expected).mean())
        np.testing.assert_array_equal(together.resize_crop(Image.fromarray(image)), got)
    assert np.mean(off) < 0.1


def test_where_to_resize_is_part_of_the_fingerprint():
    assert Preprocessing(resize_on="cpu").identity == Preprocessing().identity
    assert "resize_on" not in Preprocessing().identity
    assert Preprocessing(resize_on="device").identity != Preprocessing().identity
