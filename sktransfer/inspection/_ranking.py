"""BackboneRankingDisplay: how well networks suit a task, against what they cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import ArrayLike

from sktransfer.inspection._axes import new_axes, style_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import ErrorbarContainer
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D


class BackboneRankingDisplay:
    """Scores of pre-trained networks against their cost.

    It is made by :meth:`from_ranking`, or from plain arrays. All parameters are attributes.

    Parameters
    ----------
    names : list of str of length n_candidates
        What the legend calls them.
    score, seconds : array-like of shape (n_candidates,)
        Candidates without a score are left out.
    score_error, gain : array-like of shape (n_candidates,), default=None
        Standard errors, and how much of the score is gained over random weights.
    score_name : str, default="score"

    Attributes
    ----------
    points_ : list of matplotlib ErrorbarContainer
    gains_ : list of matplotlib Line2D
        From the score of random weights up to the score; empty if `gain` is None.
    ax_ : matplotlib Axes
    figure_ : matplotlib Figure

    See Also
    --------
    sktransfer.transferability.rank_backbones : Makes the ranking.

    Examples
    --------
    >>> from sktransfer.inspection import BackboneRankingDisplay
    >>> display = BackboneRankingDisplay(["small", "large"], [0.8, 0.9], [1.0, 20.0])
    >>> display.plot().ax_.get_ylabel()
    'score'
    """

    points_: list[ErrorbarContainer]
    gains_: list[Line2D]
    ax_: Axes
    figure_: Figure

    def __init__(
        self,
        names: list[str],
        score: ArrayLike,
        seconds: ArrayLike,
        *,
        score_error: ArrayLike | None = None,
        gain: ArrayLike | None = None,
        score_name: str = "score",
    ) -> None:
        self.names, self.score, self.seconds = names, score, seconds
        self.score_error, self.gain, self.score_name = score_error, gain, score_name

    @classmethod
    def from_ranking(cls, ranking, *, ax: Axes | None = None) -> Self:
        """Draw the display of what :func:`rank_backbones` returned.

        Parameters
        ----------
        ranking : BackboneRanking
        ax
            As in `plot`.

        Returns
        -------
        display : BackboneRankingDisplay
        """
        table = ranking.table_
        names = [
            name if layer == "embedding" else f"{name}, {layer}"
            for name, layer in zip(table["backbone"], table["layer"], strict=True)
        ]
        score, seconds, error, gain = (
            np.asarray(table[name]) for name in ("score", "seconds", "score_se", "gain")
        )
        options = {"score_error": error, "gain": gain, "score_name": ranking.score_name}
        return cls(names, score, seconds, **options).plot(ax)

    def plot(self, ax: Axes | None = None) -> Self:
        """Draw the display.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            ``None``: of a new figure.

        Returns
        -------
        self : BackboneRankingDisplay
        """
        if ax is None:
            (ax,) = new_axes(type(self).__name__, size=(7.2, 4.4))
        from matplotlib.ticker import LogLocator

        n = len(self.names)
        score, seconds = np.asarray(self.score, float), np.asarray(self.seconds, float)
        missing = np.full(n, np.nan)
        error = missing if self.score_error is None else np.asarray(self.score_error, float)
        gain = missing if self.gain is None else np.asarray(self.gain, float)
        self.points_, self.gains_ = [], []
        for i in np.flatnonzero(~np.isnan(score)):
            color, marker = style_of(int(i))
            if not np.isnan(gain[i]):
                self.gains_ += ax.plot(
                    [seconds[i]] * 2,
                    [score[i] - gain[i], score[i]],
                    linestyle=":",
                    marker=marker,
                    markerfacecolor="white",
                    color=color,
                )
            bars = None if np.isnan(error[i]) else [error[i]]
            self.points_.append(
                ax.errorbar(
                    [seconds[i]],
                    [score[i]],
                    yerr=bars,
                    color=color,
                    marker=marker,
                    linestyle="none",
                    capsize=3,
                    label=self.names[i],
                )
            )
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
        ax.set(xlabel="seconds per 1,000 rows", ylabel=self.score_name, title="Backbones")
        ax.legend(
            loc="center left",
            bbox_to_anchor=(1.01, 0.5),
            frameon=False,
            fontsize="small",
            title="hollow: random weights" if self.gains_ else None,
        )
        self.ax_, self.figure_ = ax, ax.figure  # type: ignore[assignment]
        return self
