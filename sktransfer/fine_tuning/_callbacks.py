"""skorch callbacks for fine-tuning: unfreezing, learning rates, and the log of epochs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import torch
from skorch import NeuralNet
from skorch.callbacks import Callback

from sktransfer.fine_tuning._head import validation_score
from sktransfer.fine_tuning._inputs import Batches
from sktransfer.fine_tuning._module import TunedModule

State = dict[str, torch.Tensor]


class Unfreezing(Callback):
    """Unfreezes stages at the epochs of `first_stage`.

    With `first_trained_stage`, `start` is a copy of all weights that the training will change, made
    before the first stage is trained.
    """

    def __init__(self, first_stage: Callable[[int], int], first_trained_stage: int | None):
        self.first_stage, self.first_trained_stage = first_stage, first_trained_stage
        self.start: State = {}
        self._epoch = 0

    def on_epoch_begin(self, net: NeuralNet, **kwargs: object) -> None:
        self._epoch += 1
        module = net.module_
        first = min(self.first_stage(self._epoch), len(module.stages))
        if first < module.n_frozen:
            module.freeze(first)
        trains_stages = module.n_frozen < len(module.stages)
        if trains_stages and self.first_trained_stage is not None and not self.start:
            self.start = snapshot(module, self.first_trained_stage)


class OneCycle(Callback):
    """Multiplies learning rates by 1/25 to 1 in the first quarter, then by 1 to 1e-5 [1]_.

    Rise and fall follow half a cosine.

    References
    ----------
    .. [1] L. N. Smith, N. Topin: "Super-convergence: very fast training of neural networks
       using large learning rates", 2019. :doi:`10.1117/12.2520589`
    """

    def __init__(self, n_steps: int):
        self.n_steps, self.step = n_steps, 0

    def on_train_begin(self, net: NeuralNet, **kwargs: object) -> None:
        self.rates = [group["lr"] for group in net.optimizer_.param_groups]

    def on_batch_begin(self, net: NeuralNet, training: bool = False, **kwargs: object) -> None:
        if training:
            factor = self._factor((self.step + 0.5) / self.n_steps)
            for group, rate in zip(net.optimizer_.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor
            self.step += 1

    @staticmethod
    def _factor(progress: float) -> float:
        if progress < 0.25:
            return _half_cosine(1 / 25, 1.0, progress / 0.25)
        return _half_cosine(1.0, 1e-5, (progress - 0.25) / 0.75)


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


class EpochLog(Callback):
    """Writes one row per epoch, scores the validation part, and keeps the best epoch.

    With `keeps_best`, training ends after `patience` epochs without a better score. `history`
    holds the rows, `epoch` the number of epochs trained.
    """

    def __init__(
        self,
        kind: str,
        lr: float,
        first_epoch: int,
        valid: Batches | None,
        keeps_best: bool,
        patience: int,
        first_trained_stage: int,
    ):
        self.kind, self.lr, self.epoch, self.valid = kind, lr, first_epoch, valid
        self.keeps_best, self.patience = keeps_best, patience
        self.first_trained_stage = first_trained_stage
        self.history: list[dict[str, float]] = []
        self.is_within_epoch = self.is_interrupted = False
        self.best_epoch: int | None = None
        self.best_state: State = {}
        self._best, self._n_without_gain, self._since = (-math.inf, -math.inf), 0, 0.0
        # Scores, targets, weights and the loss of the validation part, on the network's device.
        self._batches: list[tuple[torch.Tensor, ...]] = []

    @property
    def kept_epoch(self) -> int:
        """The epoch whose weights are kept."""
        has_best = self.keeps_best and self.best_epoch is not None
        return self.best_epoch if has_best else self.epoch  # type: ignore[return-value]

    def on_train_begin(self, net: NeuralNet, **kwargs: object) -> None:
        if self.valid is not None:
            for batch in self.valid:
                self.on_batch_end(net, batch=batch, **net.validation_step(batch))
            self._close(net, {"epoch": self.epoch})

    def on_epoch_begin(self, net: NeuralNet, **kwargs: object) -> None:
        self._since = time.perf_counter()
        self.is_within_epoch = True
        self._batches.clear()

    def on_batch_end(self, net, batch, *, training=False, loss, y_pred, **kwargs: object) -> None:  # type: ignore[override]
        if training:
            self._check_losses(net, len(net.history[-1]["batches"]) - 1)
        else:
            scores, weight = y_pred
            self._batches.append((scores.float(), batch[1], weight, loss.detach()))

    def _check_losses(self, net: NeuralNet, start: int) -> None:
        """Check the losses of this epoch's batches from `start` on."""
        for k, batch in enumerate(net.history[-1]["batches"][start:], start + 1):
            if not math.isfinite(value := batch.get("train_loss", 0.0)):
                where = f"epoch {len(net.history)}, batch {k}"
                raise not_finite(f"The training loss became {value} in {where}.", self.lr)

    def on_epoch_end(self, net: NeuralNet, **kwargs: object) -> None:
        self._check_losses(net, 0)
        self.epoch += 1
        self.is_within_epoch = False
        lr = max(group["lr"] for group in net.optimizer_.param_groups)
        net.history.record("lr", lr)
        row = {
            "epoch": self.epoch,
            "train_loss": float(net.history[-1, "train_loss"]),
            "lr": lr,
            "n_unfrozen": net.module_.n_unfrozen,
            "seconds": time.perf_counter() - self._since,
        }
        self._close(net, row)
        if "valid_score" in row:
            net.history.record("valid_score", row["valid_score"])
        if self.keeps_best and self._n_without_gain >= self.patience:
            raise KeyboardInterrupt  # skorch's way to end a training

    def _close(self, net: NeuralNet, row: dict[str, float]) -> None:
        """Add an epoch's row, with its validation score if there is a validation part."""
        self.history.append(row)
        if not self._batches:
            return
        *columns, losses = zip(*self._batches, strict=True)
        scores, target, weight = (torch.cat(column).cpu().numpy() for column in columns)
        n_rows = [len(target) for _, target, *_ in self._batches]
        row["valid_loss"] = float(np.average(torch.stack(losses).cpu().tolist(), weights=n_rows))
        row["valid_score"] = math.nan
        if not weight.any():  # all its images have become unreadable
            row["valid_loss"] = math.nan
            return
        score = row["valid_score"] = validation_score(self.kind, scores, target, weight)
        self._n_without_gain = 0 if score > self._best[0] else self._n_without_gain + 1
        if (score, -row["valid_loss"]) > self._best:
            self._best, self.best_epoch = (score, -row["valid_loss"]), int(row["epoch"])
            if self.keeps_best:
                self.best_state = snapshot(net.module_, self.first_trained_stage)


def not_finite(what: str, lr: float) -> ValueError:
    """Make an error that names the likely causes."""
    return ValueError(
        f"{what} The likely cause is a learning rate that is too large: lr={lr!r}; try a tenth of "
        "it, or callbacks=[skorch.callbacks.GradientNormClipping(1.0)]. Other causes: very large "
        "sample weights or targets, an `augment`, `loss` or `preprocessing` function that returns "
        "NaN."
    )


def snapshot(module: TunedModule, first_stage: int) -> State:
    """Copy the weights of the head and of all stages from `first_stage` on."""
    state = {f"head.{name}": tensor for name, tensor in module.head.state_dict().items()}
    for i in range(first_stage, len(module.stages)):
        own = module.stages[i].state_dict()
        state |= {f"stages.{i}.{name}": tensor for name, tensor in own.items()}
    return {name: tensor.detach().clone() for name, tensor in state.items()}


@torch.no_grad()
def interpolate(module: TunedModule, start: State, share: float) -> None:
    """Set the weights to (1 - share) · start + share · weights (WiSE-FT) [1]_.

    References
    ----------
    .. [1] M. Wortsman, G. Ilharco, J. W. Kim et al.: "Robust fine-tuning of zero-shot models",
       CVPR 2022. https://arxiv.org/abs/2109.01903
    """
    state = module.state_dict()
    for name, tensor in start.items():
        if tensor.is_floating_point():
            state[name].copy_(torch.lerp(tensor, state[name], share))
