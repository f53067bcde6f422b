"""What a file does not hold is given to load: own modules and heads, a weights file that moved."""

import copy
import importlib
import pickle
import warnings

import joblib
import numpy as np
import pytest
import torch
from saved_files import read_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from tiny_networks import Tiny, tiny_network
from torch import nn
from torchvision.models import shufflenet_v2_x0_5

from sktransfer import (
    FineTuningClassifier,
    FineTuningRegressor,
    PretrainedFeatureExtractor,
    embedding_store,
    load,
    save,
)
from sktransfer.networks._inference import clear_networks

pytestmark = pytest.mark.usefixtures("one_thread")

Y = np.array(["a", "b", "c"] * 4)
SMALL = {"size": 32, "crop": 32}


def classifier(backbone, **parameters):
    settings = {"unfreeze": 1, "max_epochs": 1, "preprocessing": SMALL} | parameters
    return FineTuningClassifier(backbone, **settings)


def assert_same(loaded, model, X):
    for method in ("predict_proba", "predict", "transform"):
        if hasattr(model, method) and (method != "predict" or not hasattr(model, "classes_")):
            expected = getattr(model, method)(X)
            np.testing.assert_allclose(getattr(loaded, method)(X), expected, rtol=1e-6, atol=1e-6)


# -- own modules ------------------------------------------------------------------------------
MODELS = {
    "extractor": PretrainedFeatureExtractor(preprocessing=SMALL),
    "classifier": classifier(None),
    "regressor": FineTuningRegressor(unfreeze=1, max_epochs=1, preprocessing=SMALL),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("standalone", [False, True])
def test_an_own_module_is_given_again(name, standalone, pictures, tmp_path):
    module, path = tiny_network(), tmp_path / "model"
    model = copy.deepcopy(MODELS[name]).set_params(backbone=module)
    save(
        model.fit(pictures, np.arange(12) if name == "regressor" else Y),
        path,
        standalone=standalone,
    )
    for given in (module, tiny_network, {"Tiny": module}, nn.DataParallel(module)):
        assert_same(load(path, backbone=given), model, pictures)
    for nothing in (None, {}, {"Other": module}, "builtin", 3, [module], {"Tiny": "builtin"}):
        with pytest.raises(ValueError, match=r"was a module of your own, Tiny, .*backbone=module"):
            load(path, backbone=nothing)
    with pytest.raises(ValueError, match="needs no head of yours"):
        load(path, backbone=module, head=nn.Linear(6, 3))
    if not standalone:
        with pytest.raises(ValueError, match="written with other weights than backbone='Tiny'"):
            load(path, backbone=Tiny())
        return
    loaded = load(path, backbone=Tiny())  # of other weights
    assert_same(loaded, model, pictures)
    save(loaded, path)  # standalone again
    again = load(path, backbone=Tiny())
    assert_same(again, model, pictures)
    before = torch.cat([parameter.flatten() for parameter in module.parameters()])
    after = torch.cat([parameter.flatten() for parameter in again.backbone.parameters()])
    assert torch.equal(before, after)  # for the next fit
    with pytest.raises(ValueError, match=r"given as backbone does not take the weights"):
        load(path, backbone=nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 3)))


SOURCE = """
import torch
from torch import nn
from torchvision.models import shufflenet_v2_x0_5

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3, stride=2)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.body(x).{function}().mean((2, 3)))
"""


@pytest.mark.parametrize("standalone", [False, True])
def test_edits_of_the_code(standalone, pictures, tmp_path, monkeypatch):
    """A comment and a docstring change nothing; where the code did change, a warning says so."""
    monkeypatch.syspath_prepend(tmp_path)
    file, path = tmp_path / "net_of_mine.py", tmp_path / "model"

    def edited(source):
        file.write_text(source)
        importlib.invalidate_caches()
        module = importlib.import_module("net_of_mine")
        torch.manual_seed(0)
        return importlib.reload(module).Net()

    source = SOURCE.format(function="relu")
    model = classifier(edited(source)).fit(pictures, Y)
    save(model, path, standalone=standalone)
    said = source.replace("forward(self, x):", 'forward(self, x):\n        """Say."""  # so')
    said = said.replace("class Net", "# A comment.\n\n\nclass Net").replace("(2, 3)", "( 2,3, )")
    assert_same(load(path, backbone=edited(said)), model, pictures)
    other = edited(SOURCE.format(function="tanh"))
    with pytest.warns(UserWarning, match=r"code of Net has changed since .*model was saved"):
        load(path, backbone=other)


def test_constants_and_shared_weights(pictures, tmp_path):
    class Shared(Tiny):
        def __init__(self):
            super().__init__()
            self.again = nn.Linear(3, 6)
            self.again.weight = nn.Parameter(self.fc.weight.detach().T)
            self.tied = self.stage1
            self.register_buffer("shift", torch.ones(2, 3)[:, 0], persistent=False)

        def forward(self, x):
            return super().forward(
                x * torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1) + self.shift[0]
            )

    torch.manual_seed(0)
    model = PretrainedFeatureExtractor(Shared(), preprocessing=SMALL).fit(pictures)
    save(model, tmp_path / "model", standalone=True)
    assert_same(load(tmp_path / "model", backbone=Shared()), model, pictures)


# -- heads --------------------------------------------------------------------------------------
class Head(nn.Module):
    def __init__(self, n_out=3):
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, n_out))

    def forward(self, x):
        return self.layers(x)


def test_an_own_head_is_given_again(pictures, tmp_path):
    module, path = tiny_network(), tmp_path / "model"
    model = classifier(module, head=Head()).fit(pictures, Y)
    save(model, path)
    loaded = load(path, backbone=module, head=Head())
    assert_same(loaded, model, pictures)
    assert isinstance(loaded.partial_fit(pictures, Y).head, Head)
    message = r"was a module of your own, Head, .*head=module.* any wei"
    for nothing in (None, (4,), "linear", Head):
        with pytest.raises(ValueError, match=message):
            load(path, backbone=module, head=nothing)
    for wrong in (Head(4), nn.Linear(6, 3)):
        with pytest.raises(
            ValueError, match=r"scores of shape \(2, 4\)|the head given does not fit"
        ):
            load(path, backbone=module, head=wrong)
    save(classifier("builtin", layer="stage1", head=nn.LazyLinear(3)).fit(pictures, Y), path)
    assert load(path, head=nn.LazyLinear(3)).predict(pictures).shape == (12,)


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrised_heads(norm, pictures, tmp_path):
    def head():
        return getattr(nn.utils.parametrizations, norm)(nn.Linear(6, 3))

    module = tiny_network()
    model = classifier(module, head=head()).fit(pictures, Y)
    save(model, tmp_path / "model")
    assert_same(load(tmp_path / "model", backbone=module, head=head()), model, pictures)


# -- weights files --------------------------------------------------------------------------------
@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "weights.pth"
    torch.save(shufflenet_v2_x0_5(num_classes=7).state_dict(), path)
    return path


def with_file(weights, **parameters):
    return PretrainedFeatureExtractor("shufflenet_v2_x0_5", weights=weights, **parameters)


def test_a_weights_file_that_moved(weights, pictures, tmp_path):
    model = make_pipeline(with_file(weights, preprocessing=SMALL), LogisticRegression())
    path = tmp_path / "model"
    save(model.fit(pictures, Y), path)
    assert_same(load(path), model, pictures)
    moved = weights.rename(tmp_path / "moved.pth")
    clear_networks()
    with pytest.raises(
        FileNotFoundError, match=r"weights.pth.*load\(path, weights=\.\.\.\).*standalo"
    ):
        load(path)
    for given in (moved, str(moved)):
        loaded = load(path, weights=given)
        assert_same(loaded, model, pictures)
        assert loaded[0].weights == given
    other = tmp_path / "other.pth"
    torch.save(shufflenet_v2_x0_5().state_dict(), other)
    with pytest.raises(ValueError, match="written with other weights"):
        load(path, weights=other)
    with pytest.raises(ValueError, match="needs no backbone of yours"):
        load(path, weights=moved, backbone=Tiny())


def test_a_standalone_file_needs_no_weights_file(weights, pictures, tmp_path):
    model, path = with_file(weights, preprocessing=SMALL).fit(pictures), tmp_path / "model"
    save(model, path, standalone=True)
    expected = model.transform(pictures)
    weights.unlink()
    clear_networks()
    embedding_store().clear()
    np.testing.assert_allclose(load(path).transform(pictures), expected, atol=1e-6)
    own = PretrainedFeatureExtractor(tiny_network(), preprocessing=SMALL).fit(pictures)
    save(own, path, standalone=True)
    with pytest.raises(ValueError, match="needs no weights of yours: leave `weights` out"):
        load(path, backbone=Tiny(), weights="other.pth")


@pytest.mark.slow  # the smallest one has 86 million weights
def test_a_vision_transformer_of_another_size(tmp_path):
    from torchvision.models import vit_b_16

    with torch.device("meta"):
        shapes = vit_b_16(image_size=32).state_dict()
    state = {key: torch.zeros(tensor.shape) for key, tensor in shapes.items()}
    torch.save(state, tmp_path / "weights.pth")
    X = np.zeros((1, 32, 32, 3), np.uint8)
    model = PretrainedFeatureExtractor("vit_b_16", weights=tmp_path / "weights.pth").fit(X)
    save(model, tmp_path / "model", standalone=True)
    assert load(tmp_path / "model").backbone_.input_size == (3, 32, 32)


# -- pickles ----------------------------------------------------------------------------------
def test_a_pickle_fails_at_load_where_weights_are_missing(weights, pictures, tmp_path):
    model = make_pipeline(with_file(weights, preprocessing=SMALL), LogisticRegression())
    joblib.dump(model.fit(pictures, Y), tmp_path / "model.joblib")
    assert (tmp_path / "model.joblib").stat().st_size < 100_000
    weights.rename(tmp_path / "moved.pth")
    assert_same(joblib.load(tmp_path / "model.joblib"), model, pictures)  # it is in memory
    clear_networks()
    folder = str(tmp_path).replace("\\", "\\\\")
    message = rf"'weights.pth' of shufflenet_v2_x0_5 is not in '{folder}'.*\n.*standalone=True"
    with pytest.raises(FileNotFoundError, match=message):
        joblib.load(tmp_path / "model.joblib")
    assert copy.copy(model[0]).backbone_ is model[0].backbone_


def test_a_pickle_fetches_published_weights_at_load(monkeypatch, tmp_path):
    fetched = []
    file = tmp_path / "checkpoint.pth"
    monkeypatch.setattr(
        "sktransfer.networks._weights.fetch", lambda url, _: fetched.append(url) or file
    )
    file.write_bytes(b"weights")
    model = PretrainedFeatureExtractor("shufflenet_v2_x0_5").fit(np.zeros((1, 32, 32, 3), np.uint8))
    pickled = pickle.dumps(model)
    clear_networks()
    fetched.clear()
    pickle.loads(pickled)
    assert len(fetched) == 1
    file.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"'checkpoint.pth' of shufflenet_v2_x0_5 is not in"
    ):
        pickle.loads(pickled)


def test_files_hold_only_what_no_name_brings_back(pictures, tmp_path):
    save(classifier(tiny_network()).fit(pictures, Y), tmp_path / "model")
    _, tensors = read_file(tmp_path / "model")
    kinds = {name.split("/")[1] for name in tensors if not name.startswith("values/")}
    assert kinds == {"head", "trained"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(PretrainedFeatureExtractor().fit(pictures), tmp_path / "model")
    assert not read_file(tmp_path / "model")[1]
