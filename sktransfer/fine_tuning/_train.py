"""One training: skorch's loop around the tuned module, and what it leaves behind."""

from __future__ import annotations

import copy
import dis
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from skorch import NeuralNet, NeuralNetClassifier, NeuralNetRegressor
from skorch.callbacks import Callback, LRScheduler
from skorch.helper import predefined_split

from sktransfer._threads import own_random_state, repeatable_kernels
from sktransfer.fine_tuning._callbacks import (
    EpochLog,
    FiniteLoss,
    GradientRules,
    LearningRates,
    Tempering,
    Unfreezing,
    not_finite,
    restore,
)
from sktransfer.fine_tuning._changes import BatchChange
from sktransfer.fine_tuning._gradient_scaling import GradientScaling
from sktransfer.fine_tuning._losses import WeightedLoss
from sktransfer.fine_tuning._optimizers import (
    Optimizer,
    as_optimizer,
    make_optimizer,
    parameter_groups,
)
from sktransfer.fine_tuning._rows import Batches, TrainingSet
from sktransfer.fine_tuning._schedules import resolve_schedule
from sktransfer.fine_tuning._tuned_network import TunedNetwork
from sktransfer.fine_tuning._weight_average import WeightAverage

_OURS = (
    "weight_average", "unfreezing", "tempering", "learning_rates", "gradient_scaling",
    "gradient_rules", "finite_loss", "epoch_log",
)  # fmt: skip


@dataclass
class TrainingSettings:
    """How to train; the names are the estimators' own."""

    kind: str
    n_outputs: int
    lr: float
    layer_decay: float
    optimizer: Any
    weight_decay: float
    lr_schedule: Any
    gradient_clip: float | None
    augment: Any
    mixup: float
    cutmix: float
    label_smoothing: float
    l2_sp: float
    weight_averaging: str | None
    batch_size: int
    keeps_best: bool
    patience: int
    tol: float
    callbacks: Any
    device: torch.device
    seed: int
    verbose: int


@dataclass
class TrainingResult:
    """What came of it.

    Attributes
    ----------
    history : list of dict
        One row per epoch; epoch 0, before the first step, where there is a validation part.
    best_epoch : int
        The epoch whose weights the network has now.
    n_iter : int
        Epochs trained.
    is_interrupted : bool
        Whether Ctrl-C ended it.
    start_score, best_score : float or None
        On the validation part, at epoch 0 and at the best epoch.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    n_iter: int = 0
    is_interrupted: bool = False
    start_score: float | None = None
    best_score: float | None = None


def train(
    tuned: TunedNetwork,
    train_set: TrainingSet,
    valid_set: TrainingSet | None,
    settings: TrainingSettings,
    *,
    entry: int,
    first_stage: Callable[[int], int],
    max_epochs: int,
    first_epoch: int = 0,
    keeps_net: bool = False,
    temperature: float = 1.0,
) -> TrainingResult:
    """Train in place.

    Parameters
    ----------
    tuned : TunedNetwork
    train_set, valid_set : TrainingSet
        Both may give embeddings until the first stages join the head.
    settings : TrainingSettings
    entry : int
        Position of the stage whose inputs the rows hold.
    first_stage : callable
        Epoch -> position of the lowest stage trained in it.
    max_epochs : int
    first_epoch : int, default=0
        Epochs trained before.
    keeps_net : bool, default=False
        Whether to go on with the net that is there, its optimizer, callbacks and history
        (``partial_fit``), if those are the optimizer and the callbacks that are asked for.
    temperature : float, default=1.0
        What the head's scores are divided by before the first stages are trained.
    """
    module = tuned.module(whole=entry < len(tuned.stage_names))
    module.entry = entry if module.stages else 0
    start = min(first_stage(1), len(module.stages))
    _check_callbacks(settings, joins_later=tuned.lowest < start)
    module.takes_embeddings = train_set.is_embedded
    n_batches = -(-len(train_set) // settings.batch_size)
    with (
        own_random_state(settings.seed, settings.device),  # drop-out draws from it
        repeatable_kernels(settings.device),
    ):
        shuffler, changer = (torch.Generator() for _ in range(2))
        shuffler.manual_seed(settings.seed)
        changer.manual_seed(settings.seed + 1)
        change = None
        if settings.augment is not None or settings.mixup or settings.cutmix:
            change = BatchChange(
                settings.augment, settings.mixup, settings.cutmix,
                settings.n_outputs if settings.kind == "multiclass" else None, changer,
            )  # fmt: skip
        valid = None
        if valid_set is not None and len(valid_set):
            valid = Batches(valid_set, max(settings.batch_size, 64), settings.device)
        result = TrainingResult()
        log = EpochLog(
            settings.kind, result.history, first_epoch, valid, settings.keeps_best,
            settings.patience, settings.tol, tuned.lowest,
        )  # fmt: skip
        module.to(settings.device)
        for parameter in module.stages.parameters():
            if parameter.ndim == 4:  # as the batches are
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        asked = made_for(settings)
        net = tuned.net if keeps_net and tuned.net_made_for == asked else None
        if net is not None and (net.device != str(settings.device) or start > module.n_frozen):
            net = None  # its optimizer is on the other device, or holds what is frozen now
        if net is None:
            module.freeze(start)
        average: Callback | None = None
        if settings.weight_averaging is not None:
            average = WeightAverage(
                settings.weight_averaging, tuned.lowest, max_epochs, n_batches, len(train_set)
            )
        is_half = bool(module.stages) and module.precision == "float16"
        callbacks = [
            ("weight_average", average or Callback()),
            ("unfreezing", Unfreezing(
                first_stage, partial(_stage_groups, module=module, settings=settings))),
            ("tempering", Tempering(temperature)),
            ("learning_rates", LearningRates(
                resolve_schedule(settings.lr_schedule), max(1, max_epochs * n_batches))),
            ("gradient_scaling", GradientScaling(settings.device) if is_half else Callback()),
            ("gradient_rules", GradientRules(
                settings.l2_sp, settings.gradient_clip, _anchors(tuned, module, settings))),
            ("finite_loss", FiniteLoss(settings.lr)),
            ("epoch_log", log),
        ]  # fmt: skip
        iterators = {
            "iterator_train__device": settings.device,
            "iterator_train__generator": shuffler,
            "iterator_train__change": change,
            "iterator_valid__device": settings.device,
            "train_split": None if valid is None else predefined_split(valid_set),
        }
        if net is None:
            net = make_net(module, settings, callbacks, iterators)
        else:
            fresh = dict(callbacks)
            net.callbacks_ = [(name, fresh.get(name, cb)) for name, cb in net.callbacks_]
            vars(net).update(iterators, batch_size=settings.batch_size)
            net.criterion_.label_smoothing = settings.label_smoothing
            _change_groups(net.optimizer_, _all_groups(module, settings, 0))
        tuned.net, tuned.net_made_for = net, asked
        try:
            result.is_interrupted = _run(net, train_set, max_epochs)
        except Exception as error:
            if valid is None and "valid_" in str(error):
                error.add_note(
                    "There is no validation part that a callback could watch: give X_val and "
                    "y_val, or early_stopping=True.",
                )
            raise
        finally:
            tuned.has_changed()
            module.eval()
            module.entry, module.takes_embeddings = 0, False
            net.train_split = None  # the rows need not outlive the training
    result.n_iter = log.epoch
    result.best_epoch = log.epoch
    if settings.keeps_best and log.best_epoch is not None:
        result.best_epoch = log.best_epoch
        restore(module, log.best_state)
        log.best_state = {}
    # The last step's weights have seen no loss.
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise not_finite(f"The trained weights {name} are no finite numbers.", settings.lr)
    if log.valid is not None:
        result.start_score, result.best_score = log.start_score, log.best_score
        log.valid = None
    return result


def make_net(
    module: Any,
    settings: TrainingSettings,
    callbacks: list | None = None,
    iterators: dict[str, Any] | None = None,
) -> NeuralNet:
    """skorch's net around the module, initialised."""
    kinds = {"multiclass": NeuralNetClassifier, "regression": NeuralNetRegressor}
    # Places are kept for ours, should training go on later.
    own: list[Any] = list(callbacks or [(name, Callback()) for name in _OURS])
    # The user's stay as they are, so that the estimator can be cloned.
    memo: dict[int, Any] = {}  # one, as callbacks may hold each other
    own += [_own_copy(callback, memo) for callback in settings.callbacks or []]

    arguments: dict[str, Any] = {
        "criterion": WeightedLoss(settings.kind, settings.label_smoothing),
        "optimizer": partial(_optimizer_of, module=module, settings=settings),
        "lr": settings.lr,
        "batch_size": settings.batch_size,
        "iterator_train": Batches,
        "iterator_valid": Batches,
        "train_split": None,
        "callbacks": own,
        "verbose": settings.verbose,
        "device": str(settings.device),
        **(iterators or {}),
    }
    if settings.kind == "multiclass":
        arguments["classes"] = list(range(settings.n_outputs))
        arguments["callbacks__valid_acc"] = None  # ours is weighted
        arguments["predict_nonlinearity"] = _softmax
    elif settings.kind == "multilabel":
        arguments["predict_nonlinearity"] = torch.sigmoid
    net = kinds.get(settings.kind, NeuralNet)(module, **arguments)
    return net.initialize()


def _own_copy(callback: Any, memo: dict[int, Any]) -> Any:
    """A callback, or its pair with a name, to be written to; a writer or a run stays shared."""
    if isinstance(callback, tuple):
        return (*callback[:-1], _own_copy(callback[-1], memo))
    try:
        return copy.deepcopy(callback, memo)
    except TypeError:  # it holds a lock, an open file or a connection
        return copy.copy(callback)


def made_for(settings: TrainingSettings) -> tuple[Any, list[Any]]:
    """What a net is made for: where it is no longer the same, the net is made anew."""
    optimizer = as_optimizer(settings.optimizer)
    if isinstance(optimizer, Optimizer):
        optimizer = optimizer.get_params()
    return optimizer, list(settings.callbacks or [])


def _check_callbacks(settings: TrainingSettings, joins_later: bool) -> None:
    for callback in settings.callbacks or []:
        kept = callback[-1] if isinstance(callback, tuple) and callback else callback
        if not hasattr(kept, "on_train_begin"):
            raise TypeError(
                f"callbacks holds {callback!r}: skorch's callbacks are accepted, or pairs of a "
                "name and one."
            )
        if not (kept is LRScheduler or isinstance(kept, LRScheduler)):
            continue
        if settings.lr_schedule != "constant":
            raise ValueError(
                f"callbacks holds {kept!r}, and lr_schedule={settings.lr_schedule!r} would undo at "
                "each step what it sets: give lr_schedule='constant' with it, or leave it out."
            )
        if joins_later:
            raise ValueError(
                f"callbacks holds {kept!r}, which knows no stage that joins in a later epoch: give "
                "an `unfreeze` that stays the same with it, or a function as lr_schedule instead."
            )


def _softmax(scores: torch.Tensor) -> torch.Tensor:
    return scores.softmax(-1)


def _run(net: NeuralNet, train_set: TrainingSet, max_epochs: int) -> bool:
    """Run skorch's loop; True if Ctrl-C ended it."""
    is_interrupted = False
    try:
        net.notify("on_train_begin", X=train_set, y=None)
        net.fit_loop(train_set, epochs=max_epochs)
    except KeyboardInterrupt as interrupt:
        is_interrupted = not _raised_by_callback(interrupt)
    finally:
        net.notify("on_train_end", X=train_set, y=None)
    return is_interrupted


def _raised_by_callback(interrupt: KeyboardInterrupt) -> bool:
    """Whether a callback ended the training; its way to do so is Ctrl-C's exception."""
    trace = interrupt.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not isinstance(trace.tb_frame.f_locals.get("self"), Callback):
        return False
    # Ctrl-C may hit a callback anywhere; its own `raise` is one instruction.
    code = trace.tb_frame.f_code.co_code
    return code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _stage_groups(
    start: int, stop: int, module: Any, settings: TrainingSettings
) -> list[dict[str, Any]]:
    """Optimizer groups of the stages from `start` to `stop`, each with its learning rate."""
    made = []
    for name, distance, parameters in module.groups(start, stop):
        lr = settings.lr * settings.layer_decay**distance
        made += parameter_groups(name, parameters, lr, settings.weight_decay)
    return made


def _all_groups(module: Any, settings: TrainingSettings, start: int) -> list[dict[str, Any]]:
    """Groups of the head and of the stages from `start` on."""
    own = [p for p in module.head.parameters() if p.requires_grad]
    head = parameter_groups("head", own, settings.lr, settings.weight_decay)
    return head + _stage_groups(start, len(module.stages), module, settings)


def _optimizer_of(_: Any, *, module: Any, settings: TrainingSettings, **kwargs: Any) -> Any:
    groups = _all_groups(module, settings, module.n_frozen)
    return make_optimizer(settings.optimizer, groups, settings.lr)


def _change_groups(optimizer: Any, wanted: list[dict[str, Any]]) -> None:
    """Learning rates and decay of `wanted` for an optimizer's groups; their state stays."""
    by_parameter = {id(group["params"][0]): group for group in wanted}
    for group in optimizer.param_groups:
        new = by_parameter[id(group["params"][0])]
        group["base_lr"], group["weight_decay"] = new["base_lr"], new["weight_decay"]


def _anchors(
    tuned: TunedNetwork, module: Any, settings: TrainingSettings
) -> dict[int, torch.Tensor]:
    """The pre-trained value of each parameter that is pulled towards it."""
    if not settings.l2_sp or not module.stages:
        return {}
    return {
        key: value.to(settings.device, copy=True)
        for key, value in tuned.pretrained_values().items()
    }


def report(result: TrainingResult, class_name: str, probe_started: bool, trains_more: bool) -> None:
    """Warn of what the user should know about how the training ended."""
    if result.is_interrupted:
        warnings.warn(
            f"The training of {class_name} was interrupted after {result.n_iter} epochs; the "
            f"weights of epoch {result.best_epoch} are kept, and the estimator is fitted.",
            UserWarning,
            stacklevel=6,
        )
    elif result.best_epoch == 0 and result.n_iter and result.start_score is not None:
        start = "linear probe" if probe_started else "network as it was"
        what = "Fine-tuning" if trains_more else "Training the head"
        warnings.warn(
            f"{what} did not improve on the {start} (validation score "
            f"{result.start_score:.3f}, best of {result.n_iter} epochs no better): the {start} "
            "(epoch 0) is kept. More data, a smaller lr, fewer unfrozen stages or a stronger "
            "layer_decay may help; or the frozen features are the better model here.",
            UserWarning,
            stacklevel=6,
        )


def as_random_seed(random_state: Any) -> tuple[np.random.RandomState, int]:
    """A RandomState and a seed for torch from the parameter ``random_state``."""
    from sklearn.utils import check_random_state

    rng = check_random_state(random_state)
    return rng, int(rng.randint(np.iinfo(np.int32).max))
