"""The head, its loss, and the linear probe from which it starts."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Sequence
from numbers import Integral

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from torch import nn
from torch.nn import functional as F

from sktransfer._progress import shown
from sktransfer._threads import global_state_lock
from sktransfer.networks._backbone import Backbone

Loss = str | Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Values of C to be tried on a held-out quarter; _C_FEW_ROWS if there are too few rows for that.
_C = (0.001, 0.01, 0.1, 1.0)
_C_FEW_ROWS = 0.1
_ALPHAS = tuple(10.0**p for p in range(-1, 6))
_MAX_ITER = 300
# Enlarged corners of an image: their share of its sides, and their positions (down, right). They
# are not mirrored, because a mirrored "b" is a "d".
_CORNER = 0.85
_CORNERS = ((0.0, 0.0), (1.0, 1.0))


class LinearHead(nn.Module):
    """A linear layer and, with `hidden`, a perceptron whose output is added to it.

    The perceptron's last layer starts at zero, so that the head starts as its linear layer.
    `dropout` is the share of the embedding, and of each hidden layer, that is dropped.
    """

    def __init__(self, n_in: int, n_out: int, hidden: Sequence[int] = (), dropout: float = 0.0):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(n_in, n_out)
        self.hidden: nn.Sequential | None = None
        if hidden:
            layers: list[nn.Module] = []
            sizes = [n_in, *hidden]
            for width, next_width in itertools.pairwise(sizes):
                layers += [nn.Linear(width, next_width), nn.ReLU(), nn.Dropout(dropout)]
            last = nn.Linear(sizes[-1], n_out)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.hidden = nn.Sequential(*layers, last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dropout(x)
        out = self.linear(x)
        return out if self.hidden is None else out + self.hidden(x)

    def start_from(self, coef: np.ndarray, intercept: np.ndarray) -> None:
        """Set the linear layer to a fitted linear model."""
        with torch.no_grad():
            self.linear.weight.copy_(torch.as_tensor(coef))
            self.linear.bias.copy_(torch.as_tensor(intercept))


def make_head(
    head: str | Sequence[int] | nn.Module, n_in: int, n_out: int, dropout: float
) -> nn.Module:
    """Make the head of the parameter ``head``; a module is checked and copied."""
    if isinstance(head, str):
        return LinearHead(n_in, n_out, (), dropout)
    if isinstance(head, (tuple, list)):
        for size in head:
            if not isinstance(size, Integral) or isinstance(size, bool) or size < 1:
                raise ValueError(
                    f"head={head!r} has the hidden size {size!r}: give positive integers, as in "
                    'head=(256,), or "linear" for no hidden layer.'
                )
        return LinearHead(n_in, n_out, tuple(head), dropout)
    return _checked_copy(head, n_in, n_out)


def _checked_copy(head: object, n_in: int, n_out: int) -> nn.Module:
    """Copy a user's module to the CPU; raise ValueError if it cannot be trained as the head."""
    takes = f"A head takes float32 embeddings (n, {n_in}) and returns float32 scores (n, {n_out})"
    if not isinstance(head, nn.Module):
        is_class = isinstance(head, type)
        what = "a class: give an instance of it" if is_class else "not a torch.nn.Module"
        raise ValueError(f"head={shown(head)} is {what}. {takes}.")
    try:
        own = copy.deepcopy(head).cpu().eval()
        x = torch.zeros(2, n_in, device="cpu", requires_grad=True)
        with torch.enable_grad():
            scores = own(x)
            copy.deepcopy(own).double()(x.double())  # as in predictions
    except Exception as error:
        raise ValueError(
            f"head={shown(head)} fails on embeddings of shape (2, {n_in}) ({type(error).__name__}: "
            f"{error}). {takes}, and computes in float64 after double(). "
            "With layer=None the embeddings are those of the last stage alone."
        ) from error
    got = f"an object of type {type(scores).__name__}"
    if isinstance(scores, torch.Tensor):
        got = _described(scores, "scores")
        if scores.shape == (2, n_out) and scores.dtype == torch.float32:
            if scores.requires_grad and any(True for _ in own.parameters()):
                return own
            got = "scores that depend on no parameter of it"
    raise ValueError(
        f"head={shown(head)} returns {got} for 2 embeddings of {n_in} columns. {takes}."
    )


class WeightedLoss(nn.Module):
    """Mean of weight · loss over a batch; the weights of the whole training set have a mean of 1.

    `loss` is ``"auto"`` (cross-entropy; binary cross-entropy, averaged over labels; squared
    error, averaged over targets), ``"huber"``, or takes scores and targets and returns a value
    per row.
    """

    def __init__(self, kind: str, loss: Loss = "auto"):
        super().__init__()
        if isinstance(loss, type):
            raise TypeError(f"loss={loss!r} is a class: give an instance of it.")
        self.kind = kind
        self.loss = copy.deepcopy(loss) if isinstance(loss, nn.Module) else loss

    def forward(
        self, y_pred: tuple[torch.Tensor, torch.Tensor], target: torch.Tensor
    ) -> torch.Tensor:
        scores, weight = y_pred
        given = f"{_described(scores, 'scores')} and {_described(target, 'targets')}"
        try:
            losses = self._losses(scores, target)
        except Exception as error:
            error.add_note(f"loss={shown(self.loss)} was called with {given}.")
            raise
        got, advice = "", ""
        if not isinstance(losses, torch.Tensor):
            got = shown(losses)
        elif scores.requires_grad and not losses.requires_grad:
            got = f"{_described(losses)} that depend on no score"
        elif losses.ndim == 0:
            if not ((weight - 1).abs() > 1e-6).any():
                return losses
            got = "a single number for a batch whose rows have different weights"
            advice = (
                " Weights come from sample_weight, class_weight and equal images, which become one "
                'row; losses of torch take reduction="none".'
            )
        # A value for each score is averaged over a row; (n, n) is the result of a wrong broadcast.
        elif len(losses) != len(weight) or losses.numel() not in (len(weight), scores.numel()):
            got = _described(losses)
        if got:
            raise (ValueError if isinstance(losses, torch.Tensor) else TypeError)(
                f"loss={shown(self.loss)} returns {got} for {given}: it must return a tensor with "
                f"one value per row.{advice}"
            )
        return (losses.float().reshape(len(weight), -1).mean(1) * weight).mean()

    def _losses(self, scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if callable(self.loss):
            return self.loss(scores, target)
        if self.loss == "huber":
            return F.huber_loss(scores, target, reduction="none")
        if self.kind == "multiclass":
            return F.cross_entropy(scores, target, reduction="none")
        if self.kind == "multilabel":
            return F.binary_cross_entropy_with_logits(scores, target, reduction="none")
        return (scores - target).square()


def _described(tensor: torch.Tensor, noun: str = "values") -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {noun} of shape {tuple(tensor.shape)}"


def validation_score(
    kind: str, scores: np.ndarray, target: np.ndarray, weight: np.ndarray
) -> float:
    """Return the accuracy (of whole rows of labels), or R² averaged over targets."""
    if kind == "multiclass":
        return float(np.average(scores.argmax(1) == target, weights=weight))
    if kind == "multilabel":
        return float(np.average(((scores > 0) == (target > 0.5)).all(1), weights=weight))
    residual = np.average((scores - target) ** 2, axis=0, weights=weight)
    mean = np.average(target, axis=0, weights=weight)
    spread = np.average((target - mean) ** 2, axis=0, weights=weight)
    return float(np.mean(1 - residual / np.where(spread > 0, spread, 1.0)))


# -- the linear probe ----------------------------------------------------------------------------
class CornerViews(Backbone):
    """A backbone that embeds enlarged corners of each image, one after another."""

    def __init__(self, backbone: Backbone):
        vars(self).update(vars(backbone))
        self._whole = backbone
        self.feature_groups = list(backbone.feature_groups) * len(_CORNERS)
        self.n_features = backbone.n_features * len(_CORNERS)
        self.group_fingerprints = [
            f"{fingerprint}-corner{k}"
            for k in range(len(_CORNERS))
            for fingerprint in backbone.group_fingerprints
        ]

    def inference_module(self, device="cpu", precision="float32"):
        network = self._whole.inference_module(device, precision)
        return lambda x: [part for corner in _CORNERS for part in network(_enlarged(x, *corner))]


def _enlarged(x: torch.Tensor, down: float, right: float) -> torch.Tensor:
    height, width = x.shape[-2:]
    h, w = max(1, round(_CORNER * height)), max(1, round(_CORNER * width))
    top, left = int(down * (height - h)), int(right * (width - w))
    part = x[..., top : top + h, left : left + w].float()
    large = F.interpolate(part, (height, width), mode="bilinear", align_corners=False)
    return large.round().to(x.dtype) if x.dtype == torch.uint8 else large


def fit_probe(
    rows: np.ndarray,
    target: np.ndarray,
    weight: np.ndarray,
    kind: str,
    n_outputs: int,
    rng: np.random.RandomState,
) -> tuple[np.ndarray, np.ndarray]:
    """Fit a linear model on standardised embeddings and fold the scaling into it.

    With z = (x - μ) / σ, the model w·z + b is (w / σ)·x + b - w·(μ / σ). Of the `rows`, (n,
    n_views, n_features), the first view chooses the strength of the regularisation; the model is
    fitted on all, each with its part of the row's weight. A class without rows gets scores that
    are never the best. Returned are the coefficients (n_outputs, n_features) and the intercepts.
    """
    n, n_views = rows.shape[:2]
    flat = rows.reshape(n * n_views, -1)
    flat = flat.astype(np.float32 if rows.size > 5e7 else np.float64, copy=False)
    mean, scale = _moments(flat, np.repeat(weight, n_views))
    z = (flat - mean.astype(flat.dtype)) / scale.astype(flat.dtype)
    basis = None
    if len(z) < z.shape[1]:
        # An L2-penalised linear model is a combination of its rows: solve in their span.
        left, values, basis = np.linalg.svd(z, full_matrices=False)
        z = left * values
    z = z.reshape(n, n_views, -1)
    if kind == "regression":
        coef, intercept = _ridge(z, target.reshape(n, -1), weight)
    elif kind == "multiclass":
        coef, intercept = _logistic(z, target, weight, n_outputs, rng)
    else:
        parts = [_one_label(z, target[:, j], weight, rng) for j in range(n_outputs)]
        coef = np.stack([part[0] for part in parts])
        intercept = np.array([part[1] for part in parts])
    if basis is not None:
        coef = coef @ basis
    coef = coef / scale
    return coef, intercept - coef @ mean


def _moments(rows: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the weighted mean and standard deviation, never near zero, of each column."""
    share = weight / weight.sum()
    mean = share @ rows
    scale = np.sqrt(share @ (rows - mean.astype(rows.dtype)) ** 2)
    # Otherwise a nearly constant column would be scaled to huge values when stages are trained.
    positive = scale[scale > 1e-12]
    floor = 0.01 * np.median(positive) if len(positive) else 1.0
    return mean, np.maximum(scale, floor)


def _views_as_rows(
    z: np.ndarray, target: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each view as a row, with its target and its part of the weight."""
    n_views = z.shape[1]
    flat = z.reshape(-1, z.shape[2])
    return flat, np.repeat(target, n_views, axis=0), np.repeat(weight / n_views, n_views)


def _ridge(z: np.ndarray, target: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(z) < 2:
        return np.zeros((target.shape[1], z.shape[2])), target.mean(axis=0)
    # Leave-one-out errors in closed form choose the strength.
    alphas = [alpha * weight.mean() for alpha in _ALPHAS]
    model = RidgeCV(alphas=alphas).fit(z[:, 0], target, sample_weight=weight)
    if z.shape[1] > 1:
        z, target, weight = _views_as_rows(z, target, weight)
        model = Ridge(alpha=model.alpha_).fit(z, target, sample_weight=weight)
    return np.atleast_2d(model.coef_), np.atleast_1d(model.intercept_)


def _one_label(
    z: np.ndarray, target: np.ndarray, weight: np.ndarray, rng: np.random.RandomState
) -> tuple[np.ndarray, float]:
    target = target.astype(int)
    if len(np.unique(target)) == 1:
        # If no row or all rows have this label, its odds are n + 1 to 1.
        odds = np.log(len(z) + 1.0)
        return np.zeros(z.shape[2]), float(odds if target[0] else -odds)
    coef, intercept = _logistic(z, target, weight, 2, rng)
    return coef[1] - coef[0], float(intercept[1] - intercept[0])


def _logistic(
    z: np.ndarray, codes: np.ndarray, weight: np.ndarray, n_classes: int, rng: np.random.RandomState
) -> tuple[np.ndarray, np.ndarray]:
    present = np.unique(codes)
    coef, intercept = np.zeros((n_classes, z.shape[2])), np.zeros(n_classes)
    if len(present) < n_classes:
        intercept -= np.log(len(z) + 1.0)
    if len(present) == 1:
        intercept[present] = 0.0
        return coef, intercept
    weight = weight / weight.mean()  # C weighs the losses' sum against the penalty
    strength = _choose_strength(z[:, 0], codes, weight, rng)
    model = _solve(*_views_as_rows(z, codes, weight), strength)
    if len(present) == 2:
        # softmax(-s/2, s/2) is the logistic function of s.
        coef[present] = np.array([[-0.5], [0.5]]) * model.coef_
        intercept[present] = np.array([-0.5, 0.5]) * model.intercept_
    else:
        coef[present], intercept[present] = model.coef_, model.intercept_
    return coef, intercept


def _choose_strength(
    z: np.ndarray, codes: np.ndarray, weight: np.ndarray, rng: np.random.RandomState
) -> float:
    """Return the C with the smallest log loss on a held-out quarter."""
    held_out = stratified_sample(codes, 0.25, rng)
    is_in = np.ones(len(z), dtype=bool)
    is_in[held_out] = False
    if len(held_out) < 8 or len(np.unique(codes[is_in])) < len(np.unique(codes)):
        return _C_FEW_ROWS
    losses = []
    previous = None
    for strength in _C:
        previous = _solve(z[is_in], codes[is_in], weight[is_in], strength, previous)
        proba = previous.predict_proba(z[held_out])
        own = proba[np.arange(len(held_out)), np.searchsorted(previous.classes_, codes[held_out])]
        losses.append(-weight[held_out] @ np.log(own.clip(1e-12)))
    return _C[int(np.argmin(losses))]


def _solve(
    z: np.ndarray,
    codes: np.ndarray,
    weight: np.ndarray,
    strength: float,
    start: LogisticRegression | None = None,
) -> LogisticRegression:
    model = LogisticRegression(C=strength, max_iter=_MAX_ITER, warm_start=True)
    if start is not None:
        model.coef_, model.intercept_ = start.coef_.copy(), start.intercept_.copy()
        model.classes_ = start.classes_
    # All threads share the filters of warnings.
    with global_state_lock, warnings.catch_warnings():
        # _MAX_ITER steps converge well enough for fine-tuning.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(z, codes, sample_weight=weight)


def stratified_sample(
    codes: np.ndarray | None, fraction: float, rng: np.random.RandomState, n: int = 0
) -> np.ndarray:
    """Choose about `fraction` of the rows of each class, never all of one; sorted.

    Without `codes`, choose them from `n` rows without classes.
    """
    if codes is None:
        n_part = min(n - 1, max(1, round(fraction * n))) if n > 1 else 0
        return np.sort(rng.permutation(n)[:n_part])
    part, carried = [], 0.0
    for code in np.unique(codes):
        members = np.flatnonzero(codes == code)
        # The error of rounding is carried over to the next class.
        wanted = fraction * len(members) + carried
        n_part = min(len(members) - 1, round(wanted))
        carried = wanted - n_part
        part.append(rng.permutation(members)[:n_part])
    return np.sort(np.concatenate(part)).astype(int)
