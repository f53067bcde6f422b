"""The extractor among scikit-learn's estimators."""

import numpy as np
import pandas as pd
import polars as pl
import pytest
from PIL import Image
from sklearn import config_context
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer, make_column_transformer
from sklearn.ensemble import RandomForestClassifier, StackingClassifier
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.model_selection import GridSearchCV, HalvingGridSearchCV, cross_val_score
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import StandardScaler

from sktransfer import PretrainedFeatureExtractor


def test_feature_names(picture_files):
    frame = pd.DataFrame({"front": picture_files[:2], "back": picture_files[2:4]})
    extractor = PretrainedFeatureExtractor(layer=["stage1", "stage2"]).fit(frame)
    names = extractor.get_feature_names_out()
    assert len(names) == extractor.n_features_out_ == len(set(names))
    assert names[0] == "front_builtin_stage1_000"
    assert names[-1].startswith("back_builtin_stage2_")
    assert PretrainedFeatureExtractor().fit(picture_files).get_feature_names_out()[7] == (
        "builtin_0007"
    )


@pytest.mark.parametrize("container", ["pandas", "polars"])
def test_set_output(picture_files, container):
    frame_of = pd.DataFrame if container == "pandas" else pl.DataFrame
    frame = frame_of({"photo": picture_files})
    extractor = PretrainedFeatureExtractor().set_output(transform=container)
    out = extractor.fit_transform(frame)
    assert isinstance(out, frame_of)
    assert out.columns[7] == "photo_builtin_0007"
    np.testing.assert_array_equal(
        out.to_numpy(), PretrainedFeatureExtractor().fit_transform(picture_files)
    )


@pytest.mark.parametrize("selector", ["path", ["path"]])
def test_column_transformer(picture_files, selector):
    frame = pd.DataFrame({"path": picture_files, "size": np.arange(12.0)}).iloc[::-1]
    columns = ColumnTransformer(
        [("image", PretrainedFeatureExtractor(), selector), ("rest", "passthrough", ["size"])]
    ).set_output(transform="pandas")
    out = columns.fit_transform(frame)
    assert list(out.index) == list(frame.index)
    assert out.columns[0] == "image__path_builtin_0000"
    assert not out.isna().any().any()
    expected = PretrainedFeatureExtractor().fit_transform(list(frame["path"]))
    np.testing.assert_array_equal(out.iloc[:, :-1].to_numpy(), expected)


def test_feature_union(pictures):
    union = FeatureUnion(
        [
            ("low", PretrainedFeatureExtractor(layer="stage1")),
            ("high", PretrainedFeatureExtractor()),
        ]
    )
    low, high = (t.fit(pictures).n_features_out_ for _, t in union.transformer_list)
    assert union.fit_transform(pictures).shape == (12, low + high)


def test_grid_over_backbone_layer_and_pooling(pictures, labels):
    pipe = make_pipeline(PretrainedFeatureExtractor(), StandardScaler(), LogisticRegression())
    grid = [
        {"pretrainedfeatureextractor__layer": ["stage2", None, ["stage1", "stage4"]]},
        {"pretrainedfeatureextractor__pooling": ["avg", "max"]},
        {
            "pretrainedfeatureextractor__backbone": ["squeezenet1_1"],
            "pretrainedfeatureextractor__weights": [None],
            "pretrainedfeatureextractor__preprocessing": [{"size": 32, "crop": 32}],
        },
    ]
    search = GridSearchCV(pipe, grid, cv=2, error_score="raise").fit(pictures, labels)
    assert len(search.cv_results_["params"]) == 6


def test_search_in_two_processes(pictures, labels, tmp_path):
    pipe = make_pipeline(PretrainedFeatureExtractor(memory=tmp_path), LogisticRegression())
    scores = []
    for n_jobs in (1, 2):
        search = GridSearchCV(
            pipe, {"logisticregression__C": [0.1, 1]}, cv=2, n_jobs=n_jobs, error_score="raise"
        )
        scores.append(search.fit(pictures, labels).cv_results_["mean_test_score"])
    np.testing.assert_array_equal(scores[0], scores[1])


def test_halving_search(pictures, labels):
    pipe = make_pipeline(PretrainedFeatureExtractor(), LogisticRegression())
    many = np.concatenate([pictures] * 4)
    search = HalvingGridSearchCV(
        pipe, {"logisticregression__C": [0.01, 0.1, 1, 10]}, cv=2, random_state=0
    )
    assert search.fit(many, np.tile(labels, 4)).predict(pictures).shape == (12,)


def test_stacking_calibration_and_frozen(picture_files, labels):
    frame = pd.DataFrame({"path": picture_files, "size": np.arange(12.0)})
    images = make_pipeline(
        make_column_transformer((PretrainedFeatureExtractor(), ["path"])), LogisticRegression()
    )
    numbers = make_pipeline(
        make_column_transformer(("passthrough", ["size"])), RandomForestClassifier(5)
    )
    stack = StackingClassifier([("images", images), ("numbers", numbers)], cv=2)
    assert stack.fit(frame, labels).predict(frame).shape == (12,)
    calibrated = CalibratedClassifierCV(images, cv=2).fit(frame, labels)
    np.testing.assert_allclose(calibrated.predict_proba(frame).sum(axis=1), 1)
    frozen = FrozenEstimator(PretrainedFeatureExtractor().fit(picture_files))
    pipe = make_pipeline(frozen, LogisticRegression()).fit(picture_files, labels)
    assert pipe.predict(picture_files).shape == (12,)


def test_pixels_lose_to_features_on_disjoint_quarters():
    """Transfer helps: features tell photographs apart where pixels do not."""
    skimage_data = pytest.importorskip("skimage.data")
    names = ["brick", "camera", "cat", "coffee", "coins", "grass", "gravel", "rocket"]
    crops, y, quarter = [], [], []
    rng = np.random.default_rng(0)
    for label, name in enumerate(names):
        grey = np.asarray(Image.fromarray(getattr(skimage_data, name)()).convert("L"))
        height, width = grey.shape[0] // 2, grey.shape[1] // 2
        for q in range(4):
            for _ in range(4):
                top = (q // 2) * height + rng.integers(height - 80)
                left = (q % 2) * width + rng.integers(width - 80)
                crops.append(grey[top : top + 80, left : left + 80])
                y.append(label)
                quarter.append(q)
    X = np.stack(crops)
    folds = [
        (np.flatnonzero(np.array(quarter) != q), np.flatnonzero(np.array(quarter) == q))
        for q in range(4)
    ]
    scores = {}
    for name, parameters in {"trained": {}, "random": {"weights": None}}.items():
        model = make_pipeline(
            PretrainedFeatureExtractor(**parameters),
            StandardScaler(),
            RidgeClassifier(alpha=100.0),
        )
        scores[name] = cross_val_score(model, X, y, cv=folds).mean()
    assert scores["trained"] > scores["random"] + 0.05


def test_metadata_routing_passes_by(pictures, labels):
    with config_context(enable_metadata_routing=True):
        classifier = LogisticRegression().set_fit_request(sample_weight=True)
        pipe = make_pipeline(PretrainedFeatureExtractor(), classifier)
        pipe.fit(pictures, labels, sample_weight=np.ones(12))
        assert pipe.predict(pictures).shape == (12,)
