"""More than one machine: a local cluster of processes stands for it."""

import os
import pickle

import joblib
import numpy as np
import pandas as pd
import pytest
from seen_pictures import SeenPictures
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tiny_transformers import make_text_folder

from sktransfer import FineTuningClassifier, PretrainedFeatureExtractor, PretrainedTextExtractor

distributed = pytest.importorskip("distributed")

pytestmark = [
    pytest.mark.slow,
    # dask's own: sockets and event loops left to the garbage collector when a cluster closes,
    # large graphs, and a thread-local profiler.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Sending large graph:UserWarning"),
]


@pytest.fixture(scope="module")
def client():
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.fixture
def files(pictures, tmp_path):
    """Forty picture files, each different."""
    from PIL import Image

    paths = []
    for i in range(40):
        picture = np.roll(pictures[i % 12], 8 * (i // 12), axis=0)
        paths.append(str(tmp_path / f"{i:02d}.png"))
        Image.fromarray(picture).save(paths[-1])
    return paths


def assert_same_rows(rows, expected):
    np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_texts_are_dealt_out(client, tmp_path):
    pytest.importorskip("transformers")
    texts = [f"a {'good' if i % 3 else 'bad'} film {'very ' * (i % 7)}" for i in range(60)]
    texts[7] = None
    extractor = PretrainedTextExtractor(f"hf:{make_text_folder(tmp_path)}", memory=False)
    expected = extractor.set_params(on_error="nan").fit_transform(texts)
    with joblib.parallel_config("dask"):
        rows = clone(extractor).fit(texts).transform(texts)
    np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-5)
    assert np.isnan(rows[7]).all()
    model = make_pipeline(extractor.set_params(on_error="zero"), LogisticRegression())
    search = GridSearchCV(model, {"pretrainedtextextractor__pooling": ["mean", "max"]}, cv=2)
    with joblib.parallel_config("dask"):
        assert search.fit(texts, np.arange(60) % 3 == 0).best_score_ > 0.8


def test_rows_are_those_of_one_machine_in_order(client, files, pictures):
    extractor = PretrainedFeatureExtractor(memory=False).fit(files)
    for X in [files, pd.DataFrame({"a": files, "b": files[::-1]}), pictures]:
        expected = extractor.fit(X).transform(X)
        with joblib.parallel_config("dask"):
            assert_same_rows(extractor.transform(X), expected)


def test_the_workers_do_the_work(client, files, tmp_path):
    seen = SeenPictures(tmp_path)
    extractor = PretrainedFeatureExtractor(preprocessing=seen, memory=False).fit(files)
    with joblib.parallel_config("dask"):
        extractor.transform(files)
        extractor.transform(files)
    assert seen.n_seen == 2 * len(files)
    assert seen.pids <= set(client.run(os.getpid).values())


def test_bad_images_are_reported_with_their_rows(client, files, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    X = [*files[:30], str(broken), *files[30:], str(tmp_path / "missing.png")]
    extractor = PretrainedFeatureExtractor(on_error="nan").fit(X)
    with joblib.parallel_config("dask"):
        rows = extractor.transform(X)
    assert [bad.row for bad in extractor.bad_images_] == [30, 41]
    assert "row 30" in extractor.bad_images_[0].where
    assert "broken.png" in extractor.bad_images_[0].where
    np.testing.assert_array_equal(np.isnan(rows).any(axis=1), [i in (30, 41) for i in range(42)])
    extractor.set_params(on_error="raise")
    with joblib.parallel_config("dask"), pytest.raises(ValueError, match="2 of 42 images"):
        extractor.transform(X)


def test_assumptions_come_home_as_one_warning(client, pictures):
    X = [*(picture / 1.0 for picture in pictures[:8])]
    extractor = PretrainedFeatureExtractor(memory=False).fit(X)
    with pytest.warns(UserWarning, match="0…255") as local:
        expected = extractor.transform(X)
    with joblib.parallel_config("dask"), pytest.warns(UserWarning, match="0…255") as caught:
        assert_same_rows(extractor.transform(X), expected)
    texts = [str(w.message) for w in caught if "row" in str(w.message)]
    assert texts == [str(w.message) for w in local]


def test_a_worker_that_dies_costs_nothing(client, files, tmp_path):
    extractor = PretrainedFeatureExtractor(preprocessing=SeenPictures(tmp_path), memory=False)
    expected = extractor.fit(files).transform(files)
    (tmp_path / "seen").unlink()
    pids = set(client.run(os.getpid).values())
    seen = SeenPictures(tmp_path, die_at=len(files) // 2)
    extractor = PretrainedFeatureExtractor(preprocessing=seen, memory=False).fit(files)
    with joblib.parallel_config("dask"):
        rows = extractor.transform(files)
    assert (tmp_path / "died").exists()
    assert seen.n_seen > len(files)  # what had died with the worker was computed again
    assert_same_rows(rows, expected)
    client.wait_for_workers(2, timeout=60)
    assert set(client.run(os.getpid).values()) != pids


def test_grid_search_on_the_cluster_embeds_once(client, files, tmp_path):
    seen = SeenPictures(tmp_path)
    y = np.arange(len(files)) % 2
    model = make_pipeline(
        PretrainedFeatureExtractor(preprocessing=seen, memory=tmp_path / "store"),
        StandardScaler(),
        LogisticRegression(max_iter=1000),
    )
    grid = {"logisticregression__C": [0.1, 1.0, 10.0]}
    with joblib.parallel_config("dask"):
        search = GridSearchCV(model, grid, cv=3).fit(files, y)
    assert seen.n_seen == len(files)
    local = GridSearchCV(model, grid, cv=3).fit(files, y)
    assert seen.n_seen == len(files)
    np.testing.assert_allclose(
        search.cv_results_["mean_test_score"], local.cv_results_["mean_test_score"]
    )


def test_the_probe_of_many_views_on_the_cluster(client, files):
    """The pictures and their corners are embedded there; the training is here."""
    y = np.arange(len(files)) % 2
    model = FineTuningClassifier(unfreeze=1, max_epochs=1, random_state=0, memory=False)
    expected = clone(model).fit(files, y).predict_proba(files)
    with joblib.parallel_config("dask"):
        got = model.fit(files, y).predict_proba(files)
    np.testing.assert_allclose(got, expected, atol=1e-3)


def test_a_fitted_extractor_is_small_to_send(files):
    for backbone in ["builtin", "resnet50"]:
        extractor = PretrainedFeatureExtractor(backbone, weights=None).fit(files)
        extractor.transform(files[:2])
        assert len(pickle.dumps(extractor)) < 4000


def test_dask_data_frames(client, files):
    dd = pytest.importorskip("dask.dataframe")
    frame = pd.DataFrame({"image": files})
    extractor = PretrainedFeatureExtractor().set_output(transform="pandas").fit(frame)
    expected = extractor.transform(frame)
    meta = extractor.transform(frame[:1])
    rows = dd.from_pandas(frame, npartitions=4).map_partitions(extractor.transform, meta=meta)
    pd.testing.assert_frame_equal(rows.compute(), expected, check_exact=False, rtol=1e-3, atol=1e-4)
