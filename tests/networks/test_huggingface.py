"""`hf:` networks for images: the rows of transformers' own processor and model."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_transformers import clear_networks

from sktransfer import (
    FineTuningClassifier,
    PretrainedFeatureExtractor,
    export,
    load,
    load_backbone,
    save,
)

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"intermediate_size": 32, "vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2}
TOWERS = {"text_config": TEXT, "vision_config": SIZES}
MAPS = {"hidden_sizes": [8, 16], "depths": [1, 2]}
# model -> its configuration, its image processor
MODELS = {
    "ViT": (SIZES, "ViT"),
    "DeiT": (SIZES, "DeiT"),
    "Dinov2": (SIZES, "Bit"),
    "Dinov2WithRegisters": (SIZES | {"num_register_tokens": 3}, "Bit"),
    "CLIP": (TOWERS | {"projection_dim": 12}, "CLIP"),
    "Siglip": (TOWERS, "Siglip"),
    "ConvNext": (MAPS | {"num_stages": 2, "image_size": 32}, "ConvNext"),
    "Swin": (
        {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
        | {"image_size": 32, "patch_size": 4},
        "ViT",
    ),
    "ResNet": (MAPS | {"embedding_size": 8, "layer_type": "basic"}, "ConvNext"),
}
PROCESSORS = {
    "ViT": {"size": {"height": 32, "width": 32}},
    "DeiT": {"size": {"height": 36, "width": 36}, "crop_size": {"height": 32, "width": 32}},
    "Bit": {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}},
    "CLIP": {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
    "Siglip": {"size": {"height": 32, "width": 32}, "resample": 3},
    "ConvNext": {"size": {"shortest_edge": 32}, "crop_pct": 0.875},
}


def make_folder(path, kind="ViT", suffix="Model", **changes):
    torch.manual_seed(3)
    settings, processor = MODELS[kind]
    config = getattr(transformers, f"{kind}Config")(**settings | changes)
    getattr(transformers, kind + suffix)(config).save_pretrained(path)
    made = getattr(transformers, f"{processor}ImageProcessor")(**PROCESSORS[processor])
    made.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("models") / "tiny-vit")


def make_images(n=5, size=(32, 32), seed=0):
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (n, 5, 5, 3), np.uint8)
    return [Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC) for pixels in small]


def own_output(folder, images, **options):
    """What transformers itself computes."""
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, **options).eval()
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return getattr(model, "get_image_features", model)(pixel_values=pixels)


def extract(folder, images, **parameters):
    extractor = PretrainedFeatureExtractor(f"hf:{folder}", memory=None, **parameters)
    return extractor.fit_transform(images)


@pytest.mark.parametrize("kind", MODELS)
def test_rows_are_those_of_transformers(kind, tmp_path):
    folder, images = make_folder(tmp_path / "model", kind), make_images()
    if PROCESSORS[MODELS[kind][1]]["size"] in ({"shortest_edge": 36}, {"height": 36, "width": 36}):
        images = make_images(size=(36, 36))
    if MODELS[kind][1] == "ConvNext":
        images = make_images(size=(36, 36))
    output = own_output(folder, images)  # before transformers 5 a tensor, for CLIP and SigLIP
    expected = getattr(output, "pooler_output", output).flatten(1)
    np.testing.assert_allclose(extract(folder, images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_pixels_are_those_of_the_processor(kind, tmp_path):
    folder, images = make_folder(tmp_path / "model", kind), make_images(2, (70, 50))
    settings = load_backbone(f"hf:{folder}").preprocessing
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    expected = processor(images=images, return_tensors="np")["pixel_values"]
    pixels = np.stack([settings.resize_crop(image) for image in images]) / 255
    got = ((pixels - settings.mean) / settings.std).transpose(0, 3, 1, 2)
    assert got.shape == expected.shape
    assert np.abs(got - expected).mean() < 0.03  # resampling rounds otherwise


@pytest.mark.parametrize("kind", [k for k in MODELS if k not in ("Swin",)])
def test_stages_are_the_network(kind, tmp_path):
    backbone = load_backbone(f"hf:{make_folder(tmp_path / 'model', kind)}")
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        expected = backbone.network.module.joined()(x)
        got = backbone.stages.run(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert backbone.stage_names[:2] == ["embeddings", "block0"]


def test_a_classifier_gives_the_class_token(tmp_path):
    folder = make_folder(tmp_path / "google-vit", suffix="ForImageClassification")
    images = make_images()
    expected = own_output(folder, images, add_pooling_layer=False).last_hidden_state[:, 0]
    np.testing.assert_allclose(extract(folder, images), expected, rtol=1e-4, atol=1e-5)


def test_the_vision_part_of_a_model_with_texts_is_enough(tmp_path):
    folder = make_folder(tmp_path / "siglip", "Siglip", "ForImageClassification")
    assert extract(folder, make_images()).shape == (5, 16)


@pytest.mark.parametrize(("kind", "n_prefix"), [("ViT", 1), ("Dinov2WithRegisters", 4)])
def test_poolings_leave_prefix_tokens_out(kind, n_prefix, tmp_path):
    folder, images = make_folder(tmp_path / "model", kind), make_images(size=(36, 36))
    images = make_images() if kind == "ViT" else images
    states = own_output(folder, images).last_hidden_state.numpy()
    compared = {"atol": 1e-5, "rtol": 1e-4}
    rows = extract(folder, images, pooling="avg")
    np.testing.assert_allclose(rows, states[:, n_prefix:].mean(1), **compared)
    np.testing.assert_allclose(extract(folder, images, pooling="cls"), states[:, 0], **compared)


def test_layers_are_the_hidden_states(vit):
    images = make_images()
    model = transformers.AutoModel.from_pretrained(vit).eval()
    pixels = transformers.AutoImageProcessor.from_pretrained(vit)(images, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**pixels, output_hidden_states=True).hidden_states
    rows = extract(vit, images, layer=["block0", "block1"])
    expected = torch.cat([hidden[1][:, 0], hidden[2][:, 0]], dim=1)
    np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-5)
    assert extract(vit, images, layer="all").shape == (5, 3 * 16)
    np.testing.assert_allclose(extract(vit, images, layer=2), expected[:, 16:], atol=1e-5)
    ends = extract(vit, images, layer=[0, -1], cache_layers=["block1"])
    expected = torch.cat([hidden[0][:, 0], model(**pixels).last_hidden_state[:, 0]], dim=1)
    np.testing.assert_allclose(ends, expected.detach(), rtol=1e-4, atol=1e-5)


def test_feature_names_have_the_last_part_of_the_name(vit):
    extractor = PretrainedFeatureExtractor(f"hf:{vit}").fit(make_images())
    assert extractor.get_feature_names_out()[0].endswith("tiny_vit_000")


def test_the_random_twin_is_random_and_the_same(vit):
    images = make_images()
    rows = extract(vit, images, weights=None)
    clear_networks()
    np.testing.assert_array_equal(rows, extract(vit, images, weights=None))
    assert not np.allclose(rows, extract(vit, images), atol=0.01)


def test_weights_may_be_a_file(vit, tmp_path):
    other = make_folder(tmp_path / "other", hidden_act="relu")
    images = make_images()
    twin = transformers.AutoModel.from_pretrained(vit)
    torch.manual_seed(9)
    for parameter in twin.parameters():
        parameter.data.normal_(std=0.2)
    twin.save_pretrained(other)
    path = other / "model.safetensors"
    expected = own_output(other, images).pooler_output
    got = extract(vit, images, weights=path)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_old_files_of_torch_load(vit, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(vit, folder)
    state = transformers.AutoModel.from_pretrained(vit).state_dict()
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    np.testing.assert_array_equal(extract(folder, make_images()), extract(vit, make_images()))


def test_bfloat16_is_near(vit):
    images = make_images()
    rows = extract(vit, images, precision="bfloat16")
    np.testing.assert_allclose(rows, extract(vit, images), atol=0.05)


def test_without_a_processor_the_size_is_that_of_the_network(vit, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(vit, folder)
    (folder / "preprocessor_config.json").unlink()
    settings = load_backbone(f"hf:{folder}").preprocessing
    assert (settings.size, settings.crop) == (37, (32, 32))
    assert settings.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("kind", ["ViT", "CLIP", "ConvNext"])
def test_saving(kind, tmp_path):
    folder, images = make_folder(tmp_path / "model", kind), make_images()
    extractor = PretrainedFeatureExtractor(f"hf:{folder}", memory=None).fit(images)
    expected = extractor.transform(images)
    pickled = pickle.dumps(extractor)
    assert len(pickled) < 20_000
    np.testing.assert_array_equal(pickle.loads(pickled).transform(images), expected)
    save(extractor, tmp_path / "small")
    save(extractor, tmp_path / "whole", standalone=True)
    with pytest.raises(ValueError, match=r"trusted=\['hf:"):
        load(tmp_path / "small")
    loaded = load(tmp_path / "small", trusted=[f"hf:{folder}"])
    np.testing.assert_array_equal(loaded.transform(images), expected)
    folder.rename(tmp_path / "elsewhere")
    clear_networks()
    np.testing.assert_allclose(
        load(tmp_path / "whole").transform(images), expected, rtol=1e-5, atol=1e-6
    )
    clear_networks()
    with pytest.raises(FileNotFoundError, match=r"no such folder(.|\n)*standalone=True"):
        pickle.loads(pickled)


def test_changed_weights_are_noticed(vit, tmp_path):
    folder, images = tmp_path / "model", make_images()
    shutil.copytree(vit, folder)
    pickled = pickle.dumps(PretrainedFeatureExtractor(f"hf:{folder}").fit(images))
    make_folder(folder, "ViT", hidden_act="relu")
    clear_networks()
    with pytest.raises(FileNotFoundError, match="have changed since"):
        pickle.loads(pickled)


@pytest.mark.parametrize("kind", ["ViT", "ConvNext"])
def test_fine_tuning(kind, tmp_path):
    folder = make_folder(tmp_path / "model", kind)
    images = make_images(12, size=(36, 36))
    y = np.array([0, 1] * 6)
    model = FineTuningClassifier(
        f"hf:{folder}", unfreeze=2, max_epochs=2, random_state=0, device="cpu", memory=None
    ).fit(images, y)
    probabilities = model.predict_proba(images)
    save(model, tmp_path / "tuned", standalone=True)
    folder.rename(tmp_path / "elsewhere")
    clear_networks()
    loaded = load(tmp_path / "tuned")
    np.testing.assert_allclose(loaded.predict_proba(images), probabilities, atol=1e-5)


@pytest.mark.slow  # torch.export follows the network's code
@pytest.mark.parametrize("kind", ["ViT", "CLIP", "ConvNext"])
def test_exporting(kind, tmp_path):
    images = make_images(size=(36, 36))
    extractor = PretrainedFeatureExtractor(
        f"hf:{make_folder(tmp_path / 'model', kind)}", memory=None
    ).fit(images)
    settings = extractor.backbone_.preprocessing
    pixels = np.stack([settings.resize_crop(image) for image in images]).transpose(0, 3, 1, 2)
    export(extractor, tmp_path / "model.pt2", format="torch")
    run = torch.export.load(tmp_path / "model.pt2").module()
    got = run(torch.from_numpy(pixels.copy())).detach()
    np.testing.assert_allclose(got, extractor.transform(images), rtol=1e-4, atol=1e-5)


# -- errors -------------------------------------------------------------------------------------
def test_a_name_without_its_prefix_is_recognised():
    with pytest.raises(ValueError, match="Did you mean 'hf:google/vit-base-patch16-224'"):
        load_backbone("google/vit-base-patch16-224")


def test_nothing_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="hf download google/vit-base-patch16-224"):
        load_backbone("hf:google/vit-base-patch16-224")


def test_a_name_in_the_cache(vit, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    place = tmp_path / "models--google--tiny"
    shutil.copytree(vit, place / "snapshots" / "0123")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0123")
    backbone = load_backbone("hf:google/tiny")
    assert (backbone.n_features, backbone.short_name) == (16, "tiny")


def test_missing_weights_are_named(vit, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    shutil.copytree(vit, folder)
    state = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in state.items() if "embeddings.position" not in key}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the weights of \['embeddings.position_emb"):
        load_backbone(f"hf:{folder}")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds none of model\.safetensors"):
        load_backbone(f"hf:{folder}")


def test_a_network_of_texts_is_refused(tmp_path):
    config = transformers.BertConfig(vocab_size=20, **TEXT_ONLY)
    transformers.BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a network of texts: use PretrainedTextExtractor"):
        extract(tmp_path, make_images())


TEXT_ONLY = {key: value for key, value in SIZES.items() if key not in ("image_size", "patch_size")}


def test_other_weights_are_refused(vit):
    with pytest.raises(ValueError, match="'DEFAULT' means those of its folder"):
        load_backbone(f"hf:{vit}", weights="IMAGENET1K_V1")


def test_code_of_a_folder_is_not_run(vit, tmp_path):
    folder = tmp_path / "remote"
    shutil.copytree(vit, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "unheard", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit")
    with pytest.raises(ValueError, match="code of their own are not loaded"):
        load_backbone(f"hf:{folder}")


def test_an_unreadable_processor_is_named(vit, tmp_path):
    folder = tmp_path / "odd"
    shutil.copytree(vit, folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "No"}')
    with pytest.raises(ValueError, match="what its image processor does cannot be read"):
        load_backbone(f"hf:{folder}")
