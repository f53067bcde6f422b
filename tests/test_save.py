"""save and load: the same predictions, small files, and nothing in a file is run."""

import copy
import datetime
import errno
import json
import os
import pickle
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from tiny_networks import tiny_network

from sktransfer import (
    FineTuningClassifier,
    FineTuningRegressor,
    PretrainedFeatureExtractor,
    load,
    save,
)

pytestmark = pytest.mark.usefixtures("one_thread")


LABELS = np.array(["a", "b", "c"] * 4)
ESTIMATORS = {
    "head": FineTuningClassifier(unfreeze=0, max_epochs=1),
    "stage": FineTuningClassifier(unfreeze=1, max_epochs=1, head=(4,), optimizer="sgd"),
    "two columns": FineTuningClassifier(unfreeze=1, max_epochs=1, class_weight={"a": 2.0}),
    "labels": FineTuningClassifier(unfreeze={1: 0}, max_epochs=1),
    "numbers": FineTuningRegressor(unfreeze=0, max_epochs=1, preprocessing={"size": (48, 48)}),
    "extractor": PretrainedFeatureExtractor(layer=["stage1", None]),
}


def fitted(name, pictures, **parameters):
    X, y = pictures, LABELS
    if name == "two columns":
        import pandas as pd

        X = pd.DataFrame({"front": list(pictures), "back": list(pictures[::-1])})
    if name == "labels":
        y = np.stack([LABELS == "a", LABELS != "b"], axis=1).astype(int)
    if name == "numbers":
        y = np.arange(24.0).reshape(12, 2)
    model = clone(ESTIMATORS[name]).set_params(memory=False, **parameters)
    return model.fit(X, y), X


def shrunk(image):
    return np.moveaxis(image[:32, :32] / 255, 2, 0)


def outputs(model, X):
    return model.predict(X) if hasattr(model, "predict") else model.transform(X)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("standalone", [False, True])
def test_round_trip(name, standalone, pictures, tmp_path):
    model, X = fitted(name, pictures)
    save(model, tmp_path / "model.safetensors", standalone=standalone)
    loaded = load(tmp_path / "model.safetensors")
    assert type(loaded) is type(model)
    if name == "labels":
        np.testing.assert_allclose(loaded.predict_proba(X), model.predict_proba(X), rtol=1e-5)
    elif name in ("numbers", "extractor"):
        np.testing.assert_allclose(outputs(loaded, X), outputs(model, X), rtol=1e-4, atol=1e-5)
    else:
        np.testing.assert_array_equal(outputs(loaded, X), outputs(model, X))
        np.testing.assert_allclose(loaded.predict_proba(X), model.predict_proba(X), rtol=1e-4)
    ours, theirs = model.get_params(), loaded.get_params()
    same = {key for key in ours if ours[key] == theirs[key]}
    assert set(ours) - same <= {"memory"}
    assert list(loaded.get_feature_names_out()) == list(model.get_feature_names_out())
    again = pickle.loads(pickle.dumps(loaded))
    if name == "numbers":
        np.testing.assert_allclose(outputs(again, X), outputs(model, X), rtol=1e-4)
    if name == "stage":
        loaded.partial_fit(X, LABELS)
        assert loaded.n_iter_ == 2


def test_file_is_as_small_as_what_was_trained(pictures, tmp_path):
    model, _ = fitted("head", pictures)
    save(model, tmp_path / "head")
    assert (tmp_path / "head").stat().st_size < 3 * 1408 * 4 + 10_000
    save(model, tmp_path / "whole", standalone=True)
    assert (tmp_path / "whole").stat().st_size > 5_000_000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["head", "whole"]


def test_a_standalone_file_is_saved_standalone_again(pictures, tmp_path):
    model, X = fitted("stage", pictures)
    save(model, tmp_path / "first", standalone=True)
    save(load(tmp_path / "first"), tmp_path / "second")
    again = load(tmp_path / "second")
    np.testing.assert_array_equal(again.predict(X), model.predict(X))
    again.set_params(memory=False).fit(X, model.predict(X))


@pytest.mark.parametrize(
    "changed", [{"head": (8,)}, {"layer": "stage2"}, {"weights": None}], ids=str
)
def test_what_could_not_be_loaded_is_not_saved(changed, pictures, tmp_path):
    model, _ = fitted("head", pictures)
    with pytest.raises(ValueError, match=r"it is not saved[\s\S]*changed after fit"):
        save(model.set_params(**changed), tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["head", "extractor"])
@pytest.mark.parametrize("changed", [{"layer": "stage1.0.bn2"}, {"pooling": "max"}], ids=str)
def test_what_would_embed_differently_is_not_saved(name, changed, pictures, tmp_path):
    model, _ = fitted(name, pictures, layer="stage1")  # 48 columns, as the changed ones have
    with pytest.raises(ValueError, match=r"it is not saved[\s\S]*changed after fit"):
        save(model.set_params(**changed), tmp_path / "model", standalone=True)
    assert not list(tmp_path.iterdir())


def test_a_standalone_file_holds_the_fitted_preprocessing(pictures, tmp_path):
    model, X = fitted("extractor", pictures, preprocessing={"size": 32})
    path = tmp_path / "model"
    save(model.set_params(preprocessing="auto"), path, standalone=True)
    np.testing.assert_allclose(load(path).transform(X), model.transform(X), rtol=1e-4, atol=1e-5)
    model, _ = fitted("extractor", pictures, preprocessing=shrunk)
    with pytest.raises(ValueError, match=r"it is not saved[\s\S]*changed after fit"):
        save(model.set_params(preprocessing="auto"), path, standalone=True)


def test_own_module_is_given_again(pictures, tmp_path):
    module = tiny_network()
    model, X = fitted("stage", pictures, backbone=module, preprocessing={"size": 32, "crop": 32})
    path = tmp_path / "model.safetensors"
    save(model, path)
    np.testing.assert_array_equal(load(path, backbone=module).predict(X), model.predict(X))
    with pytest.raises(ValueError, match="give it as load"):
        load(path)
    other = tiny_network()
    next(other.parameters()).data.add_(1)
    with pytest.raises(ValueError, match="written with other weights"):
        load(path, backbone=other)
    save(fitted("head", pictures)[0], path)
    with pytest.raises(ValueError, match="names its own backbone"):
        load(path, backbone=module)


def test_objects_and_other_estimators_are_refused(pictures, tmp_path):
    model, _ = fitted("head", pictures)
    for name, value in (
        ("augment", np.flip),
        ("augment", [torch.nn.Identity()]),
        ("optimizer", torch.optim.SGD),
        ("loss", torch.nn.CrossEntropyLoss(reduction="none")),
    ):
        changed = copy.deepcopy(model).set_params(**{name: value})
        with pytest.raises(TypeError, match=f"the parameter {name} is .* use pickle or joblib"):
            save(changed, tmp_path / "model")
    with pytest.raises(TypeError, match="save writes"):
        save(LogisticRegression(), tmp_path / "model")
    with pytest.raises(ValueError, match="not fitted"):
        save(FineTuningClassifier(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "dtype", ["U3", "O", "bool", "int8", "float32", "datetime64[ns]", "datetime64[D]", "m8[h]"]
)
def test_labels_come_back_of_their_type(dtype, pictures, tmp_path):
    labels = np.arange(12) % 2
    y = (labels + 20_000).astype(dtype) if dtype[0] in "dm" else labels.astype(dtype)
    y = np.array([f"{x}" for x in labels], dtype=object) if dtype == "O" else y
    model = FineTuningClassifier(unfreeze=0, max_epochs=0, layer="stage1", memory=False)
    save(model.fit(pictures, y), tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert loaded.classes_.dtype == y.dtype
    np.testing.assert_array_equal(loaded.classes_, model.classes_)


def test_labels_that_are_other_objects_are_refused(pictures, tmp_path):
    dates = np.array([datetime.date(2020, 1, day % 2 + 1) for day in range(12)], dtype=object)
    model = FineTuningClassifier(unfreeze=0, max_epochs=0, layer="stage1", memory=False)
    with pytest.raises(TypeError, match=r"classes_ is .* use pickle"):
        save(model.fit(pictures, dates), tmp_path / "model")
    times = (np.arange(12) % 2).astype("M8[ns]")  # as a number of JSON it would be no time
    model.set_params(class_weight={times[0]: 2.0})
    with pytest.raises(TypeError, match=r"class_weight is .* use pickle"):
        save(model.fit(pictures, times), tmp_path / "model")
    assert not list(tmp_path.iterdir())


# -- files ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def small():
    X = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    return PretrainedFeatureExtractor(layer="stage1", memory=False).fit(X)


def test_threads_may_save_to_one_path(small, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: save(small, tmp_path / "model"), range(16)))
    assert load(tmp_path / "model").n_features_out_ == small.n_features_out_
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_save_leaves_the_old_file_alone(small, tmp_path, monkeypatch):
    path = tmp_path / "model"
    path.write_bytes(b"old")
    monkeypatch.setattr("os.replace", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(small, path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_files_have_the_permissions_that_open_gives(small, tmp_path):
    (tmp_path / "opened").write_bytes(b"")
    path = tmp_path / "model"
    save(small, path)
    assert path.stat().st_mode == (tmp_path / "opened").stat().st_mode
    path.chmod(0o640)
    save(small, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_symbolic_links_are_followed(small, tmp_path):
    (tmp_path / "inner").mkdir()
    link, path = tmp_path / "link", tmp_path / "inner" / "model"
    link.symlink_to(Path("inner") / "model")
    for _ in range(2):  # at first it leads to nothing
        save(small, link)
        assert link.is_symlink()
        assert load(path).n_features_out_ == small.n_features_out_


def test_errors_name_paths_that_cannot_be_opened(small, tmp_path, monkeypatch):
    missing = tmp_path / "missing" / "model"
    (tmp_path / "file").touch()
    for error, path in (
        (FileNotFoundError, missing),
        (NotADirectoryError, tmp_path / "file" / "model"),
        (IsADirectoryError, tmp_path),
    ):
        for call in (lambda path: save(small, path), load):
            with pytest.raises(error) as caught:
                call(path)
            assert caught.value.filename == str(path)
    refusal = PermissionError(errno.EACCES, "Permission denied", "elsewhere")
    monkeypatch.setattr("tempfile.mkdtemp", Mock(side_effect=refusal))
    with pytest.raises(PermissionError, match=r"Permission denied: '.*model'"):
        save(small, tmp_path / "model")
    for nothing in (None, 3):
        with pytest.raises(TypeError):
            load(nothing)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# -- attacks ---------------------------------------------------------------------------------
def header_of(path):
    with safe_open(path, framework="np") as file:
        return json.loads(file.metadata()["sktransfer"])


@pytest.fixture(scope="module")
def stage_file(pictures, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    save(fitted("stage", pictures)[0], path)
    return path


@pytest.fixture
def saved(stage_file, tmp_path):
    """A path to write to, and the header and the tensors of a file to change."""
    return tmp_path / "model.safetensors", header_of(stage_file), load_file(stage_file)


def write(path, header, tensors):
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(tensors, path, metadata={"sktransfer": text})


class Bomb:
    def __reduce__(self):
        return (Path("exploded").touch, ())


def change(header, *keys, value):
    inner = header
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value


def array(dtype, *items):
    return {"__kind__": "array", "dtype": dtype, "items": list(items)}


HEADERS = {
    "not JSON": (lambda h: "{", "not JSON"),
    "deep": (lambda h: "[" * 100_000, "nested too deeply"),
    "a list": (lambda h: [], "names no format"),
    "format": ({("format",): 1}, "its format is 1, and this version reads 2"),
    "class": ({("class",): "os.system"}, "its class is 'os.system'"),
    "class of ours": ({("class",): "load_backbone"}, "its class is 'load_backbone'"),
    "more": ({("code",): "import os"}, "header does not hold"),
    "not a dict": ({("parameters",): [1]}, "header does not hold"),
    "unknown parameter": ({("parameters", "evil"): 1}, r"no parameters \['evil'\]"),
    "machine": ({("parameters", "memory"): "/etc"}, r"no parameters \['memory'\]"),
    "parameter": ({("parameters", "lr"): -1}, "The 'lr' parameter"),
    "object": ({("parameters", "lr"): {"__kind__": "eval", "items": []}}, "parameter 'lr' is"),
    "array": (
        {("attributes", "classes_"): array("O", {})},
        "not of a known kind",
    ),
    "dtype": ({("attributes", "classes_"): array("V8")}, "not of a known kind"),
    "attribute": ({("attributes", "predict"): 1}, "fitted attributes are"),
    "type": ({("attributes", "n_iter_"): "3"}, "its n_iter_ is of type str"),
    "sign": ({("attributes", "first_trained_stage"): -2}, "first_trained_stage is -2"),
    "no such stage": ({("attributes", "first_trained_stage"): 99}, "not those of the stages"),
    "other stage": ({("attributes", "first_trained_stage"): 1}, "not those of the stages"),
    "many columns": (
        {("attributes", key): 10**30 for key in ("n_features_in_", "_n_image_columns")},
        "its n_features_out_ is",
    ),
    "digits": (lambda h: json.dumps(h)[:-1] + ', "x": ' + "9" * 5000 + "}", "not JSON"),
    "nested": (
        lambda h: json.dumps(h)[:-1] + ', "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "too deeply",
    ),
    "head": ({("parameters", "head"): [-1]}, r"head=\[-1\] has the hidden size -1"),
    "large head": ({("parameters", "head"): [2**40]}, "head does not fit"),
    "huge head": ({("parameters", "head"): [10**30]}, "head does not fit"),
    "bytes": ({("parameters", "augment"): array("|S3", 5)}, "parameter 'augment' is"),
    "numbers": ({("attributes", "classes_"): array("<U3", 1, 2, 3)}, "known kind"),
    "integer": ({("attributes", "classes_"): array("<i8", 1, 10**40, 2)}, "known kind"),
    "unit": ({("attributes", "classes_"): array("<M8[0s]", 1, 2, 3)}, "known kind"),
    "table": ({("attributes", "classes_"): array("<i8", [1], [2], [3])}, "known kind"),
    "fingerprint": ({("fingerprint",): "0" * 64}, "written with other weights"),
    "backbone": ({("parameters", "backbone"): "resnet5"}, "backbone='resnet5' is not known"),
}


@pytest.mark.parametrize("attack", HEADERS)
def test_bad_headers_are_refused(saved, attack):
    path, header, tensors = saved
    edit, message = HEADERS[attack]
    if callable(edit):
        header = edit(header)
    else:
        for keys, value in edit.items():
            change(header, *keys, value=value)
    write(path, header, tensors)
    with pytest.raises(ValueError, match=message):
        load(path)


def places(value, place=()):
    """Where the parts of a header are."""
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield (*place, key)
            yield from places(value[key], (*place, key))


ODD = [
    None, -1, 0, 1.5, 10**30, "x", "", [], {}, True, np.nan, [1, [2]],
    array("<f8", 1.0), array("<f8", "q"), array("<f8"), array("<f8", *[np.nan] * 3),
    array("<U5", "b", "a", "a"), array("<U5", [["a"]]), array("|S3", 5), array("|S3", "日"),
    array("<i8", 10**40), array(5), array(None), array("(2,)f8", 1.0), array("<M8[0s]", 1, 2),
    {"__kind__": "dict", "items": [[1, 2]]}, {"__kind__": "dict", "items": [[[], 2]]},
    {"__kind__": "tuple", "items": [1]}, {"__kind__": "optimizer", "items": [["name", "x"]]},
    {"__kind__": ["array"], "items": []}, json.loads("[" * 700 + "]" * 700),
]  # fmt: skip


@pytest.mark.parametrize(("name", "standalone"), [("stage", 0), ("labels", 0), ("numbers", 1)])
def test_edited_headers_are_refused_or_load(name, standalone, pictures, tmp_path):
    path = tmp_path / "model"
    save(fitted(name, pictures, layer="stage1")[0], path, standalone=bool(standalone))
    header, tensors = header_of(path), load_file(path)
    rng = np.random.default_rng(0)
    everywhere = list(places(header))
    for _ in range(60):
        edited = copy.deepcopy(header)
        place, value = everywhere[rng.integers(len(everywhere))], ODD[rng.integers(len(ODD))]
        change(edited, *place, value=value)
        write(path, edited, tensors)
        try:
            load(path)
        except (ValueError, FileNotFoundError):  # the latter of `weights`
            pass
        except Exception as error:
            raise AssertionError(f"{place} set to {value!r}") from error


def test_bad_tensors_are_refused(saved):
    path, header, tensors = saved
    name = next(name for name in tensors if name.startswith("trained/"))
    for changed, message in (
        (tensors | {"extra": np.zeros(1)}, "unknown tensors"),
        (tensors | {"head/extra": np.zeros(1)}, "head does not fit"),
        (tensors | {"trained/0.extra": np.zeros(1)}, "not those of the stages"),
        (tensors | {name: np.zeros((1, 2), np.float32)}, "not those of the stages"),
        (tensors | {"head/linear.bias": np.zeros(99, np.float32)}, "head does not fit"),
        ({k: v for k, v in tensors.items() if k != name}, "not those of the stages"),
    ):
        write(path, header, changed)
        with pytest.raises(ValueError, match=message):
            load(path)
    eighth = torch.zeros(3, dtype=torch.float8_e4m3fn)  # NumPy has no such numbers
    save_torch_file({"head/linear.bias": eighth}, path, {"sktransfer": json.dumps(header)})
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load(path)


def test_other_files_are_refused(stage_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, content = tmp_path / "model", stage_file.read_bytes()
    for bad in (content[:200], content[:-10], b"", pickle.dumps(Bomb()), b"\xff" * 1000):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            load(path)
    save_file({"a": np.zeros(1)}, path)
    with pytest.raises(ValueError, match="sktransfer did not write it"):
        load(path)
    assert not Path("exploded").exists()
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "missing")


@pytest.mark.parametrize("standalone", [False, True])
def test_layers_kept_for_the_store_survive(tmp_path, standalone):
    X = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    extractor = PretrainedFeatureExtractor(layer="stage2", cache_layers=["stage3"]).fit(X)
    save(extractor, tmp_path / "extractor.sktransfer", standalone=standalone)
    again = load(tmp_path / "extractor.sktransfer")
    np.testing.assert_array_equal(again.transform(X), extractor.transform(X))
