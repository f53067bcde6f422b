"""Folders of tiny random networks of transformers, as `save_pretrained` writes them."""

import json

import torch

from sktransfer.networks._inference import clear_networks  # noqa: F401, for the tests

_WORDS = "a good bad film is very the not dull fine"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *_WORDS.split(" ")]
SIZES = {
    "vocab_size": len(WORDS) + 2,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
TEXT_CONFIGS = {
    "Bert": SIZES,
    "Roberta": SIZES | SPECIAL | {"max_position_embeddings": 40},
    "GPT2": {"vocab_size": 16, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 40},
    "T5": {"vocab_size": 16, "d_model": 16, "d_ff": 32, "num_layers": 3, "num_heads": 2, "d_kv": 8},
    "Albert": SIZES | {"embedding_size": 8},  # one block, used again and again
    "MobileBert": SIZES
    | {"embedding_size": 16, "true_hidden_size": 16}  # rows see the padding
    | {"intra_bottleneck_size": 16, "num_feedforward_networks": 1},
    "SqueezeBert": SIZES
    | {"embedding_size": 16}  # always calls its pooler
    | {f"{k}_groups": 1 for k in ("q", "k", "v", "post_attention", "intermediate", "output")},
    "XLNet": {"vocab_size": 16, "d_model": 16, "n_layer": 3, "n_head": 2, "d_inner": 32},
}


def make_text_folder(path, kind="Bert", *, specials=True, sentences=None, suffix="Model"):
    """Write a network for texts with a tokenizer of words; `sentences`: its pooling."""
    import tokenizers
    import transformers

    torch.manual_seed(7)
    config = getattr(transformers, f"{kind}Config")(**TEXT_CONFIGS[kind])
    getattr(transformers, f"{kind}{suffix}")(config).save_pretrained(path)
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if specials:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    if sentences:
        modules = [
            {"type": f"sentence_transformers.models.{kind}", "path": f"{i}_{kind}" if i else ""}
            for i, kind in enumerate(sentences["modules"])
        ]
        (path / "modules.json").write_text(json.dumps(modules))
        (path / "1_Pooling").mkdir()
        (path / "1_Pooling" / "config.json").write_text(json.dumps(sentences["pooling"]))
    return path
