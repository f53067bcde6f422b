"""What is frozen and what is trained; what is frozen runs once."""

import numpy as np
import pytest
import torch
import torchvision
from sklearn.model_selection import GridSearchCV
from skorch.callbacks import Callback
from small_models import assert_same_model, small, state_of
from tiny_networks import tiny_network
from torch import nn

from sktransfer import FineTuningClassifier, FineTuningRegressor, embedding_store

LATER = {1: 0, 3: "all"}

# Every family of torchvision's classification builders, at a size it accepts.
FAMILIES = {
    "resnet18": 32, "mobilenet_v3_small": 32, "squeezenet1_1": 32, "shufflenet_v2_x0_5": 32,
    "alexnet": 64, "convnext_tiny": 32, "densenet121": 32, "efficientnet_b0": 32,
    "efficientnet_v2_s": 32, "googlenet": 64, "inception_v3": 96, "maxvit_t": 224,
    "mnasnet0_5": 32, "mobilenet_v2": 32, "regnet_y_400mf": 32, "resnext50_32x4d": 32,
    "swin_t": 32, "swin_v2_t": 64, "vgg11_bn": 32, "vit_b_32": 224, "wide_resnet50_2": 32,
}  # fmt: skip


def images_through(first_inputs):
    return sum(len(batch) for batch in first_inputs)


# -- frozen is bit-identical -----------------------------------------------------------------
def test_every_family_is_tested():
    def families(names):
        return {torchvision.models.get_model_builder(name).__module__ for name in names}

    assert families(FAMILIES) == families(torchvision.models.list_models(torchvision.models))


def tensors(module):
    """Parameters and buffers, each once, in order."""
    return [*module.parameters(), *module.buffers()]


def check_frozen_stages(name):
    size = FAMILIES[name]
    rng = np.random.default_rng(0)
    X = rng.integers(0, 256, (4, size, size, 3), dtype=np.uint8)
    model = FineTuningClassifier(
        name, weights=None, preprocessing={"size": size, "crop": size}, unfreeze=1, max_epochs=1,
        augment="light", lr=0.1, head_init="random", random_state=0,
    ).fit(X, [0, 1, 0, 1])  # fmt: skip
    module = model.net_.module_
    frozen = [all(not p.requires_grad for p in stage.parameters()) for stage in module.stages]
    n_frozen = frozen.index(False)
    assert n_frozen > 0
    in_optimizer = {id(p) for g in model.net_.optimizer_.param_groups for p in g["params"]}
    moved = 0
    for i, (stage, old) in enumerate(zip(module.stages, model.backbone_.stages, strict=False)):
        for new, before in zip(tensors(stage), tensors(old.module), strict=True):
            same = torch.equal(new, before)
            assert same or i >= n_frozen, old.name
            moved += not same
        for parameter in stage.parameters():
            assert parameter.requires_grad == (id(parameter) in in_optimizer) == (i >= n_frozen)
    assert moved > 0


@pytest.mark.parametrize("name", list(FAMILIES)[:4])
def test_frozen_stages_are_bit_identical(name):
    check_frozen_stages(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FAMILIES)[4:])
def test_frozen_stages_are_bit_identical_in_every_family(name):
    check_frozen_stages(name)


def test_frozen_stages_stay_in_eval_mode(stripes):
    module = small(unfreeze=1).fit(*stripes).net_.module_.train()
    assert not any(part.training for part in module.stages[0].modules())
    assert module.stages[1].training


@pytest.mark.parametrize("stage", [0, 1])
def test_dropout_acts_in_unfrozen_stages_alone(stripes, stage):
    network = tiny_network()
    [network.stage1, network.stage2][stage].append(nn.Dropout(0.9))
    settings = {"unfreeze": 1, "augment": nn.Identity(), "lr": 0.01, "head_init": "random"}
    plain, dropped = (small(backbone=b, **settings).fit(*stripes) for b in (tiny_network, network))
    losses = [[row["train_loss"] for row in model.history_] for model in (plain, dropped)]
    assert np.allclose(*losses, rtol=1e-6) == (stage == 0)


def test_batch_norms_keep_their_statistics_unless_the_weights_are_random(stripes):
    model = small().fit(*stripes)
    kept = dict(model.backbone_.network.module.named_buffers())["stage2.1.running_mean"]
    means = [v for k, v in state_of(model).items() if k.endswith("running_mean")]
    np.testing.assert_array_equal(means, [kept.numpy()])
    settings = {"preprocessing": {"size": 32, "crop": 32}, "max_epochs": 1, "random_state": 0}
    model = FineTuningClassifier("resnet18", weights=None, unfreeze=1, **settings)
    state = state_of(model.fit(stripes[0][:6], stripes[1][:6]))
    moved = {k.split(".")[1] for k, v in state.items() if "running_mean" in k and v.any()}
    assert moved == {"4"}  # the last of the stages; new networks have means of zero


def test_module_given_is_left_alone(stripes):
    X, y = stripes
    module = torchvision.models.squeezenet1_1(num_classes=4).eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    size = {"size": 64, "crop": 64}
    FineTuningClassifier(module, preprocessing=size, max_epochs=1, lr=0.01).fit(X[:12], y[:12])
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not module.training


class Tied(nn.Module):
    """A network whose second stage has the weights of a layer of its first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer1 = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.MaxPool2d(2))
        self.layer2 = nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU())
        self.fc = nn.Linear(6, 3)
        self.layer2[0].weight = self.layer1[1].weight

    def forward(self, x):
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


def test_weights_shared_with_a_frozen_stage_are_frozen(stripes):
    network = Tied()
    settings = {"backbone": network, "lr": 0.05, "memory": False}
    model = small(unfreeze=1, **settings).fit(*stripes)
    weight, bias = model.net_.module_.stages[1].parameters()
    assert torch.equal(weight, network.layer2[0].weight)
    assert not torch.equal(bias, network.layer2[0].bias)
    # Where both are trained it is trained once, with the lower stage's rate.
    model = small(unfreeze="all", **settings).fit(*stripes)
    rates = [(id(p), g["lr"]) for g in model.net_.optimizer_.param_groups for p in g["params"]]
    assert len(dict(rates)) == len(rates)
    first = {dict(rates)[id(p)] for p in model.net_.module_.stages[0].parameters()}
    assert first == {min(rate for _, rate in rates)}


# -- stages by epoch -------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("unfreeze", "n_unfrozen"),
    [("gradual", [0, 1, 2, 2]), ({1: 0, 3: 1, 4: "all"}, [0, 0, 1, 2])],
    ids=str,
)
def test_stages_join_without_resetting_the_others(stripes, unfreeze, n_unfrozen):
    steps = []

    class Steps(Callback):
        def on_train_end(self, net, **kwargs):
            state = net.optimizer_.state
            for part in (net.module_.head, net.module_.stages[1], net.module_.stages[0]):
                steps.append(int(state[next(part.parameters())]["step"]))

    model = small(unfreeze=unfreeze, max_epochs=4, batch_size=64, callbacks=[Steps()])
    model.fit(*stripes)
    assert [row["n_unfrozen"] for row in model.history_] == n_unfrozen
    assert steps == [sum(n >= k for n in n_unfrozen) for k in (0, 1, 2)]


def test_an_epoch_that_is_never_reached_trains_nothing(stripes):
    settings = {"max_epochs": 3, "lr": 1e-2}
    model = small(unfreeze={1: 0, 9: "all"}, **settings).fit(*stripes)
    assert_same_model(model, small(unfreeze=0, **settings).fit(*stripes), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Fine-tuning did not improve")
def test_the_best_epoch_may_be_one_of_the_head_alone(stripes):
    X, y = stripes
    # Stages that join are driven far away; the best epoch's are the pre-trained ones.
    settings = {"unfreeze": LATER, "max_epochs": 4, "lr": 0.3, "layer_decay": 1.0}
    settings |= {"optimizer": "sgd"}
    model = small(early_stopping=True, **settings).fit(X, y, X_val=X, y_val=y)
    assert model.best_epoch_ <= 2 < model.n_iter_
    assert model.score(X, y) == pytest.approx(model.history_[model.best_epoch_]["valid_score"])
    start = small(unfreeze=0, max_epochs=0).fit(X, y)
    np.testing.assert_array_equal(model.transform(X), start.transform(X))


@pytest.mark.parametrize(
    ("unfreeze", "message"),
    [
        (9, r"unfreeze=9, but the stages below this network's head are \[.*Give at most 2"),
        ({1: 5}, r"unfreeze\[1\]=5, but the stages below this"),
        ({0: 1}, "the keys are epochs and count from 1; got 0"),
        ({1: 2, 2: 1}, "freezes stages again in epoch 2: the numbers of stages must not fall"),
        ({1: "some"}, r"unfreeze\[1\]='some' is not accepted: give a number of stages from 0 to 2"),
        ("some", "The 'unfreeze' parameter of FineTuningClassifier"),
    ],
    ids=str,
)
def test_unfreeze_is_checked(stripes, unfreeze, message):
    with pytest.raises(ValueError, match=message):
        small(unfreeze=unfreeze).fit(*stripes)


# -- frozen runs once ------------------------------------------------------------------------
@pytest.mark.parametrize("memory", [None, False])
def test_the_frozen_part_runs_once(stripes, first_inputs, memory):
    settings = {"unfreeze": 1, "head_init": "random", "memory": memory}
    small(max_epochs=4, **settings).fit(*stripes)
    assert images_through(first_inputs) == len(stripes[0])


@pytest.mark.parametrize("unfreeze", ["gradual", LATER], ids=str)
def test_epochs_of_the_head_alone_run_on_embeddings(stripes, first_inputs, unfreeze):
    X, y = stripes
    n_alone = 1 if unfreeze == "gradual" else 2
    settings = {"unfreeze": unfreeze, "max_epochs": 4, "batch_size": 16, "head_init": "random"}
    small(early_stopping=False, **settings).fit(X, y, X_val=X[:16], y_val=y[:16])
    n_epochs = (4 - n_alone) * (len(X) + 16)
    assert images_through(first_inputs) <= len(X) + 16 + n_epochs


def test_fits_of_a_search_share_frozen_results(stripes, first_inputs):
    X, y = stripes
    grid = {"lr": [1e-3, 1e-2], "layer_decay": [0.5, 1.0], "unfreeze": [1]}
    search = GridSearchCV(small(max_epochs=1), grid, cv=3, error_score="raise").fit(X, y)
    # Once for the embeddings, twice for the corners, once for the boundary, and in each of 12
    # fits the third that is scored, through a network of its own.
    assert images_through(first_inputs) <= len(X) * (1 + 2 + 1 + 4)
    alone = small(max_epochs=1, memory=False, **search.best_params_).fit(X, y)
    assert_same_model(search.best_estimator_, alone, rtol=1e-5, atol=1e-6)


def test_other_stages_sizes_and_precisions_are_computed_again(stripes, first_inputs):
    X, y = stripes

    def n_passes(**changed):
        first_inputs.clear()
        settings = {"backbone": "builtin", "unfreeze": 1, "max_epochs": 1, "head_init": "random"}
        small(**settings | changed).fit(X[:12], y[:12])
        return images_through(first_inputs)

    assert n_passes() == 12
    assert n_passes() == 0
    assert n_passes(unfreeze=2) == 12
    assert n_passes(preprocessing={"size": 32, "crop": 32}) == 12
    assert n_passes(precision="bfloat16") == 12
    embedding_store().clear()  # frees these, too
    assert n_passes() == 12


@pytest.mark.parametrize("unfreeze", [0, 1, "gradual"])
def test_kept_results_train_the_same_model_as_new_ones(stripes, unfreeze):
    fast = small(unfreeze=unfreeze, lr=1e-2).fit(*stripes)
    # An augmentation that changes nothing: the frozen stages run again in every epoch.
    slow = small(unfreeze=unfreeze, lr=1e-2, augment=nn.Identity()).fit(*stripes)
    assert_same_model(fast, slow, rtol=2e-3, atol=2e-3)
    again = small(unfreeze=unfreeze, lr=1e-2).fit(*stripes)
    assert_same_model(fast, again, rtol=1e-5, atol=1e-6)


# -- a fit that fails ------------------------------------------------------------------------
@pytest.mark.parametrize("cls", [FineTuningClassifier, FineTuningRegressor])
def test_a_fit_that_fails_leaves_a_fitted_model_as_it_was(stripes, cls):
    X, y = stripes
    is_classifier = cls is FineTuningClassifier
    model = small(cls, unfreeze=1).fit(X, y if is_classifier else X.mean(axis=(1, 2, 3)))
    before, seen = model.predict(X[:5]), set(vars(model))
    other = np.arange(4) % 2 if is_classifier else np.eye(4)
    with pytest.raises(ValueError, match="could not be read"):
        model.fit([*X[:3], b"no image"], other)
    with pytest.raises(ValueError, match="training loss became"):
        model.set_params(lr=1e30, optimizer="sgd").fit(X[:4], other)
    assert set(vars(model)) == seen
    np.testing.assert_array_equal(model.predict(X[:5]), before)
