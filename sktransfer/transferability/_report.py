"""TransferReport: what a comparison with and without pre-training shows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from sktransfer.transferability._folds import Estimate, Folds, estimate
from sktransfer.transferability._table import as_frame, as_html, as_text, plus_minus

if TYPE_CHECKING:
    import pandas as pd

    from sktransfer.inspection import TransferCurveDisplay
    from sktransfer.transferability._table import Table

OWN = "pre-trained"
# A verdict needs this p-value: in simulations without a difference 1 to 4 % reach it
# (docs/benchmarks/transferability.py), so that more than two of twenty are rare.
ALPHA = 0.03


class TransferReport:
    """Result of :func:`transfer_report`.

    Differences are of the pre-trained estimator less a baseline, and positive where pre-training
    is better. Each is a mean over folds, an ``Estimate`` with ``value``, ``error`` (standard
    error) and ``p_value``.

    Attributes
    ----------
    scores_ : dict of str to ndarray of shape (n_folds, n_sizes)
        Test scores of ``"pre-trained"`` and of each baseline.
    train_sizes_ : ndarray of shape (n_sizes,)
        Mean numbers of training rows.
    epochs_ : dict of str to ndarray of shape (n_folds, n_epochs + 1)
        For fine-tuning estimators: accuracy or R² after each epoch from 0 on, with all training
        rows, before weights are interpolated; of the test rows, or of the estimator's own
        validation part where it stops early. Empty for others.
    table_ : DataFrame, or Table where pandas is not installed
        ``model``, ``train_size``, ``score`` and its standard error ``score_se``.
    start_ : dict of str to Estimate
        Of each baseline: the difference at the smallest training size.
    slope_ : dict of str to Estimate
        The slope of the least squares line of the differences against log2 of the training size:
        by how much the difference grows when the rows double. NaN for a single size.
    asymptote_ : dict of str to Estimate
        The difference at the largest training size; it is not extrapolated, as fits of learning
        curves are seldom stable.
    gain_ : dict of str to Estimate
        The difference averaged over the training sizes.
    verdicts_ : dict of str to {"helps", "no evidence", "hurts"}
        The sign of the gain over each baseline, if its p-value is at most 0.03.
    verdict_, p_value_ : str, float
        Those of the first baseline.
    advice_ : list of str
        What to try next.
    """

    def __init__(
        self,
        scores: dict[str, np.ndarray],
        train_sizes: np.ndarray,
        epochs: dict[str, np.ndarray],
        folds: Folds,
        *,
        score_name: str,
        is_fine_tuned: bool,
    ) -> None:
        self.scores_, self.train_sizes_, self.epochs_ = scores, train_sizes, epochs
        self.score_name, self._is_fine_tuned = score_name, is_fine_tuned
        own, *self.baselines = scores
        differences = {name: scores[own] - scores[name] for name in self.baselines}
        x = np.log2(train_sizes) - np.log2(train_sizes).mean()
        slope = x / (x @ x) if x @ x > 0 else np.full(len(x), np.nan)

        def of_all(weight: np.ndarray) -> dict[str, Estimate]:
            return {name: estimate(d @ weight, folds) for name, d in differences.items()}

        n = len(train_sizes)
        self.start_, self.asymptote_ = of_all(np.eye(n)[0]), of_all(np.eye(n)[-1])
        self.slope_, self.gain_ = of_all(slope), of_all(np.full(n, 1 / n))
        self.verdicts_ = {name: _verdict(gain) for name, gain in self.gain_.items()}
        self.verdict_ = self.verdicts_[self.baselines[0]]
        self.p_value_ = self.gain_[self.baselines[0]].p_value
        self.means_ = {
            name: [estimate(column, folds) for column in values.T]
            for name, values in scores.items()
        }
        self._rise = estimate(scores[own][:, -1] - scores[own][:, max(n - 2, 0)], folds)
        self.advice_ = self._advise()

    @property
    def table_(self) -> pd.DataFrame | Table:
        rows = [
            (name, size, mean.value, mean.error)
            for name, means in self.means_.items()
            for size, mean in zip(self.train_sizes_, means, strict=True)
        ]
        names = ("model", "train_size", "score", "score_se")
        return as_frame(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))

    def plot(self, ax=None, *, over: str = "train_sizes") -> TransferCurveDisplay:
        """Plot the scores of all models.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            ``None``: of a new figure.
        over : {"train_sizes", "epochs"}, default="train_sizes"

        Returns
        -------
        display : TransferCurveDisplay
        """
        from sktransfer.inspection import TransferCurveDisplay

        return TransferCurveDisplay.from_report(self, ax=ax, over=over)

    def _advise(self) -> list[str]:
        if math.isnan(self.p_value_):
            return [
                "The difference was not tested: give at least two folds, and scores without NaN."
            ]
        first, advice = self.baselines[0], []
        start, end = self.start_[first], self.asymptote_[first]
        if self.verdict_ == "hurts" and self._is_fine_tuned:
            advice.append(
                "Put the head after a lower stage (layer=), whose features are more general, or "
                "unfreeze more stages, so that the upper ones can change."
            )
        elif self.verdict_ == "hurts":
            advice.append(
                "Try lower layers, whose features are more general: "
                "rank_backbones(..., layers='stages')."
            )
        elif self.verdict_ == "helps" and first == "random" and end.p_value > ALPHA:
            how = "unfreeze more stages" if self._is_fine_tuned else "fine-tune the network"
            if start.p_value <= ALPHA:
                advice.append(f"With all training rows a gain is not shown: {how}.")
        if self.verdict_ != "helps":
            advice.append("Try another backbone: rank_backbones compares several.")
        if self.verdict_ == "no evidence":
            error = self.gain_[first].error
            advice.append(
                f"The standard error of the difference is {error:.3f}: more data, or more folds, "
                "show smaller differences."
            )
        if self._rise.p_value <= ALPHA and self._rise.value > 0:
            advice.append(
                f"The score still rises between the last two training sizes, by "
                f"{self._rise.value:.3f}: more data would help."
            )
        known = {"pixels": "raw pixels", "tf-idf": "words by tf-idf", "dummy": "the dummy"}
        for name, what in known.items():
            if name in self.verdicts_ and name != first and self.verdicts_[name] != "helps":
                advice.append(
                    f"The model is not shown to be better than {what}: check that X shows what y "
                    "names, and that the preprocessing suits it."
                )
        return advice

    def _headline(self) -> str:
        first = self.baselines[0]
        gain = self.gain_[first]
        verdict = {"no evidence": "No evidence that transfer helps or hurts"}.get(
            self.verdict_, f"Transfer {self.verdict_}"
        )
        return (
            f"{verdict}: {self.score_name} {plus_minus(gain.value, gain.error, sign=True)} "
            f"against {first}, p = {gain.p_value:.2g} "
            f"(training sizes: {len(self.train_sizes_)}, folds: {len(self.scores_[OWN])})."
        )

    def _curves(self) -> dict[str, list[str]]:
        columns = {"training rows": list(self.scores_)}
        for k, size in enumerate(self.train_sizes_):
            cells = [plus_minus(*means[k][:2]) for means in self.means_.values()]
            columns[f"{size:.0f}"] = cells
        return columns

    def _differences(self) -> dict[str, list[str]]:
        parts = {
            "start": self.start_,
            "slope per doubling": self.slope_,
            "asymptote": self.asymptote_,
            "mean": self.gain_,
        }
        columns = {
            name: [plus_minus(*part[b][:2], sign=True) for b in self.baselines]
            for name, part in parts.items()
        }
        columns["p"] = [f"{self.gain_[b].p_value:.2g}" for b in self.baselines]
        return {"pre-trained less": self.baselines, **columns, "": [*self.verdicts_.values()]}

    def __repr__(self) -> str:
        parts = [self._headline(), as_text(self._curves()), as_text(self._differences())]
        return "\n\n".join([*parts, "\n".join(self.advice_)]).rstrip()

    def _repr_html_(self) -> str:
        advice = "".join(f"<li>{line}</li>" for line in self.advice_)
        tables = as_html(self._curves()) + as_html(self._differences())
        return f"<p>{self._headline()}</p>{tables}<ul>{advice}</ul>"


def _verdict(gain: Estimate) -> str:
    if not gain.p_value <= ALPHA:  # also where it is NaN
        return "no evidence"
    return "helps" if gain.value > 0 else "hurts"
