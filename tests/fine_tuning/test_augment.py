"""Augmentation: the library's own, a function of one image, and torchvision's transforms."""

import numpy as np
import pytest
import torch
from skorch.callbacks import Callback
from small_models import assert_same_model, small
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2

from sktransfer import FineTuningClassifier, FineTuningRegressor

AS_THEY_ARE = {"size": 20, "crop": 20, "mean": [0] * 3, "std": [1] * 3}  # images in 0…1
MIXES = {
    "mixup": v2.MixUp,
    "cutmix": v2.CutMix,
    "either": lambda **settings: v2.RandomChoice([v2.MixUp(**settings), v2.CutMix(**settings)]),
    "apply": lambda **settings: v2.RandomApply([v2.CutMix(**settings)], p=1.0),
    "order": lambda **settings: v2.RandomOrder([v2.RandomHorizontalFlip(), v2.MixUp(**settings)]),
}


def trained_on(first_inputs, X, y, **parameters):
    """The images that enter a network in one epoch of training."""
    first_inputs.clear()
    settings = {"head_init": "random", "max_epochs": 1, "preprocessing": AS_THEY_ARE}
    small(**settings | parameters).fit(X, y)
    return torch.cat(first_inputs)


# -- of one image ----------------------------------------------------------------------------
def test_augmentation_is_for_training_alone(stripes):
    X, y = stripes
    calls = []

    def augment(image):
        calls.append((image.dtype, tuple(image.shape)))
        return image

    model = small(augment=augment, max_epochs=3, early_stopping=False)
    model.fit(X[:40], y[:40], X_val=X[40:], y_val=y[40:])
    assert len(calls) == 3 * 40
    assert set(calls) == {(torch.uint8, (3, 16, 16))}
    model.predict(X)
    assert len(calls) == 3 * 40


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        (lambda image: image[:, 1:], r"augment returned an image of shape \(3, 15, 16\) for one"),
        ([nn.Identity(), "medium"], "augment holds 'medium': 'light', 'strong', a callable of one"),
        (v2.RandomHorizontalFlip, r"augment holds <class .*Flip'>: .* \(an instance\), or a list"),
        (lambda image: image / 255, r"augment returned torch.float32 for a uint8 image"),
    ],
    ids=["shape", "list", "class", "dtype"],
)
def test_augmentations_are_checked(stripes, augment, message):
    with pytest.raises(ValueError, match=message):
        small(augment=augment).fit(*stripes)


@pytest.mark.parametrize("strength", ["light", "strong"])
def test_own_strengths_change_images_differently_in_each_epoch(stripes, first_inputs, strength):
    X, y = stripes
    settings = {"augment": strength, "batch_size": 48, "max_epochs": 2}
    epochs = trained_on(first_inputs, X, y, **settings).split(48)
    assert len(epochs) == 2
    assert epochs[0].min() >= 0
    assert epochs[0].max() <= 1
    assert not torch.equal(epochs[0].sort(0)[0], epochs[1].sort(0)[0])
    again = trained_on(first_inputs, X, y, **settings)
    assert torch.equal(torch.cat(epochs), again)  # repeatable
    other = trained_on(first_inputs, X, y, **settings, random_state=1)
    assert not torch.equal(again, other)


def test_strong_changes_colours_of_pixels_but_not_of_what_a_function_prepared(first_inputs):
    n = 12
    X = [np.full((20, 20, 3), 150 + i, dtype=np.uint8) for i in range(n)]
    y = np.arange(n) % 2
    changed = trained_on(first_inputs, X, y, augment="strong")
    assert changed.std((1, 2, 3)).max() < 0.01 < changed.mean((1, 2, 3)).std()
    x = np.random.default_rng(0).normal(size=(n, 20, 20, 3)).astype(np.float32)

    def prepare(image):
        return x[image[0, 0, 0] % n].transpose(2, 0, 1)

    views = trained_on(first_inputs, X, y, augment="strong", preprocessing=prepare)
    assert views.min() < -1  # not cut to what pixels can be
    assert views.amin() >= x.min() - 1e-5
    assert views.amax() <= x.max() + 1e-5


# -- torchvision's transforms ----------------------------------------------------------------
def test_transforms_and_lists_of_them(stripes):
    def mirrored(image):
        return image.flip(-1)

    left = v2.RandomHorizontalFlip(p=1.0)
    expected = small(augment=mirrored, lr=0.01).fit(*stripes)
    for augment in (left, [left], [mirrored], v2.Compose([left])):
        model = small(augment=augment, lr=0.01).fit(*stripes)
        assert_same_model(model, expected, rtol=1e-6)
    both = [left, v2.RandomVerticalFlip(p=1.0)]
    turned = small(augment=lambda image: image.flip(-1, -2), lr=0.01).fit(*stripes)
    assert_same_model(small(augment=both, lr=0.01).fit(*stripes), turned, rtol=1e-6)


@pytest.mark.parametrize("before", ["light", "strong", v2.MixUp(), v2.CutMix()], ids=str)
def test_each_step_of_a_list_takes_uint8(coded, before):
    """A transform takes floats as 0…1, and "light" and mixes compute floats in 0…255."""
    seen = []

    def note(image):
        seen.append((image.dtype, int(image.max())))
        return image

    X, k = coded
    small(augment=[before, note], max_epochs=1).fit(X, k)
    assert {dtype for dtype, _ in seen} == {torch.uint8}
    assert max(largest for _, largest in seen) > 1


def test_a_transform_beside_a_mix_takes_floats_up_to_1(coded, first_inputs):
    X, k = coded
    augment = v2.RandomOrder([v2.ColorJitter(brightness=(0.9, 0.9)), v2.MixUp()])
    darker = trained_on(first_inputs, X, k, augment=augment)
    plain = trained_on(first_inputs, X, k)
    assert darker.mean() == pytest.approx(0.9 * float(plain.mean()), rel=1e-3)


def test_a_function_may_return_an_array(coded, first_inputs):
    """Also one with negative strides, as a flip by NumPy gives."""
    arrays = trained_on(first_inputs, *coded, augment=lambda image: np.flip(image.numpy(), -1))
    tensors = trained_on(first_inputs, *coded, augment=lambda image: image.flip(-1))
    assert torch.equal(arrays, tensors)


def test_an_error_of_a_function_names_it(stripes):
    with pytest.raises(RuntimeError) as caught:
        small(augment=lambda image: None).fit(*stripes)
    assert "must turn a tensor of one image into another" in caught.value.__notes__[0]


def test_transforms_are_repeatable(stripes):
    augment = [v2.RandomResizedCrop(16, scale=(0.5, 1.0)), v2.MixUp(num_classes=3)]
    before = torch.get_rng_state()
    one, other = (small(augment=augment, lr=0.01).fit(*stripes) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_model(one, other, rtol=0, atol=0)
    third = small(augment=augment, lr=0.01, random_state=1).fit(*stripes)
    assert not np.allclose(third.predict_proba(stripes[0]), one.predict_proba(stripes[0]))


# -- MixUp and CutMix ------------------------------------------------------------------------
@pytest.fixture
def shades():
    """Images of class k have the value 100 · k nearly everywhere: their mean shows a mix."""
    k = np.arange(24) % 3
    X = np.tile((100 * k[:, None, None, None]).astype(np.uint8), (1, 20, 20, 3))
    X[np.arange(24), 10, 10, 0] += np.arange(24, dtype=np.uint8)  # so that no two are equal
    return X, k


@pytest.mark.parametrize("is_in_a_list", [False, True])
@pytest.mark.parametrize("kind", MIXES)
def test_images_and_targets_are_mixed_alike(shades, first_inputs, kind, is_in_a_list):
    X, k = shades
    targets = []

    def loss(scores, target):
        if scores.requires_grad:
            targets.append(target)
        else:
            assert target.dtype == torch.int64  # validation rows stay as they are
        return F.cross_entropy(scores, target, reduction="none")

    mix = MIXES[kind](num_classes=3, alpha=1.0)
    settings = {"augment": [v2.RandomHorizontalFlip(), mix] if is_in_a_list else mix}
    settings |= {"preprocessing": AS_THEY_ARE, "head_init": "random", "max_epochs": 4}
    settings |= {"batch_size": 12, "early_stopping": False}
    small(loss=loss, **settings).fit(X, k, X_val=X[:2], y_val=k[:2])
    x, target = torch.cat(first_inputs), torch.cat(targets)
    assert len(targets) == 8
    assert target.shape == (96, 3)
    assert target.dtype == torch.float32
    torch.testing.assert_close(target.sum(1), torch.ones(96))
    expected = target @ torch.tensor([0.0, 100.0, 200.0])
    torch.testing.assert_close(x.mean((1, 2, 3)) * 255, expected, rtol=0, atol=1.0)
    is_mixed = target.max(1)[0] < 0.999
    assert is_mixed.float().mean() > 0.3
    if kind == "cutmix":  # pieces of images rather than a blend of them
        shade = (x[is_mixed] * 255 / 100).round() * 100
        assert ((x[is_mixed] * 255 - shade).abs() < 1).float().mean() > 0.99


@pytest.mark.parametrize("kind", MIXES)
def test_weights_are_mixed_like_targets(coded, kind):
    """Together the rows of a batch weigh as much in each class as before they were mixed."""
    X, k = coded
    weight = np.linspace(0.5, 2, len(X))
    seen = []

    class Note(Callback):
        def on_batch_end(self, net, batch=None, training=False, **kwargs):
            seen.append((batch[0]["weight"][:, None] * batch[1]).sum(0))

    settings = {"batch_size": 64, "callbacks": [Note()], "lr": 0.01}
    mixed = small(augment=MIXES[kind](num_classes=3), **settings).fit(X, k, weight)
    expected = np.bincount(k, weights=weight / weight.mean())
    np.testing.assert_allclose(torch.stack(seen), [expected] * 2, rtol=1e-5)
    plain = small(augment=nn.Identity(), batch_size=64, lr=0.01).fit(X, k, weight)
    assert not np.allclose(mixed.predict_proba(X), plain.predict_proba(X))


@pytest.mark.parametrize("kind", MIXES)
def test_a_mix_is_for_one_label_per_row(coded, kind):
    X, k = coded
    mix = MIXES[kind](num_classes=3)
    message = "augment holds (MixUp|CutMix).*, which mixes classes, but y holds "
    for augment in (mix, [v2.RandomHorizontalFlip(), mix]):
        with pytest.raises(ValueError, match=f"{message}numbers"):
            small(FineTuningRegressor, augment=augment).fit(X, k)
        with pytest.raises(ValueError, match=f"{message}several labels per row"):
            small(FineTuningClassifier, augment=augment).fit(X, np.eye(3, dtype=int)[k])
    with pytest.raises(ValueError, match="num_classes=5, but y has 3 classes: give num_classes=3"):
        small(augment=MIXES[kind](num_classes=5)).fit(X, k)
