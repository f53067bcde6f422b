"""Pipelines, searches and all else of scikit-learn that holds an estimator of ours."""

import os
import re
import subprocess
import sys
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor, make_column_selector
from sklearn.ensemble import (
    BaggingClassifier,
    RandomForestClassifier,
    StackingClassifier,
    VotingClassifier,
)
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.feature_selection import SelectKBest
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, HalvingGridSearchCV
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import FeatureUnion, Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from sklearn.tree._tree import Tree
from tiny_networks import Tiny, tiny_network

from sktransfer import FineTuningClassifier, PretrainedFeatureExtractor, load, save

pytestmark = pytest.mark.usefixtures("one_thread")

Y = np.array(["a", "b", "c"] * 4)
SMALL = {"size": 32, "crop": 32}


def extractor(**parameters):
    return PretrainedFeatureExtractor(**{"layer": "stage1", **parameters})


def pipeline(*steps, **parameters):
    return make_pipeline(extractor(**parameters), *(steps or [LogisticRegression()]))


def classifier(**parameters):
    return FineTuningClassifier(layer="stage1", unfreeze=0, max_epochs=1, **parameters)


def table(pictures):
    return pd.DataFrame({"photo": list(pictures), "n": np.arange(12.0), "kind": list("uvw") * 4})


COLUMNS = [
    ("photo", extractor(), "photo"),
    ("n", StandardScaler(), make_column_selector(dtype_include=float)),
    ("kind", OneHotEncoder(sparse_output=False), ["kind"]),
]
MODELS = {
    "pipeline": pipeline(StandardScaler(), LogisticRegression()),
    "union": make_pipeline(
        FeatureUnion([("mean", extractor()), ("max", extractor(pooling="max"))]),
        SelectKBest(k=5),
        LogisticRegression(),
    ),
    "columns": make_pipeline(ColumnTransformer(COLUMNS), LogisticRegression()),
    "named columns": make_pipeline(
        ColumnTransformer(COLUMNS).set_output(transform="pandas"), LogisticRegression()
    ),
    "search": GridSearchCV(
        pipeline(),
        {"pretrainedfeatureextractor": [extractor(), extractor(pooling="max")]},
        cv=2,
        scoring=["accuracy", "f1_macro"],
        refit="accuracy",
    ),
    "halving": HalvingGridSearchCV(
        pipeline(), {"logisticregression__C": [1, 2]}, cv=2, min_resources=6
    ),
    "fine-tuned search": GridSearchCV(classifier(), {"dropout": [0.0, 0.5]}, cv=2),
    "voting": VotingClassifier([("a", pipeline()), ("b", classifier())], voting="soft"),
    "stacking": StackingClassifier([("a", pipeline()), ("b", classifier())], cv=2),
    "calibrated": CalibratedClassifierCV(classifier(), cv=2),
    "one against rest": pipeline(OneVsRestClassifier(LogisticRegression())),
    "bagging": pipeline(BaggingClassifier(LogisticRegression(), 2, random_state=0)),
    "target": TransformedTargetRegressor(pipeline(Ridge()), func=np.log1p, inverse_func=np.expm1),
}


def outputs(model, X):
    return model.predict_proba(X) if hasattr(model, "predict_proba") else model.predict(X)


def parameters(model):
    return re.sub(" at 0x[0-9a-f]+", "", repr(model.get_params()))


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name, pictures, tmp_path):
    X = table(pictures) if "columns" in name else pictures
    model = MODELS[name].fit(X, np.arange(12.0) if name == "target" else Y)
    path = tmp_path / "model.safetensors"
    save(model, path)
    loaded = load(path)
    assert type(loaded) is type(model)
    np.testing.assert_array_equal(outputs(loaded, X), outputs(model, X))
    assert parameters(loaded) == parameters(model)
    assert path.stat().st_size < 200_000


def test_a_search_keeps_its_results_and_can_be_fitted_again(pictures, tmp_path):
    model = MODELS["search"].fit(pictures, Y)
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    for key, value in model.cv_results_.items():
        assert repr(loaded.cv_results_[key]) == repr(value)
    assert loaded.score(pictures, Y) == model.score(pictures, Y)
    assert loaded.fit(pictures, Y).best_index_ == model.best_index_


def test_one_network_is_written_once_and_shared(pictures, tmp_path):
    sizes = []
    for name in ("pipeline", "union", "voting"):
        model = MODELS[name].fit(pictures, Y)
        save(model, tmp_path / "first", standalone=True)
        loaded = load(tmp_path / "first")
        np.testing.assert_allclose(outputs(loaded, pictures), outputs(model, pictures), atol=1e-6)
        save(loaded, tmp_path / "second")  # it was standalone, and so is this
        again = load(tmp_path / "second")
        np.testing.assert_array_equal(outputs(again, pictures), outputs(loaded, pictures))
        sizes.append((tmp_path / "second").stat().st_size)
    assert max(sizes) < 1.02 * min(sizes)
    first, second = (step for _, step in load(tmp_path / "second").named_estimators_.items())
    network = first[0].backbone_.network
    assert second.backbone_.network.module is network.module


def test_what_is_fitted_stays_apart_from_what_is_not(pictures, tmp_path):
    model = make_pipeline(FrozenEstimator(extractor().fit(pictures)), LogisticRegression())
    save(model.fit(pictures, Y), tmp_path / "model")
    assert hasattr(load(tmp_path / "model")[0].estimator, "backbone_")
    search = MODELS["fine-tuned search"].fit(pictures, Y)
    save(search, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert not hasattr(loaded.estimator, "backbone_")
    assert loaded.estimator is not loaded.best_estimator_


def test_one_estimator_in_two_places_stays_one(pictures, tmp_path):
    shared = extractor()
    model = make_pipeline(FeatureUnion([("a", shared), ("b", shared)]), LogisticRegression())
    model.fit(pictures, Y)
    model[0].transformer_list = [("a", shared.fit(pictures)), ("b", shared)]
    save(model, tmp_path / "model")
    (_, a), (_, b) = load(tmp_path / "model")[0].transformer_list
    assert a is b


def test_a_cache_is_of_the_machine(pictures, tmp_path):
    model = Pipeline(pipeline().steps, memory=joblib.Memory(tmp_path / "cache", verbose=0))
    save(model.fit(pictures, Y), tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert loaded.memory is None
    np.testing.assert_array_equal(outputs(loaded, pictures), outputs(model, pictures))


def test_what_the_user_set_besides_parameters(pictures, tmp_path):
    from sklearn import config_context

    with config_context(enable_metadata_routing=True):
        model = (
            classifier().set_fit_request(sample_weight=True).set_score_request(sample_weight="w")
        )
    model.set_output(transform="pandas").fit(pictures, Y)
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert list(loaded.transform(pictures).columns) == list(model.get_feature_names_out())
    assert str(loaded.get_metadata_routing()) == str(model.get_metadata_routing())


# -- own modules in pipelines ---------------------------------------------------------------
@pytest.mark.parametrize("standalone", [False, True])
def test_own_modules_in_a_pipeline(standalone, pictures, tmp_path):
    one, other = tiny_network(), Tiny()
    own = {"layer": "stage1", "preprocessing": SMALL}
    model = make_pipeline(
        FeatureUnion(
            [("a", extractor(backbone=one, **own)), ("b", extractor(backbone=other, **own))]
        ),
        LogisticRegression(max_iter=1000),
    )
    path = tmp_path / "model"
    save(model.fit(pictures, Y), path, standalone=standalone)
    with pytest.raises(ValueError, match=r"a module of your own, Tiny(#2)?, whose code"):
        load(path)
    modules = {"Tiny": one, "Tiny#2": other}
    if standalone:
        modules = Tiny()  # of any weights
    loaded = load(path, backbone=modules)
    np.testing.assert_allclose(outputs(loaded, pictures), outputs(model, pictures), atol=1e-6)


def test_own_modules_in_a_search_are_filled_for_the_next_fit(pictures, tmp_path):
    model = make_pipeline(extractor(backbone=tiny_network(), preprocessing=SMALL), Ridge())
    search = GridSearchCV(model, {"ridge__alpha": [1, 2]}, cv=2).fit(pictures, np.arange(12))
    save(search, tmp_path / "model", standalone=True)
    loaded = load(tmp_path / "model", backbone=Tiny())
    before = loaded.predict(pictures)
    np.testing.assert_allclose(before, search.predict(pictures), rtol=1e-5)
    np.testing.assert_allclose(loaded.fit(pictures, np.arange(12)).predict(pictures), before)


# -- types ----------------------------------------------------------------------------------
def shorter(rows):
    return rows[:, :7]


def test_types_are_audited_before_anything_is_made(pictures, tmp_path, monkeypatch):
    path = tmp_path / "model"
    save(pipeline(KNeighborsClassifier(algorithm="kd_tree")).fit(pictures, Y), path)
    made = []
    monkeypatch.setattr("skops.io.loads", lambda *args, **kwargs: made.append(args))
    monkeypatch.setattr(PretrainedFeatureExtractor, "set_params", lambda *_, **__: made.append(1))
    with pytest.raises(ValueError, match=r"types that are not trusted.*trusted=\[.*KDTree"):
        load(path)
    assert not made


def test_functions_of_ones_own_are_trusted_by_name(pictures, tmp_path):
    model = pipeline(FunctionTransformer(shorter), LogisticRegression()).fit(pictures, Y)
    save(model, tmp_path / "model")
    name = f"{shorter.__module__}.shorter"
    with pytest.raises(ValueError, match=f"trusted=.*{name}"):
        load(tmp_path / "model")
    for nothing in (None, [3]):
        with pytest.raises(TypeError, match=r"trusted=.* is not accepted: a name, a type, or a"):
            load(tmp_path / "model", trusted=nothing)
    for trusted in (name, [name], [shorter]):
        loaded = load(tmp_path / "model", trusted=trusted)
        np.testing.assert_array_equal(loaded.predict(pictures), model.predict(pictures))


def test_trees(pictures, tmp_path):
    model = pipeline(RandomForestClassifier(3, random_state=0)).fit(pictures, Y)
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model", trusted=Tree)
    np.testing.assert_array_equal(outputs(loaded, pictures), outputs(model, pictures))


def test_what_a_file_cannot_hold_is_named(pictures, tmp_path):
    def local(rows):
        return rows

    for function in (lambda rows: rows, local):
        model = pipeline(FunctionTransformer(function), LogisticRegression()).fit(pictures, Y)
        with pytest.raises(TypeError, match="cannot hold: functiontransformer__func=<function"):
            save(model, tmp_path / "model")
    model = pipeline().fit(pictures, Y)
    model[1].extra_ = lambda: 0
    with pytest.raises(TypeError, match="cannot hold: an attribute that fit set"):
        save(model, tmp_path / "model")
    with pytest.raises(TypeError, match=r"the parameter preprocessing is .*use pickle or joblib"):
        save(pipeline(preprocessing=shrunk).fit(pictures, Y), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def shrunk(image):
    return np.moveaxis(image[:32, :32] / 255, 2, 0)


def test_parameters_that_were_changed_after_fit(pictures, tmp_path):
    model = pipeline().fit(pictures, Y)
    model[0].set_params(pooling="max")
    with pytest.raises(ValueError, match=r"This Pipeline could not be loaded again.*changed after"):
        save(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_without_skops(pictures, tmp_path, monkeypatch):
    model = pipeline().fit(pictures, Y)
    save(model, tmp_path / "model")
    save(model[0], tmp_path / "alone")
    monkeypatch.setitem(sys.modules, "skops.io", None)
    for call in (lambda: save(model, tmp_path / "model"), lambda: load(tmp_path / "model")):
        with pytest.raises(ImportError, match=r"pip install sktransfer\[skops\]"):
            call()
    assert load(tmp_path / "alone").n_features_out_ == model[0].n_features_out_


# -- another process --------------------------------------------------------------------------
FRESH = """
import sys, numpy as np
from sktransfer import load
from networks_of_mine import Tiny
X = np.load("X.npy")
for name in ("pipeline", "own"):
    model = load(name, **({"backbone": Tiny()} if name == "own" else {}))
    np.testing.assert_allclose(model.predict_proba(X), np.load(f"{name}.npy"), atol=1e-6)
"""


def test_a_standalone_file_opens_elsewhere(pictures, tmp_path):
    models = {
        "pipeline": MODELS["pipeline"],
        "own": pipeline(backbone=tiny_network(), preprocessing=SMALL),
    }
    for name, model in models.items():
        save(model.fit(pictures, Y), tmp_path / name, standalone=True)
        np.save(tmp_path / f"{name}.npy", model.predict_proba(pictures))
    np.save(tmp_path / "X.npy", pictures)
    source = Path(__file__).parents[1] / "tiny_networks.py"
    (tmp_path / "networks_of_mine.py").write_text(source.read_text())
    package = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": f"{package}{os.pathsep}{tmp_path}"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FRESH],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
