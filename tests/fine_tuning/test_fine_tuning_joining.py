"""Fine-tuning whose stages join in later epochs, or share what they are made of."""

import numpy as np
import pytest
import torch
from test_fine_tuning import assert_same_model, small, state_of
from torch import nn

from sktransfer.fine_tuning._module import TunedModule

pytestmark = pytest.mark.usefixtures("one_thread")

LATER = {1: 0, 3: "all"}


@pytest.fixture
def passes(monkeypatch):
    """Whether each batch is embedded already, or went through stages."""
    seen = []
    run, embed = TunedModule._run, TunedModule.embed
    monkeypatch.setattr(
        TunedModule, "_run", lambda self, *args: seen.append("stages") or run(self, *args)
    )
    monkeypatch.setattr(
        TunedModule, "embed", lambda self, x: seen.append("batch") or embed(self, x)
    )
    return seen


@pytest.mark.parametrize("head_init", ["linear_probe", "random"])
@pytest.mark.parametrize("unfreeze", ["gradual", LATER], ids=str)
def test_epochs_of_the_head_alone_run_on_embeddings(stripes, passes, unfreeze, head_init):
    X, y = stripes
    model = small(
        unfreeze=unfreeze, head_init=head_init, max_epochs=4, batch_size=16, lr=1e-2,
        early_stopping=False,
    )  # fmt: skip
    model.fit(X, y, X_val=X[:16], y_val=y[:16])
    # Of the epochs 0 to 4: one validation batch each, three of training from 1 on.
    assert passes.count("batch") == 5 + 12
    n_alone = 1 if unfreeze == "gradual" else 2
    assert passes.count("stages") == (4 - n_alone) * (3 + 1)
    # A function that changes nothing makes "new" pictures: all of it runs in each epoch.
    slow = small(**model.get_params() | {"augment": nn.Identity()})
    slow.fit(X, y, X_val=X[:16], y_val=y[:16])
    if head_init == "linear_probe":
        assert_same_model(model, slow, rtol=1e-3, atol=1e-5)
    losses = [[row["valid_loss"] for row in m.history_] for m in (model, slow)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Fine-tuning did not improve")
def test_the_best_epoch_may_be_one_of_the_head_alone(stripes):
    X, y = stripes
    settings = {"unfreeze": LATER, "max_epochs": 4}
    # What joins is driven far away; the best epoch's stages are the pre-trained ones.
    settings |= {"lr": 0.1, "layer_decay": 1.0, "optimizer": "sgd", "lr_schedule": "constant"}
    model = small(early_stopping=True, **settings).fit(X, y, X_val=X, y_val=y)
    assert model.best_epoch_ <= 2 < model.n_iter_
    np.testing.assert_allclose(
        model.score(X, y), model.history_[model.best_epoch_]["valid_score"], atol=1e-12
    )
    np.testing.assert_array_equal(
        model.transform(X), small(unfreeze=0, max_epochs=0).fit(X, y).transform(X)
    )
    moved = small(early_stopping=False, weight_averaging=None, **settings).fit(X, y)
    assert np.abs(moved.transform(X) - model.transform(X)).max() > 0.1


def test_an_epoch_that_is_never_reached_trains_nothing(stripes):
    X, y = stripes
    settings = {"max_epochs": 3, "lr": 1e-2}
    model = small(unfreeze={1: 0, 9: "all"}, **settings).fit(X, y)
    assert_same_model(model, small(unfreeze=0, **settings).fit(X, y), rtol=0, atol=0)
    for _ in range(6):
        model.partial_fit(X, y)
    assert [row["n_unfrozen"] for row in model.history_] == [0] * 8 + [2]


class Tied(nn.Module):
    """A network whose third stage has the weights of a layer of its first."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2),
        )  # fmt: skip
        self.second = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.third = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Linear(6, 3)
        for parameter in self.parameters():
            parameter.data.normal_(std=0.3, generator=generator)
        self.third[0].weight = self.first[2].weight

    def forward(self, x):
        return self.head(self.third(self.second(self.first(x))).mean((2, 3)))


def test_what_a_frozen_stage_shares_stands_still(stripes):
    X, y = stripes
    settings = {"backbone": Tied(), "lr": 0.05, "max_epochs": 3, "memory": False}
    fast = small(unfreeze=1, **settings).fit(X, y)
    slow = small(unfreeze=1, augment=nn.Identity(), **settings).fit(X, y)
    assert_same_model(fast, slow, rtol=1e-3, atol=1e-5)
    shared = settings["backbone"].first[2].weight
    trained = state_of(fast)
    name = next(key for key in trained if key.endswith("third.0.weight"))
    np.testing.assert_array_equal(trained[name], shared.detach().numpy())
    assert np.abs(trained[name.replace("weight", "bias")]).max() > 0
    # Trained once, with the lowest stage's rate, where both are.
    groups = small(unfreeze="all", **settings).fit(X, y).net_.optimizer_.param_groups
    assert [group["stage"] for group in groups for p in group["params"] if p.shape == shared.shape]
    held = [(group["stage"], p) for group in groups for p in group["params"]]
    assert len({id(p) for _, p in held}) == len(held)
    lowest = groups[-1]["stage"]
    assert [stage for stage, p in held if p.shape == (6, 6, 3, 3)].count(lowest) == 1


def test_frozen_parts_of_a_head_are_in_no_group(stripes):
    X, y = stripes
    first = nn.Linear(6, 4).requires_grad_(False)
    head = nn.Sequential(first, nn.Linear(4, 3))
    model = small(head=head, unfreeze=0, lr=0.1, weight_decay=0.5).fit(X, y)
    n_trained = sum(len(group["params"]) for group in model.net_.optimizer_.param_groups)
    assert n_trained == 2
    np.testing.assert_array_equal(state_of(model)["head.0.weight"], first.weight.numpy())


@pytest.mark.parametrize("augment", [None, "light"])
def test_auto_rate_of_a_head_alone_is_the_same_for_every_network(stripes, augment):
    def without_norms():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        )

    model = small(backbone=without_norms(), augment=augment, unfreeze=0).fit(*stripes)
    assert model.net_.optimizer_.param_groups[0]["base_lr"] == 3e-4


class Shifted(nn.Module):
    """Adds what a network of windows keeps: a tensor of five dimensions."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shifts", torch.ones(1, 1, 4, 1, 1))

    def forward(self, x):
        return x + self.shifts[0]


def test_tensors_of_more_than_four_dimensions(stripes):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), Shifted(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 3),
    )  # fmt: skip
    model = small(backbone=network, lr=1e-2).fit(*stripes)
    assert model.score(*stripes) > 0.4
