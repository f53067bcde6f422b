"""Folders of tiny random networks of texts, as save_pretrained of transformers writes them."""

import json

import numpy as np
import tokenizers
import torch
import transformers

WORDS = [f"w{i}" for i in range(20)] + ["good", "bad"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 24,
    "initializer_range": 0.3,
}
CONFIGS = {
    "Bert": SIZES,
    "GPT2": {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 24, "initializer_range": 0.3},
    "Albert": {**SIZES, "embedding_size": 8},  # one block, used again and again: not split
}


def write_network(folder, kind="Bert", **settings):
    """Write a network and its tokenizer, which knows WORDS; return its name."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if kind != "GPT2":
        ends = [(word, vocabulary[word]) for word in ("[CLS]", "[SEP]")]
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=ends
        )
    torch.manual_seed(1)
    settings = {"vocab_size": len(vocabulary), **CONFIGS[kind], **settings}
    config = getattr(transformers, f"{kind}Config")(**settings)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 12}))
    return f"hf:{folder}"


def make_texts(n, seed=0):
    """Texts of 1 to 16 words, and whether the one that counts is "good"; the others say nothing."""
    rng = np.random.RandomState(seed)
    y = rng.randint(0, 2, n)
    texts = []
    for label in y:
        words = list(rng.choice(WORDS[:20], rng.randint(0, 8)))
        words.insert(rng.randint(0, len(words) + 1), ["bad", "good"][label])
        texts.append(" ".join(words))
    return texts, np.array(["no", "yes"])[y]
