"""rank_backbones: the table against a plain computation, and that images are read once."""

import sys

import numpy as np
import pandas as pd
import pytest
from made_cases import FLAT, SMALL, STRIPES, Filters, extractor, stripes
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image, ImageFile
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from sktransfer import PretrainedFeatureExtractor, embedding_store
from sktransfer.transferability import h_score, logme_score, rank_backbones

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def faint():
    return stripes(0)


@pytest.fixture(scope="module")
def ranking(faint):
    candidates = [extractor(Filters(FLAT)), extractor(Filters(STRIPES))]
    return rank_backbones(*faint, candidates, random_state=0)


class Rows:
    """Images that count how often each is asked for."""

    def __init__(self, images):
        self.images, self.n_read = images, np.zeros(len(images), int)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        self.n_read[i] += 1
        return self.images[i]


class Broken(Filters):
    """It computes NaN."""

    def forward(self, x):
        return super().forward(x / 0)


class Untold(Filters):
    """It does not say how its parameter is initialised."""

    def __init__(self):
        super().__init__(STRIPES)
        self.scale = nn.Parameter(self.fc.weight.data[0, 0])

    def forward(self, x):
        return self.fc(self.pool(self.conv(x) * self.scale).flatten(1))


# -- the table -------------------------------------------------------------------------------
def test_table_equals_a_plain_computation(faint, ranking):
    X, y = faint
    folds = [*StratifiedKFold(5, shuffle=True, random_state=0).split(X, y)]
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=100 / 6, max_iter=1000))
    own, random = (
        extractor(Filters(STRIPES), weights=weights).fit_transform(X).astype(float)
        for weights in ("DEFAULT", None)
    )
    scores, of_random = (cross_val_score(probe, columns, y, cv=folds) for columns in (own, random))
    row = ranking.table_.iloc[0]
    gains = scores - of_random
    assert row["score"] == pytest.approx(scores.mean())
    assert row["gain"] == pytest.approx(gains.mean())
    # Nadeau and Bengio: 1 / 5 + 16 / 64.
    assert row["gain_se"] == pytest.approx(np.sqrt(0.45 * gains.var(ddof=1)))
    assert row["score_se"] == pytest.approx(np.sqrt(0.45 * scores.var(ddof=1)))
    assert row["logme"] == pytest.approx(logme_score(own, y))
    assert row["h_score"] == pytest.approx(h_score(own, y))
    assert row["seconds"] > 0


def test_the_better_network_comes_first(ranking):
    table = ranking.table_
    assert isinstance(table, pd.DataFrame)
    assert table["score"].is_monotonic_decreasing
    assert table["gain"][0] > 0.2 > 0 > table["gain"][1]
    assert (ranking.best_.backbone.conv.weight.data[:, 0] == STRIPES).all()
    assert table["backbone"].tolist() == ["Filters #2", "Filters"]
    assert table["columns"].tolist() == [6, 6]


def test_it_prints(ranking):
    assert repr(ranking).startswith(
        "backbone    layer      columns  accuracy       gain over random"
    )
    assert "s / 1,000 rows" in repr(ranking)
    assert "<td>Filters #2</td>" in ranking._repr_html_()


def test_without_pandas(ranking, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    table = ranking.table_
    assert table["backbone"].tolist() == ["Filters #2", "Filters"]
    assert repr(table).splitlines()[0].split()[:2] == ["backbone", "layer"]
    assert table._repr_html_().count("<tr>") == 3


def test_transrate_does_not_depend_on_a_networks_scale(faint, ranking):
    scaled = rank_backbones(*faint, [extractor(Filters(10 * STRIPES))], random_state=0)
    assert scaled.table_["transrate"][0] == pytest.approx(ranking.table_["transrate"][0], rel=1e-4)


def test_a_network_that_computes_nan_comes_last(faint):
    candidates = [extractor(Broken(STRIPES)), extractor(Filters(FLAT))]
    table = rank_backbones(*faint, candidates, random_state=0).table_
    assert table["backbone"].tolist() == ["Filters", "Broken"]
    assert table.loc[1, ["score", "gain", "logme", "h_score", "transrate"]].isna().all()


def test_a_network_without_a_twin_has_no_gain(faint):
    with pytest.warns(UserWarning, match="Untold has no twin with random weights, and so no gain"):
        table = rank_backbones(*faint, [extractor(Untold())]).table_
    assert not np.isnan(table["score"][0])
    assert np.isnan(table["gain"][0])


# -- candidates ------------------------------------------------------------------------------
def test_layers_are_rows(faint):
    X, y = faint
    layers = ["conv", None, ["conv", "pool"]]
    ranking = rank_backbones(X, y, [extractor(Filters(STRIPES))], layers=layers, random_state=0)
    table = ranking.table_.set_index("layer")
    assert sorted(table.index) == ["conv", "conv + pool", "embedding"]
    assert table["columns"].to_dict() == {"conv": 6, "conv + pool": 12, "embedding": 6}
    joined = extractor(Filters(STRIPES), layer=["conv", "pool"]).fit_transform(X)
    assert table["logme"]["conv + pool"] == pytest.approx(logme_score(joined, y))
    assert ranking.best_.layer in layers


def test_stages_and_layers_by_name():
    X, y = stripes(1, n=12)
    rank = {"cv": 2, "random_state": 0, "memory": False}
    table = rank_backbones(X, y, ["builtin"], layers="stages", **rank).table_
    stages = ["stem", "stage1", "stage2", "stage3", "stage4", "embedding"]
    assert sorted(table["layer"]) == sorted(stages)
    table = rank_backbones(X, y, ["builtin"], layers=["stem", ["stem", "all"]], **rank).table_
    assert table.set_index("layer")["columns"].to_dict() == {
        "stem": 32,
        "stem + stage1 + stage2 + stage3 + embedding": 32 + 48 + 96 + 192 + 1408,
    }
    candidates = ["builtin", extractor(Filters(STRIPES))]
    layers = {"builtin": ["stem"], "Filters": "conv"}
    table = rank_backbones(X, y, candidates, layers=layers, **rank).table_
    assert table.set_index("backbone")["layer"].to_dict() == {"builtin": "stem", "Filters": "conv"}
    with pytest.raises(ValueError, match=r"layers names \['resnet18'\], and the backbones are"):
        rank_backbones(X, y, candidates, layers={"resnet18": ["stem"]}, **rank)


def test_a_list_of_weights():
    X, y = stripes(1, n=12)
    table = rank_backbones(X, y, ["builtin"] * 2, weights=["DEFAULT", None], cv=2).table_
    table = table.set_index("backbone")
    assert table["gain"]["builtin, weights=None"] == 0  # it is its own twin


def test_labels_say_what_differs(faint):
    X, y = faint
    network = Filters(STRIPES)
    own = {"layer": "conv", "pooling": "max", "preprocessing": {"size": 32}}
    candidates = [extractor(network, **k) for k in ({}, own, {}, {"layer": "conv"})]
    for candidate in candidates[::2]:
        candidate.set_params(preprocessing="auto")
    ranking = rank_backbones(X, y, candidates, cv=2, random_state=0)
    names = ["Filters", "Filters, size=32, pooling=max", "Filters #2"]
    names.append("Filters, size=24, crop=24")
    shown = zip(ranking.table_["backbone"], ranking.table_["layer"], strict=True)
    layers = ["embedding", "conv", "embedding", "conv"]
    assert sorted(shown) == sorted(zip(names, layers, strict=True))


def test_an_extractor_brings_its_settings(faint):
    X, y = faint
    flat = X.reshape(len(X), -1)
    given = extractor(Filters(STRIPES), image_shape=(24, 24, 3))
    ranking = rank_backbones(flat, y, [given, Filters(FLAT)], random_state=0)
    assert [own.image_shape for own in ranking.extractors_] == [(24, 24, 3)] * 2
    assert ranking.table_["score"][0] > 0.9


def test_images_are_read_with_the_value_range_of_an_extractor(faint):
    X, y = faint
    wide = X.astype(float) * 1000 / 255
    given = extractor(Filters(STRIPES), value_range=(0, 1000))
    ranking = rank_backbones(wide, y, [Filters(FLAT), given], cv=2, random_state=0)
    assert [own.value_range for own in ranking.extractors_] == [(0, 1000)] * 2
    logme = ranking.table_.set_index("backbone")["logme"].max()
    assert logme == pytest.approx(logme_score(given.fit_transform(wide), y))


# -- targets ---------------------------------------------------------------------------------
@pytest.mark.parametrize("names", [[-1, 1], [0, 7], [True, False], np.array([3, 9], dtype=object)])
def test_labels_of_any_type(faint, ranking, names):
    X, y = faint
    labels = np.asarray(names)[(y == "down").astype(int)]
    got = rank_backbones(X, labels, [extractor(Filters(STRIPES))], random_state=0)
    assert got.table_["score"][0] == pytest.approx(ranking.table_["score"][0])
    assert got.table_["logme"][0] == pytest.approx(ranking.table_["logme"][0])


@pytest.mark.parametrize("dtype", [float, int, object, "Float64"])
def test_regression(dtype):
    X, y = stripes(0, contrast=25)
    prices = np.random.default_rng(0).permutation(80) * 3 + (y == "down") * 1000
    prices = pd.Series(prices).astype(dtype)
    ranking = rank_backbones(X, prices, [extractor(Filters(STRIPES))], random_state=0)
    assert ranking.score_name == "R²"
    assert ranking.table_["score"][0] > 0.9
    assert ranking.table_["gain"][0] > 0
    assert ranking.table_[["h_score", "transrate"]].isna().all(axis=None)
    assert np.isfinite(ranking.table_["logme"][0])


def test_a_scorer_of_regressors_means_regression():
    X, y = stripes(0)
    stars = (y == "down").astype(int) * 4 + 1
    scoring = "neg_mean_absolute_error"
    ranking = rank_backbones(X, stars, [extractor(Filters(STRIPES))], scoring=scoring)
    assert -2 < ranking.table_["score"][0] < 0
    assert ranking.score_name == scoring


def test_groups_and_splitters(faint):
    X, y = faint
    groups = np.array(list("zebrafoxAO"))[np.arange(80) // 8]
    folds = [*GroupKFold(4).split(X, y, groups)]
    a, b = (
        rank_backbones(X, y, [extractor(Filters(STRIPES))], cv=cv, groups=groups).table_
        for cv in (GroupKFold(4), [(np.isin(np.arange(80), train), test) for train, test in folds])
    )
    assert a["score"][0] == b["score"][0]
    unknown = [None, *groups[1:]]
    rank_backbones(X, y, [extractor(Filters(STRIPES))], cv=4, groups=unknown)
    c = rank_backbones(X, y, [extractor(Filters(STRIPES))], cv=4, groups=groups, scoring="roc_auc")
    assert c.table_["score"][0] > 0.9


# -- one reading -----------------------------------------------------------------------------
def test_each_image_is_read_and_decoded_once(faint, monkeypatch, tmp_path):
    X, y = faint
    paths = [tmp_path / f"{i}.jpg" for i in range(len(X))]
    for path, image in zip(paths, X, strict=True):
        Image.fromarray(image).resize((130, 100)).save(path)
    rows, decoded = Rows(paths), []
    load_end = ImageFile.ImageFile.load_end
    monkeypatch.setattr(
        ImageFile.ImageFile, "load_end", lambda image: decoded.append(1) or load_end(image)
    )
    candidates = [extractor(Filters(weight), memory=False) for weight in (FLAT, STRIPES)]
    rank_backbones(rows, y, candidates)
    assert set(rows.n_read[1:]) == {1}
    assert rows.n_read[0] <= 2  # the first says what the container holds
    assert len(decoded) == len(X)


def test_rows_are_those_of_the_extractor(faint, tmp_path):
    X, y = faint
    large = [Image.fromarray(image).resize((900, 700)) for image in X[:6]]
    paths = [str(tmp_path / f"{i}.jpg") for i in range(6)]
    for path, image in zip(paths, large, strict=True):
        image.save(path)
    # Networks of different sizes decode such files at different reductions.
    sizes = [{"size": size, "crop": size} for size in (24, 100, 400)]
    made = [PretrainedFeatureExtractor(Filters(STRIPES), preprocessing=size) for size in sizes]
    rank_backbones(paths, y[:6], made, cv=2, memory=tmp_path)
    n_rows = len(embedding_store(tmp_path))
    for own in made:
        alone = own.set_params(memory=False).fit_transform(paths)
        kept = own.set_params(memory=tmp_path).fit_transform(paths)
        assert_allclose(alone, kept, rtol=1e-5)
    assert len(embedding_store(tmp_path)) == n_rows  # nothing was computed again


def test_verbose_shows_one_bar_over_all_images(capsys):
    X, y = stripes(0, n=100)
    rank_backbones(X, y, [Filters(FLAT), extractor(Filters(STRIPES), verbose=1)], cv=2)
    bars = capsys.readouterr().err
    assert "100/100" in bars
    assert "64/64" not in bars


def test_several_image_columns(faint):
    X, y = faint
    frame = pd.DataFrame({"front": list(X[::2]), "back": list(X[1::2])})
    target = np.random.default_rng(0).permutation(y[::2].repeat(2)[: len(frame)])
    target[:20] = "down"
    got = rank_backbones(frame, target, [extractor(Filters(STRIPES))]).table_
    assert got["columns"][0] == 12
    columns = extractor(Filters(STRIPES)).fit_transform(frame)
    assert got["logme"][0] == pytest.approx(logme_score(columns, target))


def test_one_random_state_repeats_the_ranking(faint, ranking):
    again = rank_backbones(
        *faint, [extractor(Filters(FLAT)), extractor(Filters(STRIPES))], random_state=0
    )
    for name in ("score", "gain", "gain_se"):
        assert_array_equal(again.table_[name], ranking.table_[name])


# -- errors ----------------------------------------------------------------------------------
def test_unreadable_images_are_listed(faint):
    X, y = faint
    images = [*X[:10], None, *X[11:20], b"no image", *X[21:]]
    with pytest.raises(ValueError, match="2 of 80 images could not be read:\n  row 10 ") as error:
        rank_backbones(images, y, [extractor(Filters(FLAT)), extractor(Filters(STRIPES))])
    assert [bad.row for bad in error.value.bad_images] == [10, 20]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbones": "builtin"}, "backbones='builtin' must be a list"),
        ({"backbones": []}, "must be a list with at least one backbone"),
        ({"weights": ["DEFAULT", None]}, "weights has 2 entries and backbones 1"),
        ({"y": ["a"] * 80}, "y must have at least two classes"),
        ({"y": ["a", None] * 40}, "y holds missing labels in 40 of 80 rows: 1, 3"),
        ({"y": [*np.linspace(0, 1, 79), np.nan]}, "y holds NaN or infinity in 1 of 80 rows: 79"),
        ({"y": ["a", "b"]}, "inconsistent numbers of samples"),
        ({"y": np.eye(80, 2, dtype=int)}, r"y must hold one label a row, or numbers; .* \(80, 2\)"),
        ({"y": [2.5] * 80}, "y must have at least two values; all are 2.5"),
        ({"groups": [1, 2]}, r"groups has shape \(2,\); it needs a label for each of 80 rows"),
        ({"scoring": "f9"}, "f9"),
        ({"cv": iter([])}, "cv has no folds. A generator gives its folds once"),
        ({"layers": ["conv9"]}, "conv9"),
        (
            {
                "backbones": [
                    extractor(Filters(), image_shape=(8, 8)),
                    extractor(Filters(), image_shape=(4, 16)),
                ]
            },
            "image_shape differ",
        ),
        (
            {"backbones": [extractor(Filters(), value_range=(0, k)) for k in (1, 9)]},
            r"value_range differ: \[\(0, 1\), \(0, 9\)\]",
        ),
    ],
)
def test_errors(faint, change, message):
    X, y = faint
    arguments = {"y": y, "backbones": [extractor(Filters(STRIPES))], **change}
    with pytest.raises(ValueError, match=message):
        rank_backbones(X, arguments.pop("y"), arguments.pop("backbones"), **arguments)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"scoring": "f1"}, "pos_label=1 is not a valid label"),
        ({"scoring": ["accuracy"]}, r"scoring=\['accuracy'\]: the name of one scorer"),
        ({"cv": [(np.arange(0, 80, 2), np.arange(1, 80, 2))]}, "at least 2 classes"),
    ],
)
def test_what_cannot_be_scored_is_found_before_an_image_is_read(faint, change, error):
    X, y = faint
    rows = Rows(list(X))
    with pytest.raises((TypeError, ValueError), match=error):
        rank_backbones(rows, y, [extractor(Filters(STRIPES), memory=False)], **change)
    assert rows.n_read[1:].max() == 0


def test_settings_reach_the_candidates():
    X, y = stripes(0, n=20)
    ranking = rank_backbones(X, y, [Filters], memory=False, cv=2)
    assert ranking.best_.memory is False
    assert ranking.table_["backbone"][0] == "Filters"
    assert SMALL["preprocessing"] != ranking.best_.preprocessing
