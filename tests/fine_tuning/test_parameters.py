"""The parameters: which there are, how they are documented and checked, and left alone."""

import copy
import inspect
import re
import subprocess
import sys

import numpy as np
import pytest
from small_models import small
from tiny_networks import tiny_network

import sktransfer
from sktransfer import FineTuningClassifier, FineTuningRegressor

PARAMETERS = [
    "backbone", "weights", "layer", "pooling", "preprocessing", "image_shape", "value_range",
    "unfreeze", "head", "head_init", "dropout", "loss", "max_epochs", "batch_size", "lr",
    "layer_decay", "optimizer", "weight_decay", "augment", "early_stopping", "validation_fraction",
    "n_iter_no_change", "class_weight", "random_state", "callbacks", "device", "precision",
    "n_jobs", "memory", "on_error", "verbose",
]  # fmt: skip
BOTH = pytest.mark.parametrize("cls", [FineTuningClassifier, FineTuningRegressor])


def test_there_are_thirty_one_parameters():
    assert list(inspect.signature(FineTuningClassifier).parameters) == PARAMETERS
    of_regressor = list(inspect.signature(FineTuningRegressor).parameters)
    assert of_regressor == [name for name in PARAMETERS if name != "class_weight"]
    assert not hasattr(sktransfer, "Optimizer")


# -- docstrings ------------------------------------------------------------------------------
def section(documented, title):
    """The text of a section of a numpydoc docstring, or ""."""
    text = inspect.getdoc(documented)
    found = re.search(rf"^{title}\n-+\n(.*?)(?=^\S[^\n]*\n-+$|\Z)", text, re.DOTALL | re.MULTILINE)
    return found[1] if found else ""


def names_and_types(documented, title):
    """The name and the type of each entry of a section."""
    pairs = {}
    for line in re.findall(r"^\S.*$", section(documented, title), re.MULTILINE):
        names, _, kind = line.partition(" : ")
        pairs |= dict.fromkeys(names.split(", "), kind)
    return pairs


@BOTH
def test_every_parameter_and_attribute_is_documented(cls, stripes):
    parameters = names_and_types(cls, "Parameters")
    assert list(parameters) == list(inspect.signature(cls).parameters)
    assert all(parameters.values())
    for title in ("See Also", "Notes", "References", "Examples"):
        assert section(cls, title).strip(), title
    y = stripes[1] if cls is FineTuningClassifier else np.arange(48.0)
    model = small(cls, unfreeze=0, max_epochs=1).fit(stripes[0], y)
    fitted = {name for name in vars(model) if name.endswith("_") and not name.startswith("_")}
    assert fitted | {"net_", "feature_names_in_"} == set(names_and_types(cls, "Attributes"))


@BOTH
def test_the_defaults_in_the_docstring_are_those_of_the_signature(cls):
    signature = inspect.signature(cls).parameters
    for name, kind in names_and_types(cls, "Parameters").items():
        stated = re.search(r"default=(.*)$", kind)
        assert stated, name
        assert stated[1] == repr(signature[name].default).replace("'", '"')


@BOTH
def test_every_method_documents_its_parameters(cls):
    for name, method in inspect.getmembers(cls, inspect.isfunction):
        if name.startswith("_") or not method.__module__.startswith("sktransfer"):
            continue
        stated = names_and_types(method, "Parameters").keys()
        assert stated == set(inspect.signature(method).parameters) - {"self"}, name
        assert section(method, "Returns").strip(), name


def test_without_docstrings_it_can_be_imported():
    code = "import sktransfer; print(sktransfer.FineTuningClassifier.__doc__)"
    command = [sys.executable, "-OO", "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"


def test_constructing_and_cloning_load_no_torch():
    code = (
        "import sys\n"
        "from sklearn.base import clone\n"
        "from sktransfer import FineTuningClassifier, FineTuningRegressor\n"
        "clone(FineTuningClassifier(unfreeze=1)).set_params(lr=0.1)\n"
        "repr(clone(FineTuningRegressor('resnet50')))\n"
        "print(sorted({'torch', 'torchvision', 'skorch', 'timm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- checks ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"n_jobs": 0}, "The 'n_jobs' parameter of FineTuningClassifier"),
        ({"memory": True}, "The 'memory' parameter of FineTuningClassifier"),
        ({"memory": "s3://bucket"}, "memory must be a local folder"),
        ({"device": "gpu"}, "device='gpu'"),
        ({"layer_decay": 0.0}, "The 'layer_decay' parameter of FineTuningClassifier"),
        ({"head_init": "zeros"}, "The 'head_init' parameter of FineTuningClassifier"),
        ({"validation_fraction": 1.0}, "The 'validation_fraction' parameter"),
        ({"augment": "medium"}, "The 'augment' parameter of FineTuningClassifier"),
        ({"optimizer": "adam"}, "The 'optimizer' parameter of FineTuningClassifier"),
        ({"precision": "float16"}, "The 'precision' parameter of FineTuningClassifier"),
        ({"on_error": "nan"}, "The 'on_error' parameter of FineTuningClassifier"),
        ({"class_weight": {"down": -1}}, "none may be negative, NaN or infinite"),
        ({"class_weight": {"down": np.inf}}, "none may be negative, NaN or infinite"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused_before_a_network_is_loaded(stripes, parameters, message):
    with pytest.raises(ValueError, match=message):
        small(backbone="no such network", **parameters).fit(*stripes)


@BOTH
def test_parameters_are_never_written_to(cls, stripes):
    X, y = stripes
    y = y if cls is FineTuningClassifier else X.mean(axis=(1, 2, 3))
    model = small(cls, head=[4], preprocessing={"size": 16, "crop": 16}, unfreeze={1: 1})
    before = {k: copy.deepcopy(v) for k, v in model.get_params().items() if k != "backbone"}
    model.fit(X, y).predict(X)
    model.partial_fit(X, y)
    after = model.get_params()
    assert after.pop("backbone") is tiny_network
    assert after == before
