"""PretrainedFeatureExtractor: what it returns."""

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import joblib
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from sklearn.base import clone
from sklearn.experimental import enable_halving_search_cv  # noqa: F401

from sktransfer import PretrainedFeatureExtractor
from sktransfer.embedding._batches import run_on_accelerator


def naive_rows(pictures):
    """Resize with PIL, normalise, run the stages before the head one picture at a time."""
    from sktransfer import load_backbone

    backbone = load_backbone("builtin")
    p = backbone.preprocessing
    rows = []
    for picture in pictures:
        resized = p.resize_crop(np.ascontiguousarray(picture))
        x = torch.from_numpy(resized.copy()).permute(2, 0, 1)[None] / 255.0
        x = (x - torch.tensor(p.mean)[:, None, None]) / torch.tensor(p.std)[:, None, None]
        with torch.no_grad():
            for stage in backbone.stages[:-1]:
                x = stage.module.eval()(x)
        rows.append(x.flatten().numpy())
    return np.stack(rows)


def test_equals_naive_reference(pictures):
    rows = PretrainedFeatureExtractor().fit_transform(pictures)
    assert rows.dtype == np.float32
    expected = naive_rows(pictures)
    np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_fit_decodes_nothing_and_knows_the_width():
    extractor = PretrainedFeatureExtractor().fit(["does-not-exist.jpg"])
    assert extractor.n_features_out_ == len(extractor.get_feature_names_out())
    assert extractor.n_features_in_ == 1


@pytest.mark.parametrize("batch_size", [1, 5, 64, "auto"])
@pytest.mark.parametrize("n_jobs", [None, 1, 3])
@pytest.mark.parametrize("memory", [None, False])
def test_rows_depend_on_their_picture_alone(pictures, batch_size, n_jobs, memory):
    expected = PretrainedFeatureExtractor(memory=False, batch_size=1).fit_transform(pictures)
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(12), 2))
    extractor = PretrainedFeatureExtractor(batch_size=batch_size, n_jobs=n_jobs, memory=memory)
    rows = extractor.fit_transform(pictures[order])
    scale = np.abs(expected).max()
    np.testing.assert_allclose(rows, expected[order], rtol=1e-4, atol=1e-5 * scale)
    again = extractor.transform(pictures[order][::-1])[::-1]
    np.testing.assert_allclose(again, rows, rtol=1e-4, atol=1e-5 * scale)


def test_precision_computes_differently_and_returns_float32(pictures):
    full = PretrainedFeatureExtractor().fit_transform(pictures)
    half = PretrainedFeatureExtractor(precision="bfloat16").fit_transform(pictures)
    assert half.dtype == np.float32
    assert 0 < np.abs(full - half).max() < 0.1 * np.abs(full).max()


def test_no_rows_are_no_rows(pictures):
    frame = pd.DataFrame({"front": list(pictures[:2]), "back": list(pictures[2:4])})
    extractor = PretrainedFeatureExtractor().fit(frame)
    extractor.bad_images_ = ["of the call before"]
    assert extractor.transform(frame[:0]).shape == (0, extractor.n_features_out_)
    assert extractor.bad_images_ == []
    with pytest.raises(ValueError, match="feature names"):
        extractor.transform(frame[:0].rename(columns=str.upper))
    with pytest.raises(ValueError, match="minimum of 1"):
        extractor.transform([])
    assert list(extractor.set_output(transform="pandas").transform(frame[:0]).columns) == list(
        extractor.get_feature_names_out()
    )


def test_flat_rows_without_image_shape_are_an_error(pictures):
    with pytest.raises(ValueError, match="image_shape"):
        PretrainedFeatureExtractor().fit(pictures.reshape(12, -1))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"backbone": 3}, "The 'backbone' parameter of PretrainedFeatureExtractor must be"),
        ({"pooling": "mean"}, "The 'pooling' parameter"),
        ({"batch_size": 0}, "The 'batch_size' parameter"),
        ({"on_error": "ignore"}, "The 'on_error' parameter"),
        ({"precision": "int8"}, "The 'precision' parameter"),
    ],
)
def test_parameter_errors_are_in_scikit_learns_words(pictures, parameters, message):
    with pytest.raises(ValueError, match=message):
        PretrainedFeatureExtractor(**parameters).fit(pictures)


def test_column_count_is_checked(picture_files):
    one = PretrainedFeatureExtractor().fit(picture_files)
    with pytest.raises(ValueError, match="2 image column"):
        one.transform(np.array([picture_files[:2]], dtype=object))


def test_set_params_acts(pictures):
    extractor = PretrainedFeatureExtractor()
    before = extractor.fit_transform(pictures)
    after = extractor.set_params(layer="stage1").fit_transform(pictures)
    assert before.shape[1] != after.shape[1]


def test_parameters_are_never_written_to(pictures):
    layers, override = ["stage1", "stage2"], {"size": 32, "crop": 32}
    extractor = PretrainedFeatureExtractor(layer=layers, preprocessing=override)
    before = copy.deepcopy(extractor.get_params())
    extractor.fit_transform(pictures)
    assert extractor.get_params() == before
    assert extractor.layer is layers


@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e)), lambda e: joblib_round_trip(e)],
    ids=["deepcopy", "pickle", "joblib"],
)
def test_copies_give_the_same_rows(pictures, again):
    extractor = PretrainedFeatureExtractor(memory=False).fit(pictures)
    np.testing.assert_array_equal(
        again(extractor).transform(pictures), extractor.transform(pictures)
    )


def joblib_round_trip(estimator):
    import io

    buffer = io.BytesIO()
    joblib.dump(estimator, buffer)
    buffer.seek(0)
    return joblib.load(buffer)


def test_pickle_holds_no_weights_and_loads_in_a_fresh_process(pictures, tmp_path):
    extractor = PretrainedFeatureExtractor(memory=False).fit(pictures)
    pickled = pickle.dumps(extractor)
    assert len(pickled) < 20_000
    (tmp_path / "extractor.pkl").write_bytes(pickled)
    np.save(tmp_path / "pictures.npy", pictures)
    code = (
        "import os, pickle, sys, numpy as np; folder = sys.argv[1]\n"
        "extractor = pickle.load(open(os.path.join(folder, 'extractor.pkl'), 'rb'))\n"
        "pictures = np.load(os.path.join(folder, 'pictures.npy'))\n"
        "np.save(os.path.join(folder, 'rows.npy'), extractor.transform(pictures))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    np.testing.assert_allclose(
        np.load(tmp_path / "rows.npy"), extractor.transform(pictures), rtol=1e-4, atol=1e-5
    )


def test_frozen_means_bit_identical(pictures, labels):
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Dropout(0.5),
    ).train()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    extractor = PretrainedFeatureExtractor(module, preprocessing={"size": 32, "crop": 32})
    first = extractor.fit_transform(pictures)
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key
    again = clone(extractor, safe=False).set_params(memory=False).fit(pictures).transform(pictures)
    np.testing.assert_allclose(again, first, rtol=1e-5, atol=1e-6)


def test_html_representation_links_to_the_documentation():
    assert "sktransfer.readthedocs.io" in PretrainedFeatureExtractor()._repr_html_()


def test_verbose_shows_a_bar(pictures, capsys):
    PretrainedFeatureExtractor(verbose=1).fit_transform(pictures)
    assert "12/12" in capsys.readouterr().err


def test_image_shape_leaves_other_forms_alone(pictures, picture_files):
    flat = PretrainedFeatureExtractor(image_shape=(40, 48, 3))
    expected = flat.fit_transform(pictures.reshape(12, -1))
    for X in [picture_files, [[path] for path in picture_files], pictures, list(pictures)]:
        np.testing.assert_array_equal(flat.fit_transform(X), expected)


def test_flat_rows_of_pyarrow(pictures):
    rows = pictures.reshape(12, -1)
    flat = PretrainedFeatureExtractor(image_shape=(40, 48, 3))
    expected = flat.fit_transform(rows)
    of_pixels = pa.table({f"pixel{j}": pixels for j, pixels in enumerate(rows.T)})
    np.testing.assert_array_equal(flat.fit_transform(of_pixels), expected)
    assert flat.feature_names_in_[-1] == "pixel5759"
    of_images = pa.table({"image": pa.array(list(rows))})
    np.testing.assert_array_equal(flat.fit_transform(of_images), expected)


def test_set_params_after_fit_changes_nothing_fitted(pictures):
    extractor = PretrainedFeatureExtractor(layer="stage1", memory=False).fit(pictures)
    expected = extractor.transform(pictures)
    extractor.set_params(layer=["stage1", "stage2"])
    np.testing.assert_array_equal(extractor.transform(pictures), expected)
    assert len(extractor.get_feature_names_out()) == expected.shape[1]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"device": "gpu"}, "device='gpu' is not a torch device"),
        ({"device": "cuda:99"}, r"device='cuda:99', but torch finds \d+ devices of that kind"),
        ({"device": "meta"}, "device='meta', but torch finds 0 devices of that kind"),
        ({"n_jobs": 0}, "The 'n_jobs' parameter"),
        ({"memory": True}, "The 'memory' parameter"),
        ({"memory": "s3://bucket"}, "memory must be a local folder"),
    ],
)
def test_what_cannot_be_is_told_by_fit(pictures, parameters, message):
    with pytest.raises(ValueError, match=message):
        PretrainedFeatureExtractor(**parameters).fit(pictures)


@pytest.mark.parametrize("memory", [None, False])
def test_an_accelerators_loop_gives_the_same_rows(pictures, monkeypatch, memory, count_embedded):
    """Here its device is the CPU; threads that share the store wait for each other's rows."""
    expected = PretrainedFeatureExtractor(memory=False).fit_transform(pictures)
    count_embedded["images"] = 0
    monkeypatch.setattr(
        "sktransfer.embedding._embed.run_on_cpu",
        lambda run, n_images, batch_size, n_threads: run_on_accelerator(
            run, torch.device("cpu"), batch_size, n_threads
        ),
    )
    extractor = PretrainedFeatureExtractor(memory=memory, batch_size=2, on_error="zero")
    X = [*pictures, None, b"not an image"]
    extractor.fit(X)
    with ThreadPoolExecutor(3) as pool:
        for rows in pool.map(extractor.transform, [X] * 3):
            np.testing.assert_allclose(rows[:-2], expected, rtol=1e-4, atol=1e-4)
            assert not rows[-2:].any()
    assert count_embedded["images"] == (36 if memory is False else 12)
