"""Networks for texts of many families: transformers' own numbers, or one clear error."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_transformers import clear_networks, make_text_folder

from sktransfer import FineTuningClassifier, PretrainedTextExtractor, load, load_backbone, save

transformers = pytest.importorskip("transformers")

TEXTS = ["a good film", "bad", "the film is not very good", "dull " * 9]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 32}
OF_SENTENCES = {"modules": ["Transformer", "Pooling"], "pooling": {"pooling_mode": "mean"}}


def extract(folder, texts=TEXTS, **parameters):
    return PretrainedTextExtractor(f"hf:{folder}", memory=False, **parameters).fit_transform(texts)


def write_network(model, folder):
    """Write a network with a tokenizer of words."""
    make_text_folder(folder)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["Bert", "T5", "GPT2", "Albert", "XLNet"])
def test_stages_have_the_gradients_of_the_whole_network(kind, tmp_path):
    backbone = load_backbone(f"hf:{make_text_folder(tmp_path, kind)}")
    tokens = backbone.preprocessing
    ids = tokens.join([torch.from_numpy(tokens.prepare(text)) for text in TEXTS])
    whole = backbone.network.module.joined()
    root, stages = backbone.copy_network()
    gradients = []
    for model, run in ((whole, whole), (root, stages.run)):
        model.requires_grad_(True)
        run(ids).square().sum().backward()
        found = {
            name.replace(f"rest.{root.path}.", "blocks."): parameter.grad
            for name, parameter in model.named_parameters()
        }
        gradients.append({name: g for name, g in found.items() if g is not None and g.any()})
    assert len(gradients[0]) > 10
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_the_encoder_of_t5_is_enough(tmp_path):
    whole, alone = tmp_path / "whole", tmp_path / "alone"
    make_text_folder(whole, "T5")
    make_text_folder(alone, "T5", suffix="EncoderModel")
    encoder = transformers.T5EncoderModel.from_pretrained(whole)
    encoder.save_pretrained(alone)
    np.testing.assert_allclose(extract(alone), extract(whole), rtol=1e-5, atol=1e-6)
    assert load_backbone(f"hf:{alone}").stage_names[1:4] == ["block0", "block1", "block2"]


def test_a_network_without_blocks_has_no_inner_layers(tmp_path):
    make_text_folder(tmp_path, "Albert")
    np.testing.assert_array_equal(extract(tmp_path, layer=-1), extract(tmp_path, pooling="mean"))
    with pytest.raises(ValueError, match=r"layer=0 asks for .* network that is not divided into"):
        extract(tmp_path, layer=0)


@pytest.mark.parametrize("suffix", ["Model", "ModelWithProjection"])
def test_clip_of_texts_alone(suffix, tmp_path):
    settings = {"vocab_size": 16, "projection_dim": 12, "max_position_embeddings": 30}
    config = transformers.CLIPTextConfig(**SIZES, **settings, eos_token_id=3, pad_token_id=0)
    model = getattr(transformers, f"CLIPText{suffix}")(config).eval()
    write_network(model, tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in TEXTS]
        outputs = [model(input_ids=row) for row in ids]
    is_projected = "Projection" in suffix
    expected = [
        (out.text_embeds if is_projected else out.last_hidden_state.mean(1))[0] for out in outputs
    ]
    extractor = PretrainedTextExtractor(f"hf:{tmp_path / 'model'}", memory=False)
    rows = extractor.fit_transform(TEXTS)
    np.testing.assert_allclose(rows, torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert len(extractor.backbone_.stage_names) == 4
    save(extractor, tmp_path / "saved", standalone=True)
    shutil.rmtree(tmp_path / "model")
    clear_networks()
    np.testing.assert_allclose(load(tmp_path / "saved").transform(TEXTS), rows, atol=1e-5)


def test_long_texts_fit_positions_that_begin_behind_the_padding(tmp_path):
    settings = SIZES | {"vocab_size": 16, "max_position_embeddings": 40, "pad_token_id": 1}
    model = transformers.IBertModel(transformers.IBertConfig(**settings))
    assert np.isfinite(extract(write_network(model, tmp_path), ["good " * 60])).all()


# -- what sentence-transformers writes beside a network ------------------------------------------
def write_dense(folder, width, out, activation, seed):
    folder.mkdir()
    settings = {"in_features": width, "out_features": out, "bias": True}
    settings["activation_function"] = f"torch.nn.modules.activation.{activation}"
    (folder / "config.json").write_text(json.dumps(settings))
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator)
    bias = torch.randn(out, generator=generator)
    save_file({"linear.weight": weight, "linear.bias": bias}, folder / "model.safetensors")
    return weight.numpy(), bias.numpy()


def test_dense_layers_follow_the_pooling(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    kinds = ["Transformer", "Pooling", "Dense", "Dense", "Normalize"]
    make_text_folder(folder, sentences=OF_SENTENCES | {"modules": kinds})
    first = write_dense(folder / "2_Dense", 16, 24, "Tanh", 0)
    second = write_dense(folder / "3_Dense", 24, 8, "ReLU", 1)
    rows = np.tanh(extract(folder, pooling="mean") @ first[0].T + first[1])
    rows = np.maximum(rows @ second[0].T + second[1], 0)
    expected = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(extract(folder), expected, rtol=1e-4, atol=1e-5)
    assert extract(folder, weights=None).shape == (4, 8)
    model = FineTuningClassifier(f"hf:{folder}", max_epochs=1, memory=False).fit(TEXTS, [0, 1] * 2)
    expected = model.decision_function(TEXTS)
    save(model, tmp_path / "saved", standalone=True)
    shutil.rmtree(folder)
    clear_networks()
    np.testing.assert_allclose(
        load(tmp_path / "saved").decision_function(TEXTS), expected, atol=1e-5
    )


def test_missing_weights_of_a_dense_layer_are_named(tmp_path):
    kinds = ["Transformer", "Pooling", "Dense"]
    make_text_folder(tmp_path, sentences=OF_SENTENCES | {"modules": kinds})
    write_dense(tmp_path / "2_Dense", 16, 8, "Tanh", 0)
    (tmp_path / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"2_Dense.* holds none of model\.safetensors"):
        extract(tmp_path)


def test_a_default_prompt_begins_each_text(tmp_path):
    plain, prompted = tmp_path / "plain", tmp_path / "prompted"
    for folder in (plain, prompted):
        folder.mkdir()
        make_text_folder(folder, sentences=OF_SENTENCES)
    settings = {"prompts": {"query": "the film: ", "other": "bad "}, "default_prompt_name": "query"}
    (prompted / "config_sentence_transformers.json").write_text(json.dumps(settings))
    expected = extract(plain, [f"the film: {text}" for text in TEXTS])
    np.testing.assert_allclose(extract(prompted), expected, rtol=1e-5, atol=1e-6)


# -- folders ------------------------------------------------------------------------------------
def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    folder = make_text_folder(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(
        ValueError, match=r"no tokenizer that can be read \(FileNotFoundError: none"
    ):
        extract(folder)


def test_the_tokenizer_is_the_one_of_transformers(tmp_path):
    folder = make_text_folder(tmp_path)  # of which AutoTokenizer makes one for lower case
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "Good"])
    )
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    rows = extract(folder, ["Good", "good", "bad"])
    np.testing.assert_array_equal(rows[0], rows[1])
    assert not np.allclose(rows[0], rows[2])


def test_a_fitted_extractor_outlives_its_folder_and_working_folder(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    make_text_folder(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    expected = extract("model")
    extractor = PretrainedTextExtractor("hf:model", memory=False).fit(TEXTS)
    monkeypatch.chdir("/")
    clear_networks()
    np.testing.assert_array_equal(extractor.transform(TEXTS), expected)
    (tmp_path / "model").rename(tmp_path / "moved")
    np.testing.assert_array_equal(extractor.transform(TEXTS), expected)
    clear_networks()
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        extractor.transform(TEXTS)


# -- networks of other kinds ----------------------------------------------------------------------
def test_networks_of_images_and_sounds_are_refused(tmp_path):
    vision = transformers.ViTConfig(**SIZES, image_size=32, patch_size=8)
    write_network(transformers.ViTModel(vision), tmp_path / "vit")
    with pytest.raises(ValueError, match="is a vit network, which takes no texts"):
        extract(tmp_path / "vit")
    sound = transformers.HubertConfig(
        **SIZES, vocab_size=16, conv_dim=(16,), conv_kernel=(3,), conv_stride=(2,),
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    write_network(transformers.HubertModel(sound), tmp_path / "hubert")
    with pytest.raises(ValueError, match="HubertModel of transformers does not turn texts alone"):
        extract(tmp_path / "hubert")
    with pytest.raises(ValueError, match="is a hubert network, which takes no images"):
        load_backbone(f"hf:{tmp_path / 'hubert'}")


def test_tables_of_vectors_are_not_fine_tuned(tmp_path):
    path = tmp_path / "vectors.txt"
    path.write_text("good 1 0\nbad -1 0\n")
    with pytest.raises(
        ValueError, match=r"is a table of vectors, which is not fine-tuned: put Pre"
    ):
        FineTuningClassifier(f"vectors:{path}").fit(TEXTS, [0, 1, 0, 1])
    with pytest.raises(ValueError, match="layer=0 asks for hidden states within a network that is"):
        PretrainedTextExtractor(f"vectors:{path}", layer=0).fit(TEXTS)


@pytest.mark.parametrize("layer", [0, 2, -1, [1, -1]])
def test_fine_tuning_takes_numbers_of_hidden_states(layer, tmp_path):
    make_text_folder(tmp_path)
    settings = {"unfreeze": 0, "max_epochs": 0, "layer": layer, "pooling": "mean"}
    model = FineTuningClassifier(f"hf:{tmp_path}", **settings).fit(TEXTS, [0, 1, 0, 1])
    expected = extract(tmp_path, layer=layer, pooling="mean")
    np.testing.assert_allclose(model.transform(TEXTS), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"layer=9 is not in the network, which has 4 hidden"):
        model.set_params(layer=9).fit(TEXTS, [0, 1, 0, 1])
