"""Fine-tuning's options against naive references, and the checks of its parameters."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from skorch.callbacks import Callback
from test_fine_tuning import assert_same_model, small, state_of
from tiny_networks import tiny_network
from torch.nn import functional as F

from sktransfer import FineTuningClassifier, FineTuningRegressor, load_backbone
from sktransfer.fine_tuning import _weight_average
from sktransfer.fine_tuning._gradient_scaling import GradientScaling
from sktransfer.fine_tuning._losses import WeightedLoss
from sktransfer.fine_tuning._mixing import mix
from sktransfer.networks import _backbone as _backbones

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"n_jobs": 0}, "The 'n_jobs' parameter"),
        ({"memory": True}, "The 'memory' parameter"),
        ({"memory": "s3://bucket"}, "memory must be a local folder"),
        ({"device": "gpu"}, "device='gpu' is no torch device"),
        ({"precision": "int8"}, "The 'precision' parameter"),
    ],
    ids=str,
)
def test_impossible_settings_are_told_before_loading(stripes, parameters, message, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("loaded")

    monkeypatch.setattr(_backbones, "load_backbone", refuse)
    with pytest.raises(ValueError, match=message):
        small(**parameters).fit(*stripes)


@pytest.mark.parametrize("size", [0, -3, 2.5, True, "a", None, [4]], ids=str)
def test_hidden_sizes_are_positive_integers(stripes, size):
    with pytest.raises(ValueError, match=r"head=\(8, .*\) has the hidden size .*positive int"):
        small(head=(8, size)).fit(*stripes)
    small(head=(np.int64(4),), max_epochs=1).fit(*stripes)


@pytest.mark.parametrize("switch", ["backends", "conv"])
def test_the_callers_choice_of_tf32_stays(stripes, switch):
    where = torch.backends if switch == "backends" else torch.backends.cudnn.conv
    before = where.fp32_precision
    where.fp32_precision = "ieee"
    try:
        small(unfreeze=0, max_epochs=1).fit(*stripes)
        assert where.fp32_precision == "ieee"
    finally:
        where.fp32_precision = before


def test_strong_augmentation_keeps_the_range_of_what_a_function_prepared():
    from sktransfer.fine_tuning._augment import RandomViews

    x = torch.randn((8, 3, 12, 12), generator=torch.Generator().manual_seed(0))
    views = RandomViews("strong", torch.Generator().manual_seed(1))(x)
    assert views.min() < -1
    assert (views.amin((2, 3)) >= x.amin((2, 3)) - 1e-5).all()
    assert (views.amax((2, 3)) <= x.amax((2, 3)) + 1e-5).all()
    # Pixels have their colours changed, within what pixels can be.
    pixels = torch.full((8, 3, 12, 12), 200, dtype=torch.uint8)
    changed = RandomViews("strong", torch.Generator().manual_seed(1))(pixels)
    assert changed.std((1, 2, 3)).max() < 1 < changed.mean((1, 2, 3)).std()
    assert changed.min() >= 0
    assert changed.max() <= 255


# -- mixup and cutmix ------------------------------------------------------------------------
def batch_of(n=6, n_outputs=3, n_columns=2, size=9):
    """Pictures that each have one value everywhere, so that a mean tells what they are made of."""
    values = torch.arange(n, dtype=torch.float32) * 40
    x = values.view(n, 1, 1, 1, 1).expand(n, n_columns, 3, size, size + 2)
    target = torch.eye(n)[:, :n_outputs]
    weight = torch.rand(n, generator=torch.Generator().manual_seed(1)) + 0.5
    return x.to(torch.uint8), target, weight


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_rows_are_shares_of_two(kind):
    x, target, weight = batch_of()
    generator = torch.Generator().manual_seed(3)
    alphas = {"mixup": 0.0, "cutmix": 0.0, kind: 1.0}
    mixed, soft, mixed_weight = mix(x, target, weight, **alphas, generator=generator)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    mean, own, other = (t.float().mean((1, 2, 3, 4)) for t in (mixed, x, x[order]))
    moved = own != other
    share = ((mean - other) / (own - other))[moved]
    torch.testing.assert_close(share, share[:1].expand_as(share))  # one λ for the batch
    share = float(share[0])
    assert 0.05 < share < 0.95
    torch.testing.assert_close(mixed_weight, share * weight + (1 - share) * weight[order])
    # The loss is linear in the target: together that of each half with its own weight.
    scores = torch.randn(6, 3, generator=generator)
    losses = F.cross_entropy(scores, soft, reduction="none") * mixed_weight
    expected = share * weight * F.cross_entropy(scores, target, reduction="none") + (
        1 - share
    ) * weight[order] * F.cross_entropy(scores, target[order], reduction="none")
    torch.testing.assert_close(losses, expected)
    if kind == "cutmix":
        assert mixed.dtype == torch.uint8
        is_pasted = (mixed != x)[moved]
        assert (is_pasted == is_pasted[:1, :1, :1]).all()  # the same box in each row and column
        rows, columns = is_pasted[0, 0, 0].any(1), is_pasted[0, 0, 0].any(0)
        assert torch.equal(is_pasted[0, 0, 0], rows[:, None] & columns[None, :])
        assert all(part.int().diff().abs().sum() <= 2 for part in (rows, columns))


def test_both_take_turns():
    x, target, weight = batch_of()
    generator = torch.Generator().manual_seed(0)
    n_cut = sum(
        mix(x, target, weight, 1.0, 1.0, generator)[0].dtype == torch.uint8 for _ in range(200)
    )
    assert 70 < n_cut < 130


def test_the_whole_picture_may_stay():
    x, target, weight = batch_of()
    generator = torch.Generator().manual_seed(0)
    mixed, soft, mixed_weight = mix(x, target, weight, 0.0, 1e-6, generator)
    kept = torch.equal(mixed, x)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    assert kept or torch.equal(mixed[..., 4:5, 5:6], x[order][..., 4:5, 5:6])
    assert torch.isfinite(soft).all()
    assert torch.isfinite(mixed_weight).all()


@pytest.mark.parametrize("unfreeze", [0, 1])
@pytest.mark.parametrize("kind", ["labels", "indicators", "numbers"])
def test_cutmix_trains(stripes, kind, unfreeze):
    X, y = stripes
    weight = np.linspace(0.5, 2, len(X))
    cls = FineTuningRegressor if kind == "numbers" else FineTuningClassifier
    indicators = np.stack([y == "down", y != "plain"], axis=1).astype(int)
    target = {"labels": y, "indicators": indicators, "numbers": X.mean(axis=(1, 2, 3))}[kind]
    plain = small(cls, unfreeze=unfreeze).fit(X, target, weight)
    both = small(cls, unfreeze=unfreeze, cutmix=1.0, mixup=0.2).fit(X, target, weight)
    again = small(cls, unfreeze=unfreeze, cutmix=1.0, mixup=0.2).fit(X, target, weight)
    assert_same_model(both, again, rtol=0, atol=0)
    assert both.score(X, target) > plain.score(X, target) - 0.3
    head = [m._tuned.head.linear.weight for m in (plain, both)]
    assert not torch.equal(*head)


# -- averages --------------------------------------------------------------------------------
class Steps(Callback):
    """The trained weights after each step."""

    def __init__(self):
        self.seen = []

    def on_batch_end(self, net, training=False, **kwargs):
        if training:
            self.seen.append({k: v.clone() for k, v in net.module_.state_dict().items()})

    def __deepcopy__(self, memo):
        return self  # the test's own


def average_of(steps, kind, max_epochs):
    if kind == "last":
        n_first = int(0.75 * max_epochs) * len(steps) // max_epochs
        kept = steps[n_first:]
        return {k: sum(s[k].double() for s in kept) / len(kept) for k in kept[0]}
    decay = 1 - 10 / len(steps)
    mean = {k: v.double() for k, v in steps[0].items()}
    for step in steps[1:]:
        mean = {k: decay * mean[k] + (1 - decay) * step[k] for k in mean}
    return mean


@pytest.mark.parametrize("unfreeze", [0, 1, "gradual"])
@pytest.mark.parametrize("kind", ["ema", "last"])
def test_weights_are_averaged(stripes, kind, unfreeze):
    X, y = stripes
    steps = Steps()
    settings = {"unfreeze": unfreeze, "lr": 0.01, "max_epochs": 6, "batch_size": 8}
    settings["batch_norm"] = "moving"
    model = small(weight_averaging=kind, callbacks=[steps], **settings).fit(X, y)
    expected = average_of(steps.seen, kind, 6)
    state = model.net_.module_.state_dict()
    assert len(steps.seen) == 36
    for name, value in state.items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(value, steps.seen[-1][name]) for name, value in state.items())
    # The steps themselves are those of a training without averages.
    plain = Steps()
    small(callbacks=[plain], **settings).fit(X, y)
    for name, value in plain.seen[-1].items():
        assert torch.equal(value, steps.seen[-1][name]), name
    if unfreeze == 1:  # what never trains stays bit-identical
        for name, value in (
            load_backbone(tiny_network, preprocessing=model.preprocessing)
            .network.module[0]
            .state_dict()
            .items()
        ):
            assert torch.equal(model._tuned._root.state_dict()[f"0.{name}"], value)
    copied = pickle.loads(pickle.dumps(model))
    assert_same_model(model, copied, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["ema", "last"])
def test_the_average_is_validated_and_kept(stripes, kind):
    X, y = stripes
    model = small(weight_averaging=kind, lr=0.01, max_epochs=5, batch_size=8, random_state=1)
    model.fit(X[:30], y[:30], X_val=X[30:], y_val=y[30:])
    scores = {row["epoch"]: row["valid_score"] for row in model.history_}
    assert scores[model.best_epoch_] == max(scores.values())
    assert model.score(X[30:], y[30:]) == pytest.approx(max(scores.values()))
    losses = {row["epoch"]: row["valid_loss"] for row in model.history_}
    proba = model.predict_proba(X[30:])
    own = proba[np.arange(18), np.searchsorted(model.classes_, y[30:])]
    assert -np.log(own).mean() == pytest.approx(losses[model.best_epoch_], rel=1e-4)
    before = model.n_iter_
    model.partial_fit(X[:30], y[:30])
    assert model.n_iter_ == before + 1


def weights_of(model):
    return {k: v.double() for k, v in model.net_.module_.state_dict().items()}


@pytest.mark.parametrize(
    ("unfreeze", "rows", "share"),
    [(1, None, 0.5), ("all", None, 0.5), ("gradual", (40, 56), 0.625), (1, (4, 40), 0.75)],
)
def test_wise_ft_is_half_way_or_further(stripes, unfreeze, rows, share, monkeypatch):
    X, y = stripes  # 48 rows
    if rows is not None:
        monkeypatch.setattr(_weight_average, "_WISE_FT_ROWS", rows)
    settings = {"unfreeze": unfreeze, "lr": 0.01, "max_epochs": 4, "random_state": 0}
    settings |= {"batch_size": 8, "batch_norm": "moving", "probe_views": 3}
    start, end, averaged = (
        weights_of(small(**settings | changed).fit(X, y))
        for changed in (
            {"max_epochs": 0, "unfreeze": "all"},
            {"weight_averaging": None},
            {"weight_averaging": "wise_ft"},
        )
    )
    assert any(not torch.equal(start[name], end[name]) for name in start)
    for name, value in averaged.items():
        # A head that is trained alone at first begins where the stages join it.
        is_moved = unfreeze == "gradual" and name.startswith("head")
        if not name.endswith("num_batches_tracked") and not is_moved:
            expected = (1 - share) * start[name] + share * end[name]
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


def test_when_auto_averages(stripes):
    X, y = stripes
    settings = {"unfreeze": 1, "lr": 0.01, "max_epochs": 2, "random_state": 0}

    def is_same(kind, val=None, **changed):
        rows = {} if val is None else {"X_val": X[val:], "y_val": y[val:]}
        one, other = (
            weights_of(small(weight_averaging=k, **settings | changed).fit(X, y, **rows))
            for k in ("auto", kind)
        )
        return all(torch.equal(one[name], other[name]) for name in one)

    assert is_same("wise_ft")
    assert not is_same(None)
    assert is_same(None, val=30)  # a validation part chooses the epoch
    assert is_same(None, head_init="random")
    assert is_same(None, unfreeze=0)
    assert is_same(None, backbone="builtin", weights=None, preprocessing="auto")


# -- learning rate ---------------------------------------------------------------------------
def network_without_norms():
    network = tiny_network()
    network[4] = torch.nn.Identity()
    return network


@pytest.mark.parametrize(
    ("backbone", "unfreeze", "lr"),
    [(tiny_network, 1, 3e-4), (network_without_norms, 1, 1e-4), (network_without_norms, 0, 3e-4)],
)
def test_auto_learns_more_slowly_where_nothing_normalises(stripes, backbone, unfreeze, lr):
    X, y = stripes
    settings = {"backbone": backbone, "unfreeze": unfreeze, "random_state": 0}
    auto, given = (small(**settings, lr=rate).fit(X, y) for rate in ("auto", lr))
    assert_same_model(auto, given, rtol=0, atol=0)
    assert not np.array_equal(
        auto.predict_proba(X), small(**settings, lr=lr * 2).fit(X, y).predict_proba(X)
    )


# -- precision -------------------------------------------------------------------------------
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_ends_near_float32(stripes, precision):
    X, y = stripes
    settings = {"unfreeze": 1, "lr": 0.03, "l2_sp": 0.1, "gradient_clip": 5.0, "max_epochs": 4}
    settings |= {"head_init": "random", "optimizer": "sgd"}  # Adam makes whole steps of noise
    full = small(**settings).fit(X, y)
    half = small(precision=precision, **settings).fit(X, y)
    start = small(**{**settings, "max_epochs": 0}).fit(X, y)
    states = [state_of(model) for model in (full, half, start)]
    way, apart = (
        np.sqrt(sum(((states[0][k] - other[k]) ** 2).sum() for k in other))
        for other in (states[2], states[1])
    )
    assert apart < 0.1 * way
    assert {v.dtype for v in states[1].values()} <= {np.dtype("float32"), np.dtype("int64")}
    np.testing.assert_allclose(half.predict_proba(X), full.predict_proba(X), atol=0.1)


def test_precision_may_change_from_fit_to_fit(stripes):
    model = small(unfreeze=1, warm_start=True).fit(*stripes)
    model.set_params(precision="float16").fit(*stripes)
    assert model.net_.module_.precision == "float16"
    names = [name for name, callback in model.net_.callbacks_ if name == "gradient_scaling"
             and isinstance(callback, GradientScaling)]  # fmt: skip
    assert names == ["gradient_scaling"]
    assert pickle.loads(pickle.dumps(model)).net_.module_.precision == "float16"


def test_small_gradients_survive_and_overflowing_steps_are_left_out():
    """Against the loss times the scale by hand, with a network of one float16 weight."""
    loss_of = WeightedLoss("regression")
    linear = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(linear.weight)
    optimizer = torch.optim.SGD(linear.parameters(), lr=1.0, momentum=0.9)
    net = SimpleNamespace(criterion_=loss_of, optimizer_=optimizer)
    scaling = GradientScaling(torch.device("cpu"))
    scaling.on_train_begin(net)
    x, ones = torch.ones(4, 1), torch.ones(4)

    def step(distance):
        optimizer.zero_grad()
        scores = linear(x).half()  # the gradient goes through float16 here
        loss = loss_of((scores.float(), ones), torch.full((4, 1), -distance))
        loss.backward()
        scaling.on_grad_computed(net)
        return loss

    loss = step(1e-7)  # 5e-8 a row, which float16 rounds to 6e-8
    torch.testing.assert_close(loss, torch.tensor(1e-14), rtol=1e-2, atol=0)
    torch.testing.assert_close(linear.weight.grad, torch.tensor([[2e-7]]), rtol=1e-2, atol=0)
    before = linear.weight.detach().clone()
    scale = scaling.scaler.get_scale()
    step(1e6)
    assert linear.weight.grad is None
    optimizer.step()
    assert torch.equal(linear.weight, before)
    assert scaling.scaler.get_scale() == scale / 2
    scaling.on_train_end(net)
    assert loss_of.scale_gradient is None


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_on_cuda(stripes, precision):
    X, y = stripes
    full = small(unfreeze=1, lr=1e-3, device="cuda").fit(X, y)
    half = small(unfreeze=1, lr=1e-3, device="cuda", precision=precision).fit(X, y)
    np.testing.assert_allclose(half.predict_proba(X), full.predict_proba(X), atol=0.1)
