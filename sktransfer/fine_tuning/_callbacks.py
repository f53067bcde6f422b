"""skorch callbacks that make its loop fine-tune."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from skorch.callbacks import Callback

from sktransfer.fine_tuning._losses import validation_score
from sktransfer.fine_tuning._schedules import Schedule


class Unfreezing(Callback):
    """Thaws stages when their epoch comes; their parameters join the optimizer then.

    Parameters
    ----------
    first_stage : callable
        Epoch, counted from 1 -> position of the lowest trained stage.
    groups : callable
        (start, stop) -> optimizer groups of these stages.
    """

    def __init__(self, first_stage: Callable[[int], int], groups: Callable[[int, int], list]):
        self.first_stage, self.groups = first_stage, groups
        self.epoch = 0

    def on_epoch_begin(
        self, net: Any, dataset_train: Any = None, dataset_valid: Any = None, **kwargs: Any
    ) -> None:
        self.epoch += 1
        module = net.module_
        start = min(self.first_stage(self.epoch), len(module.stages))
        if start < module.n_frozen:
            for group in self.groups(start, module.n_frozen):
                # The others' moments stay as they are.
                net.optimizer_.add_param_group(group)
            module.freeze(start)
            module.takes_embeddings = False
            for rows in (dataset_train, dataset_valid):
                if rows is not None:  # they gave embeddings as long as the head was alone
                    rows.go_on()


class Tempering(Callback):
    """Divides the head's scores once, when the first stages are trained.

    It stands behind :class:`Unfreezing`.

    Parameters
    ----------
    temperature : float
    """

    def __init__(self, temperature: float):
        self.temperature = temperature

    def on_epoch_begin(self, net: Any, **kwargs: Any) -> None:
        module = net.module_
        if self.temperature != 1 and module.n_frozen < len(module.stages):
            module.head.divide_scores(self.temperature)
            self.temperature = 1.0


class LearningRates(Callback):
    """Sets ``group["lr"]`` before each step where the schedule changes it.

    A rate that stays the same is left to whoever else sets it, such as skorch's ``LRScheduler``.

    Parameters
    ----------
    schedule : callable
        Progress of training, 0…1 -> factor.
    n_steps : int
        Of the whole training.
    """

    def __init__(self, schedule: Schedule, n_steps: int):
        self.schedule, self.n_steps = schedule, n_steps
        self.step = 0

    def on_batch_begin(self, net: Any, training: bool = False, **kwargs: Any) -> None:
        if training:
            factor = float(self.schedule((self.step + 0.5) / self.n_steps))
            for group in net.optimizer_.param_groups:
                lr = group["base_lr"] * factor
                if group.get("scheduled_lr") != lr:
                    group["lr"] = group["scheduled_lr"] = lr
            self.step += 1

    def on_epoch_end(self, net: Any, **kwargs: Any) -> None:
        net.history.record("lr", max(group["lr"] for group in net.optimizer_.param_groups))


class GradientRules(Callback):
    """Pulls trained stages towards their pre-trained weights, and clips gradients.

    Parameters
    ----------
    l2_sp : float
        α of the penalty α/2 ‖w - w₀‖² on the stages' weights [1]_.
    clip : float or None
        Largest norm of all gradients together.
    anchors : dict of int to Tensor
        ``id`` of a parameter -> its pre-trained value.

    References
    ----------
    .. [1] X. Li, Y. Grandvalet, F. Davoine: "Explicit inductive bias for transfer learning with
       convolutional networks", ICML 2018. https://arxiv.org/abs/1802.01483
    """

    def __init__(self, l2_sp: float, clip: float | None, anchors: dict[int, torch.Tensor]):
        self.l2_sp, self.clip, self.anchors = l2_sp, clip, anchors

    def on_grad_computed(self, net: Any, named_parameters: Any = None, **kwargs: Any) -> None:
        parameters = [p for p in net.module_.parameters() if p.grad is not None]
        if self.l2_sp:
            with torch.no_grad():
                for parameter in parameters:
                    anchor = self.anchors.get(id(parameter))
                    if anchor is not None:
                        parameter.grad.add_(parameter - anchor, alpha=self.l2_sp)
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self.clip)


class FiniteLoss(Callback):
    """Ends a training whose loss is no number any more."""

    def __init__(self, lr: float):
        self.lr = lr

    def on_batch_end(
        self, net: Any, training: bool = False, loss: Any = None, **kwargs: Any
    ) -> None:
        if training and not math.isfinite(value := float(loss.detach())):
            n_batches = len(net.history[-1, "batches"])
            where = f"in epoch {len(net.history)}, batch {n_batches}"
            raise not_finite(f"The training loss became {value} {where}.", self.lr)


def not_finite(what: str, lr: float) -> ValueError:
    """An error that names the likely causes."""
    return ValueError(
        f"{what} The likely cause is a learning rate that is "
        f"too large: lr={lr!r}; try a tenth of it, or gradient_clip=1.0. Other "
        "causes: precision='float16', whose largest number is 65504 ('bfloat16' is not so "
        "bound), very large sample weights or targets, an `augment` or `preprocessing` "
        "function that returns NaN."
    )


class EpochLog(Callback):
    """Writes one row per epoch, scores the validation part, and keeps the best epoch.

    Parameters
    ----------
    kind : str
    history : list
        Receives the rows.
    first_epoch : int
        Number of the epoch before the first one trained: 0, or where training goes on.
    valid : Batches or None
        The validation part.
    keeps_best : bool
        Whether to keep the best epoch's weights.
    patience, tol : int, float
        Training ends when the score has not grown by more than `tol` for so many epochs.
    lowest : int
        Position of the lowest stage that is ever trained.
    """

    def __init__(
        self,
        kind: str,
        history: list[dict[str, Any]],
        first_epoch: int,
        valid: Any,
        keeps_best: bool,
        patience: int,
        tol: float,
        lowest: int,
    ):
        self.kind, self.history, self.epoch = kind, history, first_epoch
        self.valid, self.keeps_best = valid, keeps_best
        self.patience, self.tol, self.lowest = patience, tol, lowest
        self.best_epoch: int | None = None
        self.best_score = -math.inf
        self.best_loss = math.inf
        self.best_state: dict[str, torch.Tensor] = {}
        self.start_score = -math.inf
        self.is_stopped_early = False
        self._to_beat = -math.inf
        self._n_without_gain = 0
        self._batches: list[tuple[Any, ...]] = []
        self._since = 0.0

    def on_train_begin(self, net: Any, **kwargs: Any) -> None:
        if self.valid is None:
            return
        for batch in self.valid:
            step = net.validation_step(batch)
            self.on_batch_end(net, batch=batch, training=False, **step)
        row = {"epoch": self.epoch, **self._close()}
        self.start_score = row["valid_score"]
        self.history.append(row)
        self._judge(net, row)

    def on_epoch_begin(self, net: Any, **kwargs: Any) -> None:
        self._since = time.perf_counter()
        self._batches.clear()

    def on_batch_end(
        self,
        net: Any,
        batch: Any = None,
        training: bool = False,
        loss: Any = None,
        y_pred: Any = None,
        **kwargs: Any,
    ) -> None:
        if not training:
            scores, weight = y_pred
            parts = (scores.float(), batch[1], weight)
            n = len(weight)
            self._batches.append(
                (*(part.cpu().numpy() for part in parts), float(loss.detach()) * n, n)
            )

    def on_epoch_end(self, net: Any, **kwargs: Any) -> None:
        groups = net.optimizer_.param_groups
        row = {
            "epoch": self.epoch + 1,
            "train_loss": float(net.history[-1, "train_loss"]),
            "lr": max(group["lr"] for group in groups),
            "n_unfrozen": net.module_.n_unfrozen,
            "seconds": time.perf_counter() - self._since,
        }
        if self._batches:
            row |= self._close()
            net.history.record("valid_score", row["valid_score"])
        self.history.append(row)
        self.epoch += 1
        if self.valid is not None:
            self._judge(net, row)

    def _close(self) -> dict[str, float]:
        scores, target, weight = (np.concatenate([b[i] for b in self._batches]) for i in range(3))
        loss = sum(b[3] for b in self._batches) / sum(b[4] for b in self._batches)
        self._batches.clear()
        if not weight.any():  # its pictures have gone
            return {"valid_loss": math.nan, "valid_score": math.nan}
        return {
            "valid_loss": loss,
            "valid_score": validation_score(self.kind, scores, target, weight),
        }

    def _judge(self, net: Any, row: dict[str, Any]) -> None:
        score, loss = row["valid_score"], row["valid_loss"]
        if math.isnan(score):
            return
        if score > self.best_score or (score == self.best_score and loss < self.best_loss):
            if self.keeps_best:
                self.best_state = snapshot(net.module_, self.lowest)
            self.best_score, self.best_loss, self.best_epoch = score, loss, row["epoch"]
        if score > self._to_beat + self.tol or self._to_beat == -math.inf:
            self._to_beat, self._n_without_gain = score, 0
        else:
            self._n_without_gain += 1
        if self.keeps_best and self._n_without_gain >= self.patience:
            self.is_stopped_early = True
            raise KeyboardInterrupt  # skorch's way to end a training


def snapshot(module: Any, lowest: int) -> dict[str, torch.Tensor]:
    """Copies of what may be trained: the head and all stages from `lowest` on."""
    return {
        name: tensor.detach().clone()
        for name, tensor in module.state_dict().items()
        if _may_change(name, lowest)
    }


def restore(module: Any, state: dict[str, torch.Tensor]) -> None:
    """Bring a snapshot back."""
    module.load_state_dict(state, strict=False)


def _may_change(name: str, lowest: int) -> bool:
    part, _, rest = name.partition(".")
    return part == "head" or (part == "stages" and int(rest.partition(".")[0]) >= lowest)
