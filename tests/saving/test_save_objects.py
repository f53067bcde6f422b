"""Losses, optimizers, transforms and callbacks in a file: by name and parameters, or left out."""

import copy
from enum import Enum
from functools import partial
from types import FunctionType

import numpy as np
import pytest
import torch
from saved_files import read_file, write_file
from sklearn import model_selection
from skorch.callbacks import Checkpoint, EarlyStopping, EpochScoring, LRScheduler
from torch import nn
from torch.nn import functional as F
from torchvision import transforms
from torchvision.ops import sigmoid_focal_loss
from torchvision.transforms import v2

from sktransfer import FineTuningClassifier, PretrainedFeatureExtractor, load, save

pytestmark = pytest.mark.usefixtures("one_thread")

Y = np.array(["a", "b", "c"] * 4)


@pytest.fixture(scope="module")
def model(pictures):
    model = FineTuningClassifier(unfreeze=0, max_epochs=1, layer="stage1", memory=False)
    return model.fit(pictures, Y)


def state_of(value):
    """What an object is, for comparing two of them."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [state_of(part) for part in value]
    if isinstance(value, partial):
        return [state_of(part) for part in (value.func, value.args, value.keywords)]
    if isinstance(value, dict):
        return {key: state_of(part) for key, part in value.items()}
    is_plain = isinstance(value, (type, FunctionType, Enum)) or not hasattr(value, "__dict__")
    return value if is_plain else [type(value), state_of(vars(value))]


KEPT = {
    "loss": [
        nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]), reduction="none"),
        nn.MultiMarginLoss(p=2, margin=0.5, reduction="none"),
        F.cross_entropy,
        partial(F.cross_entropy, reduction="none", label_smoothing=0.2),
        partial(sigmoid_focal_loss, alpha=0.5),
    ],
    "optimizer": [torch.optim.NAdam, partial(torch.optim.SGD, momentum=0.5, nesterov=True)],
    "augment": [
        v2.RandomResizedCrop(32, scale=(0.5, 1.0), interpolation=v2.InterpolationMode.BICUBIC),
        v2.Compose([v2.ColorJitter(0.2, 0.1), v2.RandomApply([v2.GaussianBlur(3)], p=0.2)]),
        v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
        transforms.Compose([transforms.RandomRotation(10)]),
        v2.ToDtype(torch.float32, scale=True),
    ],
    "callbacks": [
        [LRScheduler("StepLR", step_size=2), ("stop", EarlyStopping(patience=3))],
        [LRScheduler(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=5)],
        [EpochScoring("accuracy", lower_is_better=False, name="own")],
    ],
    "early_stopping": [
        model_selection.GroupShuffleSplit(2, test_size=0.3, random_state=0),
        model_selection.StratifiedKFold(3, shuffle=True, random_state=np.int64(1)),
        model_selection.PredefinedSplit([-1, 0] * 6),
        model_selection.LeaveOneGroupOut(),
    ],
    "random_state": [3, np.int64(3)],
    "class_weight": [{"a": 2.0, "b": 1.0, "c": 1.0}],
    "unfreeze": [{1: 0, 2: "all"}],
}


@pytest.mark.parametrize(
    ("parameter", "value"), [(name, value) for name, values in KEPT.items() for value in values]
)
def test_known_objects_are_kept(parameter, value, model, tmp_path):
    save(copy.deepcopy(model).set_params(**{parameter: value}), tmp_path / "model")
    loaded = getattr(load(tmp_path / "model"), parameter)
    assert state_of(loaded) == state_of(value)


@pytest.mark.filterwarnings("ignore:Training the head did not improve")
def test_a_splitter_in_a_search(pictures, tmp_path):
    splitter = model_selection.ShuffleSplit(random_state=0)
    model = FineTuningClassifier(unfreeze=0, max_epochs=2, layer="stage1", early_stopping=splitter)
    search = model_selection.GridSearchCV(model, {"early_stopping": [splitter]}, cv=2)
    save(search.fit(pictures, Y), tmp_path / "model")
    loaded = load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.predict_proba(pictures), search.predict_proba(pictures))
    assert repr(loaded.best_estimator_.early_stopping) == repr(splitter)


def test_mixed_lists(model, pictures, tmp_path):
    augment = ["light", v2.RandomChoice([v2.MixUp(num_classes=3), v2.CutMix(num_classes=3)])]
    save(copy.deepcopy(model).set_params(augment=augment), tmp_path / "model")
    loaded = load(tmp_path / "model").set_params(unfreeze=1)
    assert str(loaded.augment) == str(augment)
    loaded.partial_fit(pictures, Y)


def test_times_as_keys(pictures, tmp_path):
    times = (np.arange(12) % 2).astype("M8[ns]")
    model = FineTuningClassifier(
        unfreeze=0, max_epochs=0, layer="stage1", memory=False, class_weight={times[0]: 2.0}
    )
    save(model.fit(pictures, times), tmp_path / "model")
    assert load(tmp_path / "model").class_weight == model.class_weight


class Own(nn.Module):
    def forward(self, scores, target):
        return F.cross_entropy(scores, target, reduction="none")


class Focal(nn.CrossEntropyLoss):
    pass


class Halves(model_selection.KFold):
    pass


changed = v2.RandomHorizontalFlip(0.5)
changed.p, changed.extra = 0.2, 1
UNKNOWN = [
    ("loss", Own()),
    ("loss", Focal(reduction="none")),
    ("loss", lambda scores, target: F.cross_entropy(scores, target)),
    ("loss", partial(Own)),
    ("loss", nn.Linear(2, 2)),
    ("optimizer", lambda groups, lr: torch.optim.SGD(groups, lr)),
    ("augment", np.flip),
    ("augment", ["light", nn.Identity()]),
    ("augment", changed),
    ("augment", v2.Lambda(abs)),
    ("callbacks", [Checkpoint(dirname="elsewhere"), EarlyStopping()]),
    ("callbacks", [LRScheduler("LambdaLR", lr_lambda=abs)]),
    ("early_stopping", Halves(2)),
    ("early_stopping", model_selection.ShuffleSplit(random_state=np.random.RandomState(0))),
    ("random_state", np.random.RandomState(0)),
]


@pytest.mark.parametrize(("parameter", "value"), UNKNOWN)
def test_others_are_left_out_with_a_warning(parameter, value, model, pictures, tmp_path):
    changed = copy.deepcopy(model).set_params(**{parameter: value})
    with pytest.warns(UserWarning, match=rf"does not hold {parameter}=[\s\S]* of FineTuningClass"):
        save(changed, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert getattr(loaded, parameter) == getattr(FineTuningClassifier(), parameter)
    np.testing.assert_array_equal(loaded.predict_proba(pictures), model.predict_proba(pictures))


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_a_transform_as_preprocessing(pictures, tmp_path):
    steps = [v2.ToImage(), v2.Resize((32, 32)), v2.ToDtype(torch.float32, scale=True)]
    model = PretrainedFeatureExtractor(preprocessing=v2.Compose(steps)).fit(pictures)
    save(model, tmp_path / "model", standalone=True)
    loaded = load(tmp_path / "model")
    np.testing.assert_allclose(loaded.transform(pictures), model.transform(pictures), atol=1e-6)


def test_names_of_other_modules_are_not_looked_up(model, tmp_path):
    path = tmp_path / "model"
    save(copy.deepcopy(model).set_params(loss=nn.CrossEntropyLoss(reduction="none")), path)
    header, tensors = read_file(path)
    parameters = header["estimators"][0]["parameters"]
    for names in (
        {"of": "os", "name": "system"},
        {"of": "torch.nn.os", "name": "system"},
        {"of": "torch.nn", "name": "modules.loss.os"},
        {"of": "torch.nn", "name": "Linear"},
        {"of": "torch.hub", "name": "load"},
        {"of": "torch.optim", "name": "SGD"},  # no loss
        {"how": "itself", "of": "torch.nn.functional", "name": "importlib"},
        {"how": "member"},
        {"how": "partial", "name": ["list"]},
    ):
        forged = {**parameters["loss"], **names}
        header["estimators"][0]["parameters"] = {**parameters, "loss": forged}
        write_file(path, header, tensors)
        with pytest.raises(ValueError, match="parameter 'loss' is not of a known kind"):
            load(path)
