"""Image processors of transformers as our preprocessing, and networks beyond the usual ones."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_transformers import clear_networks

from sktransfer import FineTuningClassifier, PretrainedFeatureExtractor, load, load_backbone, save

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 64,
    "patch_size": 16,
}
OF_ANY_SIZE = {"hidden_sizes": [8, 8], "depths": [1, 1], "embedding_size": 8, "layer_type": "basic"}
SQUARE = {"size": {"height": 64, "width": 64}}
CROPPED = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}


def write_network(folder, processor, kind="ViTModel", config=SIZES):
    """Write a tiny network, and a processor: its class and settings."""
    torch.manual_seed(0)
    base = kind.replace("WithProjection", "").removesuffix("Model")
    settings = getattr(transformers, f"{base}Config")(**config)
    model = getattr(transformers, kind)(settings).eval()
    model.save_pretrained(folder)
    name, options = processor
    getattr(transformers, f"{name}ImageProcessor")(**options).save_pretrained(folder)
    return model


def make_images(n=3, size=(90, 120), seed=0):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (n, 4, 4, 3), np.uint8)
    return [Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC) for pixels in small]


def extract(folder, images, **parameters):
    extractor = PretrainedFeatureExtractor(f"hf:{folder}", memory=False, **parameters)
    return extractor.fit_transform(images)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Levit", CROPPED),  # resizes to 256 / 224 of the size that it names
        ("PoolFormer", CROPPED | {"crop_pct": 0.8}),
        ("ConvNext", {"size": {"shortest_edge": 64}, "crop_pct": 0.8}),
        ("ConvNext", {"size": {"shortest_edge": 384}}),  # which it does not crop
        ("EfficientNet", SQUARE | {"include_top": True}),  # divides by the deviation twice
        ("EfficientNet", SQUARE | {"include_top": False, "rescale_offset": True}),
        ("MobileViT", CROPPED),  # red and blue change places
        ("ViT", SQUARE | {"do_normalize": False}),
        ("CLIP", CROPPED | {"resample": 2}),
    ],
)
def test_pixels_are_those_of_the_processor(name, options, tmp_path):
    write_network(tmp_path, (name, options), "ResNetModel", OF_ANY_SIZE)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    how, images = load_backbone(f"hf:{tmp_path}").preprocessing, make_images(size=(130, 180))
    expected = processor(images=images, return_tensors="pt")["pixel_values"].numpy()
    pixels = np.stack([how.resize_crop(image) for image in images]) / 255
    got = ((pixels - how.mean) / how.std).transpose(0, 3, 1, 2)
    got = got[:, ::-1] if name == "MobileViT" else got
    assert got.shape == expected.shape
    # A crop may begin one pixel beside the processor's.
    assert np.abs((got - expected) * np.reshape(how.std, (3, 1, 1))).mean() < 0.02


def test_channels_change_places_before_the_network(tmp_path):
    model = write_network(tmp_path, ("MobileViT", SQUARE | {"crop_size": SQUARE["size"]}))
    images = make_images(size=(64, 64))
    pixels = np.stack([np.asarray(image) for image in images]).transpose(0, 3, 1, 2)
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels[:, ::-1] / 255).float()).pooler_output
    np.testing.assert_allclose(extract(tmp_path, images), expected, rtol=1e-4, atol=1e-5)


def test_a_processor_that_does_not_resize(tmp_path):
    model = write_network(tmp_path, ("ViT", {"do_resize": False}))
    images = make_images(size=(64, 64))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(**processor(images=images, return_tensors="pt")).pooler_output
    np.testing.assert_allclose(extract(tmp_path, images), expected, rtol=1e-4, atol=1e-5)


def test_networks_of_grey_images(tmp_path):
    options = SQUARE | {"image_mean": [0.5], "image_std": [0.5]}
    model = write_network(tmp_path, ("ViT", options), config=SIZES | {"num_channels": 1})
    images = make_images(size=(64, 64))
    grey = np.stack([np.asarray(image.convert("L")) for image in images])[:, None]
    with torch.no_grad():
        expected = model(torch.from_numpy(grey / 127.5 - 1).float()).pooler_output
    np.testing.assert_allclose(extract(tmp_path, images), expected, rtol=1e-4, atol=1e-5)


def test_a_processor_that_does_more_is_refused(tmp_path):
    write_network(tmp_path, ("Siglip2", {"patch_size": 16, "max_num_patches": 16}))
    with pytest.raises(ValueError, match=r"Siglip2ImageProcessor does more than to resize, crop"):
        load_backbone(f"hf:{tmp_path}")


def test_a_network_that_draws_random_numbers_is_refused(tmp_path):
    config = SIZES | {f"decoder_{k}": v for k, v in SIZES.items() if "_size" in k or "num" in k}
    write_network(tmp_path, ("ViT", SQUARE), "ViTMAEModel", config)
    with pytest.raises(
        ValueError, match="ViTMAEModel of transformers draws random numbers in each"
    ):
        load_backbone(f"hf:{tmp_path}")


def test_clip_of_images_alone_has_its_projection(tmp_path):
    config = SIZES | {"projection_dim": 12}
    folder = tmp_path / "model"
    model = write_network(folder, ("CLIP", CROPPED), "CLIPVisionModelWithProjection", config)
    images = make_images(size=(64, 64))
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        expected = model(**processor(images=images, return_tensors="pt")).image_embeds
    extractor = PretrainedFeatureExtractor(f"hf:{folder}", memory=False).fit(images)
    np.testing.assert_allclose(extractor.transform(images), expected, rtol=1e-4, atol=1e-5)
    save(extractor, tmp_path / "saved", standalone=True)
    (folder / "config.json").unlink()
    clear_networks()
    loaded = load(tmp_path / "saved")
    np.testing.assert_allclose(loaded.transform(images), expected, rtol=1e-4, atol=1e-5)


def test_stages_are_the_outer_blocks(tmp_path):
    config = {"hidden_sizes": [8, 16], "depths": [1, 3], "num_stages": 2, "image_size": 64}
    write_network(tmp_path, ("ConvNext", {"size": {"shortest_edge": 64}}), "ConvNextModel", config)
    names = load_backbone(f"hf:{tmp_path}").stage_names
    assert names == ["embeddings", "block0", "block1", "pool"]


@pytest.mark.parametrize("kind", ["DINOv3ViT", "Dinov2", "Beit"])
def test_fine_tuning_at_another_crop(kind, tmp_path):
    write_network(tmp_path, ("ViT", SQUARE), f"{kind}Model", SIZES)
    images, y = make_images(8), [0, 1] * 4
    model = FineTuningClassifier(
        f"hf:{tmp_path}",
        preprocessing={"size": 96, "crop": 96},
        unfreeze=1,
        max_epochs=2,
        random_state=0,
        memory=False,
    ).fit(images, y)
    how = model.backbone_.preprocessing
    pixels = torch.from_numpy(np.stack([how.resize_crop(image) for image in images]))
    with torch.no_grad():
        scores = model.net_.module_.eval()(pixels.permute(0, 3, 1, 2)[:, None])
    expected = scores[:, 1] - scores[:, 0]
    np.testing.assert_allclose(model.decision_function(images), expected, rtol=1e-3, atol=1e-4)
