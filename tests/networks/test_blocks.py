"""Stages of transformers' models: the same numbers as the model, without hooks."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiny_transformers
import torch

from sktransfer.networks._blocks import BlockPlan
from sktransfer.networks._text import TextModel

transformers = pytest.importorskip("transformers")

SIZES = {**tiny_transformers.SIZES, "vocab_size": 90}
CONFIGS = {
    "Bert": SIZES,
    "Roberta": SIZES,
    "DistilBert": {"vocab_size": 90, "dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 32},
    "MPNet": SIZES,
    "GPT2": {"vocab_size": 90, "n_embd": 16, "n_layer": 3, "n_head": 2},
    "ModernBert": {**SIZES, **tiny_transformers.SPECIAL, "cls_token_id": 1, "sep_token_id": 2},
    "Llama": SIZES,
    "Gemma2": {**SIZES, "num_key_value_heads": 2, "head_dim": 8},
    "DebertaV2": SIZES,
    "Electra": {**SIZES, "embedding_size": 8},
}
UNSPLIT = {
    "Albert": {**SIZES, "embedding_size": 8},  # one block, used again and again
}


def make_model(name, settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    recipe = {"pooling": "avg", "padding": 0, "method": "forward"}
    made = TextModel(getattr(transformers, f"{name}Model")(config).eval(), recipe)
    made.ready()
    return made


def make_ids():
    ids = torch.randint(3, 90, (4, 7), generator=torch.Generator().manual_seed(1))
    ids[1, 4:] = ids[2, 1:] = -1
    return ids


@pytest.mark.parametrize("name", [*CONFIGS, *UNSPLIT])
def test_stages_compute_what_the_model_does(name):
    settings = (CONFIGS | UNSPLIT)[name]
    model = make_model(name, settings)
    torch.manual_seed(0)
    alone = getattr(transformers, f"{name}Model")(
        getattr(transformers, f"{name}Config")(**settings)
    ).eval()
    ids = make_ids()
    mask = (ids >= 0).long()
    with torch.no_grad():
        hidden = alone(input_ids=ids.clamp(min=0), attention_mask=mask).last_hidden_state
        expected = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        plan = BlockPlan(model, (7,), name)
        got = plan.stages().run(ids)
        extracted = plan.extractor(["pool"], [torch.nn.Identity()])(ids)[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(extracted, expected, rtol=1e-4, atol=1e-5)
    blocks = [f"block{k}" for k in range(3)]
    assert plan.names == (["body"] if name in UNSPLIT else ["embeddings", *blocks, "pool"])


def test_stages_hold_each_parameter_once():
    model = make_model("Bert", CONFIGS["Bert"])
    stages = BlockPlan(model, (7,), "Bert").stages()
    found = [id(p) for stage in stages for p in stage.module.parameters()]
    assert len(found) == len(set(found))
    assert set(found) == set(map(id, model.parameters()))


def test_gradients_reach_the_trained_stages_only():
    model = make_model("Bert", CONFIGS["Bert"])
    stages = BlockPlan(model, (7,), "Bert").stages()
    trained = [*stages[2].module.parameters(), *stages[3].module.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    stages.run(make_ids()).sum().backward()
    assert all(p.grad is not None for p in trained)
    assert sum(p.grad is not None for p in model.parameters()) == len(trained)


def test_threads_do_not_mix():
    model = make_model("GPT2", CONFIGS["GPT2"])
    extractor = BlockPlan(model, (7,), "GPT2").extractor(["pool"], [torch.nn.Identity()])
    batches = [make_ids()[:, :n] for n in range(1, 8)] * 4

    def run(ids):
        with torch.inference_mode():
            return extractor(ids)[0].numpy()

    expected = [run(ids) for ids in batches]
    with ThreadPoolExecutor(4) as pool:
        for got, wanted in zip(pool.map(run, batches), expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_layers_are_the_hidden_states():
    model = make_model("Bert", CONFIGS["Bert"])
    torch.manual_seed(0)
    alone = transformers.BertModel(transformers.BertConfig(**CONFIGS["Bert"])).eval()
    ids = make_ids()
    mask = (ids >= 0).long()
    with torch.no_grad():
        inputs = {"input_ids": ids.clamp(min=0), "attention_mask": mask}
        hidden = alone(**inputs, output_hidden_states=True).hidden_states
        keys = ["embeddings", "block0", "block1", "last_states"]
        values = model.values(ids, keys)
    for key, expected in zip(keys, hidden, strict=True):
        torch.testing.assert_close(values[key][..., :-1], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(values[key][..., -1], mask.float())
