"""Fine-tuning networks of texts."""

import pickle
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from tiny_transformers import make_text_folder

from sktransfer import FineTuningClassifier, FineTuningRegressor, load, save, to_module
from sktransfer.fine_tuning import _inputs

transformers = pytest.importorskip("transformers")

# Whether texts begin and end with a special token.
KINDS = {"Bert": True, "GPT2": False, "T5": True}
OTHERS = ["a", "film", "is", "very", "the", "not", "dull", "fine"]


def make_texts(n, seed=0):
    """Texts of 2 to 8 words, and whether "good" comes before "bad"; the others say nothing."""
    rng = np.random.RandomState(seed)
    y = rng.randint(0, 2, n)
    texts = []
    for label in y:
        words = list(rng.choice(OTHERS, 8))
        first, second = sorted(rng.choice(8, 2, replace=False))
        words[first], words[second] = ("good", "bad") if label else ("bad", "good")
        texts.append(" ".join(words[: rng.randint(second + 1, 9)]))
    return texts, np.array(["no", "yes"])[y]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Names of the tiny networks by their kind."""
    made = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    return {k: f"hf:{make_text_folder(made[k], k, specials=s)}" for k, s in KINDS.items()}


@pytest.fixture
def bert(folders):
    return folders["Bert"]


@pytest.fixture(scope="module")
def data():
    return make_texts(60)


def tuned(name, cls=FineTuningClassifier, **parameters):
    settings = {"max_epochs": 4, "lr": 1e-2, "layer_decay": 1.0, "random_state": 0, "unfreeze": 1}
    return cls(name, **{**settings, **parameters})


def naive_rows(name, texts, pooling):
    """One text after another through transformers' own model."""
    from tokenizers import Tokenizer

    folder = name.removeprefix("hf:")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    model = model.get_encoder() if model.config.is_encoder_decoder else model
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    rows = []
    for text in texts:
        with torch.no_grad():
            ids = torch.tensor([tokenizer.encode(text).ids])
            hidden = model(input_ids=ids).last_hidden_state[0]
        values = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}
        values["max"] = hidden.max(0).values
        rows.append(values[pooling].numpy())
    return np.stack(rows)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "max"])
def test_frozen_columns_are_the_models_own(folders, data, kind, pooling):
    X, y = data
    model = tuned(folders[kind], unfreeze=0, pooling=pooling, max_epochs=1).fit(X, y)
    expected = naive_rows(folders[kind], X, pooling)
    np.testing.assert_allclose(model.transform(X), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("unfreeze", [1, "all"])
def test_training_learns_what_the_probe_cannot(folders, data, kind, unfreeze):
    X, y = data
    probe = tuned(folders[kind], unfreeze=0, max_epochs=0).fit(X, y)
    model = tuned(folders[kind], unfreeze=unfreeze, max_epochs=8).fit(X, y)
    losses = [log_loss(y, m.predict_proba(X)) for m in (model, probe)]
    assert losses[0] < losses[1]
    np.testing.assert_allclose(model.predict_proba(X).sum(axis=1), 1)
    assert not np.allclose(model.transform(X), probe.transform(X), atol=1e-3)


@pytest.mark.parametrize("pooling", ["auto", "cls"])
@pytest.mark.parametrize(
    ("kind", "layer"), [("Bert", None), ("GPT2", "block1"), ("Bert", ["block0", None])]
)
def test_kept_outputs_of_frozen_stages_change_nothing(
    folders, data, kind, layer, pooling, monkeypatch
):
    X, y = data
    settings = {"layer": layer, "pooling": pooling, "memory": False, "max_epochs": 2}
    kept = tuned(folders[kind], **settings).fit(X, y)
    monkeypatch.setattr(_inputs, "MAX_KEPT_BYTES", 0)
    computed = tuned(folders[kind], **settings).fit(X, y)
    np.testing.assert_allclose(
        kept.decision_function(X), computed.decision_function(X), rtol=1e-3, atol=1e-4
    )
    losses = [[row["train_loss"] for row in model.history_] for model in (kept, computed)]
    np.testing.assert_allclose(*losses, rtol=1e-3)


def test_the_trained_network_predicts_what_training_computed(bert, data):
    X, y = data
    model = tuned(bert, unfreeze="all").fit(X, y)
    ids = model.backbone_.preprocessing.join(
        [torch.from_numpy(model.backbone_.preprocessing.prepare(text)) for text in X]
    )
    with torch.no_grad():
        scores = model.net_.module_.eval()(ids[:, None])
    expected = scores[:, 1] - scores[:, 0]
    np.testing.assert_allclose(model.decision_function(X), expected, rtol=1e-4, atol=1e-4)


def test_what_is_frozen_stays_as_it_was(bert, data):
    X, y = data
    model = tuned(bert, unfreeze=2).fit(X, y)
    module, fresh = model.net_.module_, model.backbone_.stages
    changed = [
        any(
            not torch.equal(a, b)
            for a, b in zip(own.parameters(), stage.module.parameters(), strict=True)
        )
        for own, stage in zip(module.stages, fresh, strict=True)
    ]
    assert changed == [False, False, True, True, False]
    assert module.stage_names == ["embeddings", "block0", "block1", "block2", "pool"]


def test_dropout_acts_in_trained_stages_alone(bert, data):
    module = tuned(bert, unfreeze=1).fit(*data).net_.module_.train()
    acting = [
        any(part.training for part in stage.modules() if isinstance(part, torch.nn.Dropout))
        for stage in module.stages
    ]
    assert acting == [False, False, False, True, False]


@pytest.mark.parametrize("unfreeze", [1, "all", "gradual", {2: 1, 3: "all"}])
def test_a_fit_repeats(bert, data, unfreeze):
    X, y = data
    first, second = (tuned(bert, unfreeze=unfreeze).fit(X, y) for _ in range(2))
    np.testing.assert_array_equal(first.decision_function(X), second.decision_function(X))


def test_the_order_of_rows_and_the_texts_beside_have_no_effect(bert, data):
    X, y = map(np.asarray, data)
    order = np.random.RandomState(0).permutation(len(X))
    first, second = tuned(bert).fit(X, y), tuned(bert).fit(X[order], y[order])
    wanted = first.decision_function(X)
    np.testing.assert_allclose(wanted, second.decision_function(X), rtol=1e-4, atol=1e-5)
    alone = np.concatenate([first.decision_function([text]) for text in X])
    np.testing.assert_allclose(wanted, alone, rtol=1e-4, atol=1e-5)


def test_halved_batches_give_the_same_model(tmp_path, data):
    X, y = data
    config = make_text_folder(tmp_path) / "config.json"  # dropout draws otherwise for parts
    config.write_text(re.sub(r'(dropout_prob": )0\.1', r"\g<1>0.0", config.read_text()))
    name = f"hf:{tmp_path}"
    whole, parts = (
        tuned(name, unfreeze=2, max_epochs=1, callbacks=callbacks).fit(X, y)
        for callbacks in ([], [Halve()])
    )
    np.testing.assert_allclose(
        whole.decision_function(X), parts.decision_function(X), rtol=1e-3, atol=1e-3
    )


class Halve(pytest.importorskip("skorch").callbacks.Callback):
    """Runs three texts at once, as after an out-of-memory error."""

    def on_train_begin(self, net, **kwargs):
        net.module_.most_at_once = 3


def test_numbers_are_learnt(bert, data):
    X, _ = data
    y = np.array([text.split().count("the") / len(text.split()) for text in X])
    model = tuned(bert, FineTuningRegressor, unfreeze="all", max_epochs=8).fit(X, y)
    assert model.score(X, y) > 0.5


def test_several_columns(bert, data):
    X, y = data
    frame = pd.DataFrame({"title": X[::-1], "text": X})
    model = tuned(bert).fit(frame, y)
    assert model.transform(frame).shape == (60, 32)
    names = model.get_feature_names_out()
    assert [name.partition("_")[0] for name in names[15:17]] == ["title", "text"]
    with pytest.raises(ValueError, match=r"1 text column\(s\), but .* fitted on 2 columns"):
        model.predict(X)


def test_missing_texts(bert, data):
    X, y = list(data[0]), data[1]
    X[3], X[5] = None, float("nan")
    message = r"2 of 60 rows cannot be used for training, as a text could not be read:\n  row 3"
    with pytest.raises(ValueError, match=message):
        tuned(bert).fit(X, y)
    skipping = tuned(bert, on_error="skip")
    with pytest.warns(UserWarning, match="2 of 60 rows are left out of training, as a text"):
        skipping.fit(X, y)
    assert [bad.row for bad in skipping.bad_images_] == [3, 5]
    with pytest.warns(UserWarning, match="as a text could not be read"):
        proba = skipping.predict_proba(X)
    np.testing.assert_allclose(proba[3], skipping.class_priors_)


def test_texts_without_tokens(folders, data):
    X, y = data
    model = tuned(folders["GPT2"], unfreeze="all").fit(["", *X], ["no", *y])
    assert np.isfinite(model.predict_proba(["", " ", "very " * 30])).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("augment", "light"),
        ("image_shape", (8, 8)),
        ("value_range", (0, 1)),
        ("preprocessing", {"size": 64}),
    ],
)
def test_parameters_of_images_are_refused(bert, data, name, value):
    with pytest.raises(ValueError, match=f"{name}=.* is for images, but backbone='hf:.*` out"):
        tuned(bert, **{name: value}).fit(*data)


def test_poolings_of_images_are_refused(bert, data):
    with pytest.raises(ValueError, match=r"pooling='gem' is not accepted for texts: one of"):
        tuned(bert, pooling="gem").fit(*data)
    of_images = FineTuningClassifier(pooling="last", unfreeze=0, image_shape=(8, 8))
    with pytest.raises(ValueError, match="pooling='last' is not accepted: one of"):
        of_images.fit(np.zeros((4, 64)), [0, 0, 1, 1])


def test_layers_are_listed(bert, data):
    with pytest.raises(ValueError, match=r"layer='block7' .*'block2', 'pool'\]\.$"):
        tuned(bert, layer="block7").fit(*data)


@pytest.mark.parametrize("X", [[[1.0, 2.0]] * 60, np.zeros((60, 3)), [b"\xff"] * 60, "a film"])
def test_what_is_no_text_is_refused(bert, data, X):
    with pytest.raises((TypeError, ValueError), match=r"text|UTF-8"):
        tuned(bert).fit(X, data[1])


def test_copies(bert, data):
    X, y = data
    model = tuned(bert).fit(X, y)
    pickled = pickle.dumps(model)
    assert len(pickled) < 40_000
    np.testing.assert_array_equal(
        pickle.loads(pickled).decision_function(X), model.decision_function(X)
    )
    assert "_tuned" not in vars(clone(model))


@pytest.mark.parametrize("kind", ["Bert", "GPT2"])
@pytest.mark.parametrize("settings", [{}, {"unfreeze": 0}, {"pooling": "cls"}])
@pytest.mark.parametrize("is_standalone", [False, True])
def test_files(tmp_path, data, kind, settings, is_standalone):
    X, y = data
    name = f"hf:{make_text_folder(tmp_path / 'network', kind)}"
    model = tuned(name, **settings).fit(X, y)
    save(model, tmp_path / "model.safetensors", standalone=is_standalone)
    expected = model.decision_function(X)
    if is_standalone:
        shutil.rmtree(tmp_path / "network")
    loaded = load(tmp_path / "model.safetensors", trusted=[name])
    np.testing.assert_allclose(loaded.decision_function(X), expected, rtol=1e-5, atol=1e-6)


def test_texts_are_not_exported(bert, data):
    with pytest.raises(ValueError, match="takes texts, and what is exported takes images"):
        to_module(tuned(bert, unfreeze=0, max_epochs=0).fit(*data))


def test_partial_fit_continues(bert, data):
    X, y = data
    model = tuned(bert)
    for _ in range(3):
        model.partial_fit(X, y)
    again = pickle.loads(pickle.dumps(model)).partial_fit(X, y)
    model.partial_fit(X, y)
    assert model.n_iter_ == 4
    np.testing.assert_allclose(
        model.decision_function(X), again.decision_function(X), rtol=1e-4, atol=1e-5
    )


def test_a_validation_part_chooses_the_epoch(bert, data):
    X, y = data
    X_val, y_val = make_texts(30, seed=1)
    model = tuned(bert, max_epochs=3).fit(X, y, X_val=X_val, y_val=y_val)
    scores = [row["valid_score"] for row in model.history_]
    assert model.score(X_val, y_val) == pytest.approx(max(scores))


def test_random_weights(bert, data):
    X, y = data
    columns = [
        tuned(bert, weights=weights, unfreeze=0, max_epochs=0).fit(X, y).transform(X)
        for weights in ("DEFAULT", None, None)
    ]
    np.testing.assert_array_equal(columns[1], columns[2])
    assert not np.allclose(columns[0], columns[1], atol=1e-2)


def test_bfloat16(bert, data):
    X, y = data
    model = tuned(bert, precision="bfloat16", unfreeze=2).fit(X, y)
    assert np.isfinite(model.predict_proba(X)).all()


def test_in_a_pipeline(bert, data):
    X, y = data
    upper = FunctionTransformer(lambda texts: [text.replace("nice", "good") for text in texts])
    model = make_pipeline(upper, tuned(bert)).fit(X, y)
    assert set(model.predict(["a nice film"])) <= {"no", "yes"}
