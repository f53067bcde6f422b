"""TransferCurveDisplay: scores with and without pre-training, over training sizes and epochs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import ArrayLike

from sktransfer.inspection._axes import new_axes, style_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import FillBetweenPolyCollection
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D


class TransferCurveDisplay:
    """Scores of an estimator with a pre-trained network and of its baselines.

    It is made by :meth:`from_report`, or from plain arrays. All parameters are attributes.

    Parameters
    ----------
    train_sizes : array-like of shape (n_sizes,)
    scores : dict of str to array-like of shape (n_folds, n_sizes)
        Of the pre-trained estimator, which comes first, and of the baselines. The second is the
        one whose start, slope and asymptote are marked.
    epochs : dict of str to array-like of shape (n_folds, n_epochs + 1), default=None
        Scores after each epoch from 0 on.
    score_name : str, default="score"
    title : str, default=None

    Attributes
    ----------
    lines_ : list of matplotlib Line2D
        Means over folds, one of each model.
    fills_ : list of matplotlib FillBetweenPolyCollection
        One standard deviation over folds to each side.
    marks_ : dict of str to matplotlib Line2D
        ``"start"`` and ``"asymptote"`` join the means of the first two models at the first and the
        last value of x; ``"slope"`` and ``"slope of baseline"`` are their least squares lines
        over the logarithm of the training size.
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure

    See Also
    --------
    sktransfer.transferability.transfer_report : Makes the report.

    Examples
    --------
    >>> from sktransfer.inspection import TransferCurveDisplay
    >>> scores = {"pre-trained": [[0.7, 0.8, 0.85]], "random": [[0.4, 0.6, 0.8]]}
    >>> display = TransferCurveDisplay([10, 20, 40], scores, score_name="accuracy").plot()
    >>> display.marks_["start"].get_label()
    'start +0.300'
    """

    lines_: list[Line2D]
    fills_: list[FillBetweenPolyCollection]
    marks_: dict[str, Line2D]
    ax_: Axes
    figure_: Figure

    def __init__(
        self,
        train_sizes: ArrayLike,
        scores: Mapping[str, ArrayLike],
        *,
        epochs: Mapping[str, ArrayLike] | None = None,
        score_name: str = "score",
        title: str | None = None,
    ) -> None:
        self.train_sizes, self.scores, self.epochs = train_sizes, scores, epochs
        self.score_name, self.title = score_name, title

    @classmethod
    def from_report(cls, report, *, ax: Axes | None = None, over: str = "train_sizes") -> Self:
        """Draw the display of what :func:`transfer_report` returned.

        Parameters
        ----------
        report : TransferReport
        ax, over
            As in `plot`.

        Returns
        -------
        display : TransferCurveDisplay
        """
        return cls(
            report.train_sizes_,
            report.scores_,
            epochs=report.epochs_ or None,
            score_name=report.score_name,
            title=f"Transfer: {report.verdict_} (p = {report.p_value_:.2g})",
        ).plot(ax, over=over)

    def plot(self, ax: Axes | None = None, *, over: str = "train_sizes") -> Self:
        """Draw the display.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            ``None``: of a new figure.
        over : {"train_sizes", "epochs"}, default="train_sizes"
            What x is.

        Returns
        -------
        self : TransferCurveDisplay
        """
        if over not in ("train_sizes", "epochs"):
            raise ValueError(f"over={over!r}: 'train_sizes' or 'epochs' is accepted.")
        if over == "epochs" and self.epochs is None:
            raise ValueError(
                "There are no scores by epoch: only fine-tuning estimators are trained in epochs."
            )
        if ax is None:
            (ax,) = new_axes(type(self).__name__)
        from matplotlib.ticker import MaxNLocator

        by_epoch = over == "epochs"
        curves: Mapping[str, ArrayLike] = self.epochs if by_epoch else self.scores  # type: ignore[assignment]
        means = []
        self.lines_, self.fills_, self.marks_ = [], [], {}
        for i, (name, values) in enumerate(curves.items()):
            array = np.asarray(values, float)
            x = np.arange(array.shape[1]) if by_epoch else np.asarray(self.train_sizes, float)
            mean, spread = np.nanmean(array, axis=0), np.nanstd(array, axis=0)
            color, marker = style_of(i)
            self.lines_ += ax.plot(x, mean, color=color, marker=marker, label=name)
            self.fills_.append(
                ax.fill_between(x, mean - spread, mean + spread, color=color, alpha=0.15, lw=0)
            )
            means.append((x, mean))
        if len(means) > 1:
            self._mark(ax, means[0], means[1], has_slope=not by_epoch)
        if by_epoch:
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        else:
            ax.set_xscale("log", base=2)
            ax.set_xticks(x, [f"{size:.0f}" for size in x])
            ax.minorticks_off()
        ax.set(
            xlabel="epoch" if by_epoch else "training rows",
            ylabel="validation score" if by_epoch else self.score_name,
        )
        ax.set_title(self.title or "", fontsize="medium")
        ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize="small")
        self.ax_, self.figure_ = ax, ax.figure  # type: ignore[assignment]
        return self

    def _mark(self, ax: Axes, own: tuple, other: tuple, has_slope: bool) -> None:
        for name, k in (("start", 0), ("asymptote", -1)):
            ends = [other[1][k], own[1][k]]
            (self.marks_[name],) = ax.plot(
                [own[0][k], other[0][k]],
                ends[::-1],
                color="0.2",
                linestyle="-" if k else (0, (1, 1)),
                linewidth=2.5,
                label=f"{name} {ends[1] - ends[0]:+.3f}",
                zorder=1,
            )
        if not has_slope or len(np.unique(own[0])) < 2:  # groups may make sizes equal
            return
        slopes = []
        for name, (x, mean), line in (
            ("slope of baseline", other, self.lines_[1]),
            ("slope", own, self.lines_[0]),
        ):
            slope, level = np.polyfit(np.log2(x), mean, 1)
            slopes.append(slope)
            (self.marks_[name],) = ax.plot(
                x, slope * np.log2(x) + level, color=line.get_color(), linestyle="--", linewidth=1
            )
        difference = slopes[1] - slopes[0]
        self.marks_["slope"].set_label(f"slope {difference:+.3f} per doubling")
