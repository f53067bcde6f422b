"""Nothing in a file is run, and a damaged or forged file does not predict otherwise."""

import importlib.util
import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from saved_files import digest_of, read_file, write_file
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import StandardScaler
from tiny_networks import Tiny, tiny_network

from sktransfer import FineTuningClassifier, FineTuningRegressor, PretrainedFeatureExtractor, load
from sktransfer import save as save_model

pytestmark = pytest.mark.usefixtures("one_thread")

script = Path(__file__).parents[2] / "docs" / "benchmarks" / "save_attack.py"
spec = importlib.util.spec_from_file_location("save_attack", script)
save_attack = importlib.util.module_from_spec(spec)
spec.loader.exec_module(save_attack)

SMALL = {"size": 32, "crop": 32}
Y = np.array(["a", "b", "c"] * 4)


@pytest.fixture(scope="module")
def files(pictures, tmp_path_factory):
    """Name -> the bytes of a file, what `load` needs, and the probabilities of `pictures`."""
    torch.manual_seed(0)
    module, found = tiny_network(), {}
    settings = {"preprocessing": SMALL, "memory": False}
    models = {
        "classifier": FineTuningClassifier(module, unfreeze=1, max_epochs=1, **settings),
        "pipeline": make_pipeline(
            PretrainedFeatureExtractor(module, **settings), StandardScaler(), LogisticRegression()
        ),
    }
    for name, model in models.items():
        path = tmp_path_factory.mktemp("saved") / "model"
        save_model(model.fit(pictures, Y), path, standalone=True)
        found[name] = path.read_bytes(), model.predict_proba(pictures)
    return found


@pytest.fixture
def saved(pictures, tmp_path):
    """A path to write to, and the header and the tensors of a file to change."""
    path = tmp_path / "model.safetensors"
    if not hasattr(saved, "content"):
        model = FineTuningClassifier(unfreeze=1, max_epochs=1, head=(4,), memory=False)
        save_model(model.fit(pictures, Y), path)
        saved.content = path.read_bytes()
    path.write_bytes(saved.content)
    return path, *read_file(path)


# -- damaged files ----------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["classifier", "pipeline"])
def test_damaged_files_are_refused_or_predict_the_same(name, files, pictures, tmp_path):
    data, expected = files[name]
    path, rng, outcomes = tmp_path / "model", np.random.default_rng(0), set()
    module = Tiny()
    for _ in range(60):
        path.write_bytes(save_attack.mutated(data, rng))
        try:
            got = load(path, backbone=module).predict_proba(pictures)
        except (ValueError, OSError):
            outcomes.add("refused")
        else:
            outcomes.add("same")
            np.testing.assert_allclose(got, expected, atol=1e-6)
    assert "refused" in outcomes


def test_each_bit_counts(files, tmp_path):
    data, _ = files["classifier"]
    path, rng = tmp_path / "model", np.random.default_rng(0)
    (length,) = np.frombuffer(data[:8], "<u8")
    for at in rng.integers(8 + length, len(data), 20):  # within the tensors
        changed = bytearray(data)
        changed[at] ^= 1
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"damaged or was changed \(its digest does not fit\)"):
            load(path, backbone=Tiny())


def test_nothing_is_written_reached_or_run(files, tmp_path):
    watch, rng = save_attack.Watch(), np.random.default_rng(1)
    path, outcomes = tmp_path / "model", set()
    for data, _ in files.values():
        path.write_bytes(data)
        load(path, backbone=Tiny())  # imports what it needs
        for change in (save_attack.mutated, save_attack.forged):
            for _ in range(30):
                path.write_bytes(change(data, rng))
                found = save_attack.outcome(path, watch, lambda m: 0, 0, {"backbone": Tiny()})
                outcomes.add(found)
    assert outcomes <= {"refused", "same"}
    assert watch.seen == []
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


# -- forged headers -----------------------------------------------------------------------------
def change(header, *keys, value):
    record = header["estimators"][0]
    inner = header if keys[0] in header else record if keys[0] in record else record["fit"]
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value


def array(dtype, shape, at="values/0", **items):
    return {"__kind__": "array", "dtype": dtype, "shape": shape, "at": at, **items}


def strings(*items, shape=None):
    shape = [len(items)] if shape is None else shape
    return {"__kind__": "array", "dtype": "O", "shape": shape, "items": list(items)}


def made(of, name, **arguments):
    arguments = {"__kind__": "dict", "items": [list(item) for item in arguments.items()]}
    return {"__kind__": "object", "of": of, "name": name, "how": "made", "arguments": arguments}


LAYER = made("torch.nn", "Linear", in_features=10**6, out_features=10**6)
HEADERS = {
    "not JSON": (lambda h: "{", "not JSON"),
    "deep": (lambda h: "[" * 100_000, "not JSON that can be read"),
    "a list": (lambda h: [], "names no format"),
    "digits": (lambda h: json.dumps(h)[:-1] + ', "x": ' + "9" * 5000 + "}", "not JSON"),
    "format": ({("format",): 2}, "its format is 2, and this version reads 3"),
    "none": ({("estimators",): []}, "unknown tensors"),
    "no records": ({("estimators",): [1]}, "an estimator in it does not hold"),
    "class": ({("class",): "os.system"}, "its class is 'os.system'"),
    "class of ours": ({("class",): "load_backbone"}, "its class is 'load_backbone'"),
    "more": ({("code",): "import os"}, "does not hold"),
    "not a dict": ({("parameters",): [1]}, "does not hold"),
    "unknown parameter": ({("parameters", "evil"): 1}, r"no parameters \['evil'\]"),
    "machine": ({("parameters", "memory"): "/etc"}, r"no parameters \['memory'\]"),
    "parameter": ({("parameters", "lr"): -1}, "The 'lr' parameter"),
    "object": ({("parameters", "lr"): {"__kind__": "eval", "items": []}}, "parameter 'lr' is"),
    "other object": ({("parameters", "loss"): made("os", "system", command="x")}, "'loss' is not"),
    "layer": ({("parameters", "loss"): LAYER}, "'loss' is not of a known kind"),
    "place": ({("parameters", "lr"): made("torch.optim", "SGD", params=1)}, "'lr' is not"),
    "callback": (
        {("parameters", "callbacks"): [made("skorch.callbacks", "LoadInitState", checkpoint=1)]},
        "'callbacks' is not of a known kind",
    ),
    "dtype": ({("attributes", "classes_"): array("V8", [3])}, "not of a known kind"),
    "size": ({("attributes", "classes_"): array("<U9999", [20_000])}, "not of a known kind"),
    "empty": ({("attributes", "classes_"): array("<U0", [10**12])}, "not of a known kind"),
    "shape": ({("attributes", "classes_"): array("<i8", [-1])}, "not of a known kind"),
    "place of numbers": ({("attributes", "classes_"): array("<i8", [3], [])}, "known kind"),
    "items": ({("attributes", "classes_"): strings("a", {})}, "known kind"),
    "shape of items": ({("attributes", "classes_"): strings("a", shape=[10**9])}, "known kind"),
    "pairs": (
        {("parameters", "unfreeze"): {"__kind__": "dict", "items": strings(shape=[10**9, 0])}},
        "'unfreeze' is not of a known kind",
    ),
    "pair": (
        {("parameters", "unfreeze"): {"__kind__": "dict", "items": [strings(shape=[10**9, 0])]}},
        "'unfreeze' is not of a known kind",
    ),
    "long and empty": ({("attributes", "classes_"): strings(shape=[10**9, 0])}, "known kind"),
    "attribute": ({("attributes", "predict"): 1}, "fitted attributes are"),
    "type": ({("attributes", "n_iter_"): "3"}, "its n_iter_ is of type str"),
    "sign": ({("attributes", "first_trained_stage"): -2}, "first_trained_stage is -2"),
    "no such stage": ({("attributes", "first_trained_stage"): 99}, "not those of the stages"),
    "other stage": ({("attributes", "first_trained_stage"): 1}, "not those of the stages"),
    "many columns": (
        {("attributes", key): 10**30 for key in ("n_features_in_", "_n_image_columns")},
        "its n_features_out_ is",
    ),
    "head": ({("parameters", "head"): [-1]}, r"head=\[-1\] has the hidden size -1"),
    "large head": ({("parameters", "head"): [2**40]}, "head does not fit"),
    "huge head": ({("parameters", "head"): [10**30]}, "head does not fit"),
    "weights": ({("weights",): "0" * 64}, "written with other weights"),
    "network": ({("network",): 0}, "it holds no weights for 'builtin'"),
    "backbone": ({("parameters", "backbone"): "resnet5"}, "backbone='resnet5' is not known"),
    "large network": (
        {("parameters", "backbone"): "vit_h_14", ("parameters", "weights"): None},
        "does not accept images",
    ),
    "hub": ({("parameters", "backbone"): "timm:hf-hub:a/b"}, r"trusted=\['timm:hf-hub:a/b'\]"),
    "folder": ({("parameters", "backbone"): "timm:local-dir:/tmp"}, "trusted="),
    "share": ({("parameters", "weights"): r"\\host\w.pt"}, "another machine"),
    "no file": ({("parameters", "weights"): "/missing/w.pt"}, "does not exist.*weights="),
    "preprocessing": ({("preprocessing",): {"__kind__": "dict", "items": [["a", 1]]}}, "be built"),
    "needs": ({("needs",): {"weights": ["x", {}]}}, "it needs 'weights'"),
    "output": ({("output",): "evil"}, "its output is 'evil'"),
    "routing": ({("routing",): {"predict": {}}}, "it routes metadata to 'predict'"),
    "requests": ({("routing",): {"fit": {"evil": True}}}, "settings cannot be restored"),
}


@pytest.mark.parametrize("attack", HEADERS)
def test_forged_headers_are_refused(saved, attack):
    path, header, tensors = saved
    edit, message = HEADERS[attack]
    if callable(edit):
        header = edit(header)
    else:
        for keys, value in edit.items():
            change(header, *keys, value=value)
    write_file(path, header, tensors)
    with pytest.raises((ValueError, OSError), match=message):
        load(path)


def test_names_that_reach_out_load_when_trusted(saved, monkeypatch):
    path, header, tensors = saved
    change(header, "parameters", "backbone", value="timm:hf-hub:a/b")
    write_file(path, header, tensors)
    asked = []
    monkeypatch.setattr("timm.create_model", lambda name, **_: asked.append(name) or Tiny())
    with pytest.raises(ValueError, match="trusted="):
        load(path)
    assert not asked
    with pytest.raises((ValueError, OSError)):
        load(path, trusted=["timm:hf-hub:a/b"])
    assert asked == ["hf-hub:a/b"]


@pytest.mark.parametrize(
    ("name", "download"),
    [
        ("squeezenet1_1", "torch.hub.download_url_to_file"),
        ("timm:resnet10t", "timm.create_model"),
        ("timm:gcvit_tiny", "timm.create_model"),  # not on the hub
    ],
)
def test_nothing_is_downloaded_for_a_file(name, download, saved, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    path, header, tensors = saved
    change(header, "parameters", "backbone", value=name)
    write_file(path, header, tensors)
    asked = []

    def refuse(*args, **kwargs):
        asked.append(args)
        raise OSError("no network")

    monkeypatch.setattr(download, refuse)
    with pytest.raises(OSError, match=rf"not on this machine .*load_backbone\('{name}'\)"):
        load(path)
    assert not asked
    with pytest.raises(OSError, match="no network"):
        load(path, trusted=name)
    assert asked


def places(value, place=()):
    """Where the parts of a header are."""
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield (*place, key)
            yield from places(value[key], (*place, key))


@pytest.mark.parametrize("name", ["labels", "numbers"])
def test_edited_headers_are_refused_or_load(name, pictures, tmp_path):
    path, rng = tmp_path / "model", np.random.default_rng(0)
    model = FineTuningRegressor(unfreeze=0, max_epochs=1, layer="stage1")
    y = np.arange(24.0).reshape(12, 2)
    if name == "labels":
        model = FineTuningClassifier(unfreeze={1: 0}, max_epochs=1, layer="stage1")
        y = np.stack([Y == "a", Y != "b"], axis=1).astype(int)
    save_model(model.fit(pictures, y), path)
    data = path.read_bytes()
    for _ in range(60):
        path.write_bytes(save_attack.forged(data, rng))
        try:
            load(path)
        except (ValueError, OSError):
            pass
        except Exception as error:
            raise AssertionError(str(read_file(path)[0])) from error


# -- forged tensors ---------------------------------------------------------------------------
def test_bad_tensors_are_refused(saved):
    path, header, tensors = saved
    name = next(name for name in tensors if name.startswith("0/trained/") and "conv" in name)
    nan, infinite = torch.full_like(tensors[name], np.nan), tensors["0/head/linear.bias"] / 0
    for changed, message in (
        (tensors | {"extra": torch.zeros(1)}, "unknown tensors"),
        (tensors | {"0/head/extra": torch.zeros(1)}, "head does not fit"),
        (tensors | {"0/trained/0.extra": torch.zeros(1)}, "not those of the stages"),
        (tensors | {name: torch.zeros(1, 2)}, "not those of the stages"),
        (tensors | {"0/head/linear.bias": torch.zeros(99)}, "head does not fit"),
        (tensors | {"0/head/linear.bias": torch.zeros(3).double()}, "head does not fit"),
        ({k: v for k, v in tensors.items() if k != name}, "not those of the stages"),
        (tensors | {name: nan}, "trained tensor '.*' is not finite"),
        (tensors | {"0/head/linear.bias": infinite}, r"tensor 'linear.bias' is not finite"),
    ):
        write_file(path, header, changed)
        with pytest.raises(ValueError, match=message):
            load(path)


def test_weights_of_another_network_are_refused(pictures, tmp_path):
    path = tmp_path / "model"
    save_model(PretrainedFeatureExtractor(layer="stage1").fit(pictures), path, standalone=True)
    header, tensors = read_file(path)
    name = next(iter(tensors))
    for changed in (
        {k: v for k, v in tensors.items() if k != name},
        tensors | {name: tensors[name].half()},
        tensors | {name: torch.zeros(5)},
    ):
        write_file(path, header, changed)
        with pytest.raises(ValueError, match=r"weights (are not those of|do not fit) 'builtin'"):
            load(path)


class Bomb:
    def __reduce__(self):
        return (Path("exploded").touch, ())


def test_other_files_are_refused(saved, monkeypatch):
    path, _, tensors = saved
    monkeypatch.chdir(path.parent)
    content = path.read_bytes()
    for bad in (content[:200], content[:-10], b"", pickle.dumps(Bomb()), b"\xff" * 1000):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="sktransfer did not write it"):
        load(path)
    save_file(tensors, path, {"sktransfer": "{}"})
    with pytest.raises(ValueError, match="its digest does not fit"):
        load(path)
    assert digest_of("{}", tensors) != digest_of("{}", {})
    assert not Path("exploded").exists()
    with pytest.raises(FileNotFoundError):
        load(path.parent / "missing")


# -- forged classical steps -------------------------------------------------------------------
@pytest.fixture
def steps(files, tmp_path):
    """A path, and a function that writes a file there with the schema and entries changed."""
    path = tmp_path / "model"
    path.write_bytes(files["pipeline"][0])
    header, tensors = read_file(path)
    before = zipfile.ZipFile(io.BytesIO(tensors["skops"].numpy().tobytes()))

    def forge(edit=lambda schema: None, compression=zipfile.ZIP_STORED, **added):
        entries = {name: before.read(name) for name in before.namelist()} | added
        schema = json.loads(entries["schema.json"])
        edit(schema)
        entries["schema.json"] = json.dumps(schema).encode()
        target = io.BytesIO()
        with zipfile.ZipFile(target, "w", compression) as after:
            for name, content in entries.items():
                after.writestr(name, content)
        data = torch.frombuffer(bytearray(target.getvalue()), dtype=torch.uint8)
        write_file(path, header, tensors | {"skops": data})

    return path, forge


def test_forged_steps_are_refused(steps):
    path, forge = steps

    def node(module, name, loader="ObjectNode", **more):
        return lambda schema: schema.update(
            {"__module__": module, "__class__": name, "__loader__": loader, **more}
        )

    def stand_in(*arguments):
        items = [
            {"__class__": "str", "__module__": "builtins", "__loader__": "JsonNode",
             "content": json.dumps(x), "is_json": True, "__id__": 10 + i}
            for i, x in enumerate(arguments)
        ]  # fmt: skip
        content = {"__class__": "tuple", "__module__": "builtins", "__loader__": "TupleNode",
                   "content": items, "__id__": 5}  # fmt: skip
        name = ("sktransfer.saving._classical", "StandIn", "ConstructorFromReduceNode")
        return node(*name, content=content)

    def twice(schema):
        for part in save_attack._places(schema):
            container, key = part
            if key == "__id__" and "file" in container:
                container["__id__"] += 1

    for edit, message in (
        (node("os", "system", "FunctionNode"), r"types that are not trusted.*\['os.system'\]"),
        (node("sklearn.metrics", "accuracy_score", "FunctionNode"), "not trusted"),
        (node("sktransfer.fine_tuning._module", "TunedNetwork"), "not trusted"),
        (stand_in("estimators", 99), "cannot be made"),
        (stand_in("estimators", "x"), "cannot be made"),
        (stand_in("os", "system"), "cannot be made"),
        (stand_in("sklearn.metrics", "np"), "cannot be made"),
        (stand_in(), "cannot be made"),
        (lambda schema: schema.clear(), "cannot be read"),
        (twice, "for another object"),
    ):
        forge(edit)
        with pytest.raises(ValueError, match=message):
            load(path, backbone=Tiny())
    forge(compression=zipfile.ZIP_DEFLATED, bomb=bytes(10**7))
    with pytest.raises(ValueError, match="are compressed"):
        load(path, backbone=Tiny())
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.npy", bytes(10**7))
    forge(**{"1.npz": inner.getvalue()})
    with pytest.raises(ValueError, match="claim more memory"):
        load(path, backbone=Tiny())


def test_sparse_matrices_of_real_models_pass(pictures, tmp_path):
    texts = [f"{a} {b}" for a in "abcd" for b in ("one", "two", "three")]
    model = make_pipeline(TfidfVectorizer(), KNeighborsClassifier(algorithm="brute"))
    both = make_union(PretrainedFeatureExtractor(layer="stage1").fit(pictures), "drop")
    model = make_pipeline(*[step for _, step in model.fit(texts, Y).steps])
    model.photos_ = both
    save_model(model, tmp_path / "model")
    loaded = load(tmp_path / "model", trusted=["scipy.sparse._csr.csr_matrix"])
    np.testing.assert_array_equal(loaded.predict(texts), model.predict(texts))
