"""Texts and images of one network that was trained on pairs of them share a space."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_transformers import WORDS, make_text_folder

from sktransfer import PretrainedFeatureExtractor, PretrainedTextExtractor

transformers = pytest.importorskip("transformers")

TEXTS = ["a good film", "bad", "the film is not very good", ""]
TOWER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER |= {"intermediate_size": 32}
OF_TEXTS = TOWER | {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 2}
OF_TEXTS |= {"eos_token_id": 3, "max_position_embeddings": 12}
OF_IMAGES = TOWER | {"image_size": 32, "patch_size": 8}


def make_pair_folder(folder, kind):
    make_text_folder(folder)  # for its tokenizer
    if kind == "Siglip":  # whose texts are padded to one length always
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 12}))
    torch.manual_seed(0)
    towers = {"text_config": OF_TEXTS, "vision_config": OF_IMAGES}
    config = getattr(transformers, f"{kind}Config")(**towers)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    size = {"size": {"height": 32, "width": 32}}
    size |= {"crop_size": size["size"]} if kind == "CLIP" else {}
    getattr(transformers, f"{kind}ImageProcessor")(**size).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_similarities_are_the_models_own(kind, tmp_path):
    folder = make_pair_folder(tmp_path, kind)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(3)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    settings = {"padding": "max_length", "max_length": 12} if kind == "Siglip" else {}
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    expected = []
    for text in TEXTS:
        inputs = tokenizer([text], return_tensors="pt", **settings)
        if kind == "Siglip":
            inputs = {"input_ids": inputs["input_ids"]}
        else:
            inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            found = model(**inputs, pixel_values=pixels)
        expected.append((found.image_embeds @ found.text_embeds.T)[:, 0].numpy())
    of_texts = PretrainedTextExtractor(f"hf:{folder}").fit_transform(TEXTS)
    of_images = PretrainedFeatureExtractor(f"hf:{folder}").fit_transform(images)
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (of_images, of_texts)]
    np.testing.assert_allclose(unit[0] @ unit[1].T, np.stack(expected, axis=1), atol=1e-5)
