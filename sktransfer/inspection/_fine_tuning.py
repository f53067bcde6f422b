"""FineTuningDisplay: a training, epoch by epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np
from sklearn.utils.validation import check_is_fitted

from sktransfer.inspection._axes import COLORS, new_axes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D


class FineTuningDisplay:
    """Loss, validation score, learning rate and frozen stages by epoch.

    It is made by :meth:`from_estimator`, or from plain values. All parameters are attributes.

    Parameters
    ----------
    history : list of dict
        A row per epoch, as `history_` of a fine-tuning estimator.
    best_epoch : int
        The epoch whose weights are kept.
    n_stages : int
    score_name : str, default="score"

    Attributes
    ----------
    lines_ : dict of str to matplotlib Line2D
        ``"train_loss"``, ``"lr"``, ``"n_frozen"`` and, with a validation part, ``"valid_loss"``
        and ``"valid_score"``.
    kept_ : list of matplotlib Line2D
        One in each of the axes, at the epoch that is kept.
    axes_ : list of matplotlib Axes
    figure_ : matplotlib Figure

    See Also
    --------
    sktransfer.FineTuningClassifier, sktransfer.FineTuningRegressor : Keep a history.

    Examples
    --------
    >>> from sktransfer.inspection import FineTuningDisplay
    >>> history = [
    ...     {"epoch": 1, "train_loss": 0.9, "lr": 1e-3, "n_unfrozen": 0},
    ...     {"epoch": 2, "train_loss": 0.5, "lr": 1e-4, "n_unfrozen": 2},
    ... ]
    >>> display = FineTuningDisplay(history, best_epoch=2, n_stages=5).plot()
    >>> display.lines_["n_frozen"].get_ydata()
    array([5, 3])
    """

    lines_: dict[str, Line2D]
    kept_: list[Line2D]
    axes_: list[Axes]
    figure_: Figure

    def __init__(
        self,
        history: list[dict[str, float]],
        *,
        best_epoch: int,
        n_stages: int,
        score_name: str = "score",
    ) -> None:
        self.history, self.best_epoch = history, best_epoch
        self.n_stages, self.score_name = n_stages, score_name

    @classmethod
    def from_estimator(cls, estimator, *, axes: Sequence[Axes] | None = None) -> Self:
        """Draw the display of a fitted estimator.

        Parameters
        ----------
        estimator : FineTuningClassifier, FineTuningRegressor, a Pipeline that ends with one, or a
            fitted search over these
        axes
            As in `plot`.

        Returns
        -------
        display : FineTuningDisplay
        """
        model = getattr(estimator, "best_estimator_", estimator)
        model = model[-1] if hasattr(model, "steps") else model
        check_is_fitted(model)
        if not hasattr(model, "history_"):
            raise TypeError(
                f"{type(model).__name__} keeps no history_: give a FineTuningClassifier, a "
                "FineTuningRegressor or a Pipeline that ends with one."
            )
        return cls(
            model.history_,
            best_epoch=model.best_epoch_,
            n_stages=len(model.backbone_.stage_names_to_layer),
            score_name="accuracy" if hasattr(model, "classes_") else "R²",
        ).plot(axes)

    def plot(self, axes: Sequence[Axes] | None = None) -> Self:
        """Draw the display.

        Parameters
        ----------
        axes : sequence of 3 or 4 matplotlib Axes, default=None
            For the loss, the score if there is one, the learning rate and the frozen stages.
            ``None``: of a new figure.

        Returns
        -------
        self : FineTuningDisplay
        """
        panels = {
            "loss": ["train_loss", "valid_loss"],
            f"validation\n{self.score_name}": ["valid_score"],
            "learning\nrate": ["lr"],
            "frozen\nstages": ["n_frozen"],
        }
        curves = self._curves()
        panels = {label: [k for k in keys if k in curves] for label, keys in panels.items()}
        panels = {label: keys for label, keys in panels.items() if keys}
        if not panels:
            raise ValueError("The history has no epoch: with max_epochs=0 only the head is fitted.")
        if axes is None:
            axes = new_axes(type(self).__name__, len(panels), (6.4, 1.6 * len(panels) + 0.4))
        if len(axes) != len(panels):
            raise ValueError(f"axes holds {len(axes)} axes, and {len(panels)} are needed.")
        self.lines_, self.kept_, self.axes_ = {}, [], list(axes)
        names = {"train_loss": "training", "valid_loss": "validation"}
        for ax, (label, keys) in zip(self.axes_, panels.items(), strict=True):
            for key in keys:
                is_validation = key.startswith("valid")
                (self.lines_[key],) = ax.plot(
                    *curves[key],
                    color=COLORS[is_validation],
                    marker="s" if is_validation else "o",
                    drawstyle="steps-mid" if key == "n_frozen" else "default",
                    label=names.get(key),
                )
            self.kept_.append(
                ax.axvline(
                    self.best_epoch, color="0.4", linestyle="--", label=f"kept: {self.best_epoch}"
                )
            )
            ax.set_ylabel(label)
        self.axes_[0].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        self._format()
        return self

    def _curves(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return the epochs and values of each line that has any."""
        curves = {}
        for key in ("train_loss", "valid_loss", "valid_score", "lr", "n_unfrozen"):
            rows = [row for row in self.history if key in row]
            if rows:
                x, y = (np.array([row[name] for row in rows]) for name in ("epoch", key))
                is_count = key == "n_unfrozen"
                curves["n_frozen" if is_count else key] = (x, self.n_stages - y if is_count else y)
        return curves

    def _format(self) -> None:
        from matplotlib.ticker import MaxNLocator

        last = int(self.history[-1]["epoch"]) if self.history else 0
        stopped = f"stopped after epoch {last}, kept epoch {self.best_epoch}"
        self.axes_[0].set_title(f"Fine-tuning: {stopped}", fontsize="medium")
        if "lr" in self.lines_:
            self.lines_["lr"].axes.set_yscale("log")  # type: ignore[union-attr]
        if "n_frozen" in self.lines_:
            frozen = self.lines_["n_frozen"].axes
            frozen.set_ylim(-0.3, self.n_stages + 0.3)  # type: ignore[union-attr]
            frozen.yaxis.set_major_locator(MaxNLocator(4, integer=True))  # type: ignore[union-attr]
        self.axes_[-1].set_xlabel("epoch")
        self.axes_[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        self.figure_ = self.axes_[0].figure  # type: ignore[assignment]
        self.figure_.align_ylabels(self.axes_)
