"""Training: the epochs in which stages are trained, and skorch's loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import NamedTuple

import torch
from skorch import NeuralNet, NeuralNetClassifier, NeuralNetRegressor
from skorch.callbacks import Callback, LRScheduler
from skorch.helper import predefined_split

from sktransfer._progress import did_you_mean, warn
from sktransfer._threads import deterministic_cudnn, is_out_of_memory, own_random_state
from sktransfer.fine_tuning._callbacks import (
    EpochLog,
    OneCycle,
    Unfreezing,
    interpolate,
    not_finite,
)
from sktransfer.fine_tuning._head import Loss, WeightedLoss
from sktransfer.fine_tuning._inputs import Batches, TrainingSet
from sktransfer.fine_tuning._module import TunedModule, TunedNetwork
from sktransfer.fine_tuning._training_state import TrainingState, continue_from
from sktransfer.networks._inference import tensor_float_32

Groups = list[dict]


@dataclass
class TrainingSettings:
    """Some of the estimator's parameters, and settings of one training."""

    kind: str  # "multiclass", "multilabel", "regression"
    n_outputs: int
    device: torch.device
    seed: int
    lr: float  # of the head
    layer_decay: float
    optimizer: str | Callable[..., torch.optim.Optimizer]
    weight_decay: float
    loss: Loss
    augment: str | Callable | Sequence | None
    batch_size: int
    n_iter_no_change: int
    callbacks: Sequence | None
    verbose: int
    keeps_best: bool = False  # the best epoch on the validation part
    is_continued: bool = False  # an epoch of partial_fit, at constant learning rates
    wise_ft_share: float | None = None  # the final weights' share in the interpolation


class UnfreezePlan:
    """The parameter ``unfreeze`` for one network.

    Stages are counted from the head downwards: 1 is the last stage below the head. A stage that
    only pools (``"pool"``) is not counted; it is trained with the one below it.

    `stage_names` are the stages below the head, in the order in which they run; `first_epoch` is
    the number of epochs trained before. Epochs count from 1.

    Examples
    --------
    >>> from sktransfer.fine_tuning._train import UnfreezePlan
    >>> plan = UnfreezePlan({1: 0, 3: 2}, ["stem", "layer1", "layer2", "pool"], max_epochs=5)
    >>> [plan.first_stage(epoch) for epoch in range(1, 6)]
    [4, 4, 1, 1, 1]
    """

    def __init__(
        self,
        unfreeze: int | str | Mapping,
        stage_names: Sequence[str],
        max_epochs: int,
        first_epoch: int = 0,
    ):
        self.stage_names, self.first_epoch = list(stage_names), first_epoch
        self._counted = [i for i, name in enumerate(self.stage_names) if name != "pool"]
        self._steps = self._read(unfreeze, max_epochs)

    @property
    def first_trained_stage(self) -> int:
        """Position of the lowest stage that is trained in any epoch; ``len(stage_names)``: none."""
        return min(self._position(k) for _, k in self._steps)

    def first_stage(self, epoch: int) -> int:
        """Return the position of the lowest stage trained in `epoch` of this training, from 1."""
        k = [k for start, k in self._steps if epoch + self.first_epoch >= start][-1]
        return self._position(k)

    def _position(self, k: int) -> int:
        return len(self.stage_names) if k == 0 else self._counted[-k]

    def _read(self, unfreeze: int | str | Mapping, max_epochs: int) -> list[tuple[int, int]]:
        """Return pairs of an epoch and the number of stages trained from it on."""
        n = len(self._counted)
        if isinstance(unfreeze, str) and unfreeze == "gradual":
            # Only the head, then more and more stages until all are trained at half time.
            half = max(1, max_epochs // 2)
            return [(1 + e, min(n, round(n * e / half))) for e in range(half + 1)]
        if not isinstance(unfreeze, Mapping):
            return [(1, self._count(unfreeze, "unfreeze"))]
        steps = [(1, 0)]
        for epoch, value in sorted(unfreeze.items()):
            if not isinstance(epoch, Integral) or isinstance(epoch, bool) or epoch < 1:
                raise ValueError(
                    f"unfreeze={unfreeze!r}: the keys are epochs and count from 1; got {epoch!r}."
                )
            steps.append((int(epoch), self._count(value, f"unfreeze[{epoch}]")))
            if steps[-1][1] < steps[-2][1]:
                raise ValueError(
                    f"unfreeze={unfreeze!r} freezes stages again in epoch {epoch}: the numbers "
                    "of stages must not fall."
                )
        return steps

    def _count(self, value: object, name: str) -> int:
        n = len(self._counted)
        if isinstance(value, str) and value == "all":
            return n
        if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < 0:
            raise ValueError(
                f"{name}={value!r} is not accepted: give a number of stages from 0 to {n}, "
                f"or 'all'.{did_you_mean(str(value), ['all'])}"
            )
        if int(value) > n:
            names = [self.stage_names[i] for i in self._counted]
            raise ValueError(
                f"{name}={value!r}, but the stages below this network's head are {names}. "
                f"Give at most {n}, or 'all'."
            )
        return int(value)


class Phase(NamedTuple):
    """Epochs of which the rows are inputs of the stage at the position `input_stage`."""

    n_epochs: int
    input_stage: int
    train_set: TrainingSet
    valid_set: TrainingSet | None = None


def train(
    tuned: TunedNetwork,
    phases: list[Phase],
    settings: TrainingSettings,
    first_stage: Callable[[int], int],
    first_epoch: int = 0,
    old_state: TrainingState | None = None,
) -> EpochLog:
    """Train `tuned` in place.

    `first_stage` returns the lowest stage trained in an epoch, counted from 1. `first_epoch` is the
    number of epochs trained before, and `old_state` the state after them.
    """
    module, first = tuned.module(), tuned.first_trained_stage
    with (
        own_random_state(settings.seed, settings.device),  # dropout draws from it
        deterministic_cudnn(settings.device),
        _explain_errors(settings.batch_size),
    ):
        module.to(settings.device)
        for parameter in module.stages.parameters():
            if parameter.ndim == 4:  # as the batches are
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        module.freeze(min(first_stage(1), len(module.stages)))
        share = settings.wise_ft_share
        unfreezing = Unfreezing(first_stage, None if share is None else first)
        valid, patience = None, settings.n_iter_no_change
        if phases[0].valid_set is not None:
            n_at_once = max(settings.batch_size, 64)
            valid = Batches(phases[0].valid_set, n_at_once, settings.device)
        log = EpochLog(
            settings.kind, settings.lr, first_epoch, valid, settings.keeps_best, patience, first
        )
        callbacks: list[Callback] = [unfreezing, log]
        if not settings.is_continued and not has_scheduler(settings.callbacks):
            n_batches = -(-len(phases[0].train_set) // settings.batch_size)
            n_steps = n_batches * sum(phase.n_epochs for phase in phases)
            callbacks.insert(1, OneCycle(max(1, n_steps)))
        net = make_net(module, first, settings, callbacks)
        if old_state is not None:
            continue_from(net, old_state, has_scheduler(settings.callbacks))
        tuned.net = net
        _run(net, phases, log, bool(settings.callbacks))
        module.load_state_dict(log.best_state, strict=False)
        if share is not None:
            interpolate(module, unfreezing.start, share)
        log.best_state, unfreezing.start = {}, {}
        net.optimizer_.zero_grad()
        if not settings.is_continued:
            net.optimizer_.state.clear()
    # No loss was computed with the weights after the last step.
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise not_finite(f"The trained weights {name} became NaN or infinite.", settings.lr)
    return log


@contextmanager
def _explain_errors(batch_size: int) -> Iterator[None]:
    """Explain errors of a lack of memory, or of a batch with too few rows."""
    try:
        yield
    except (RuntimeError, MemoryError, ValueError) as error:
        if "Expected more than 1 value per channel" in str(error):
            raise ValueError(
                "A batch norm of `head`, or of a network with weights=None, got a batch of one "
                "row, and in training it takes several. Give at least 2 different images and a "
                f"batch_size of at least 3 (it is {batch_size}), or a head without batch norm."
            ) from error
        if not is_out_of_memory(error):
            raise
        raise MemoryError(
            f"Memory does not suffice for training ({error}). Give a smaller batch_size (it is "
            f"{batch_size}), smaller images (preprocessing={{'size': …, 'crop': …}}), fewer stages "
            "to unfreeze, precision='bfloat16', or another device."
        ) from error


class _RetryInParts:
    """A method of skorch's net for one batch, which runs the batch in parts if memory runs out.

    It calls the class's method, so that a net can be pickled during training.
    """

    def __init__(self, net: NeuralNet, name: str):
        self.net, self.name = net, name

    def __call__(self, batch: tuple, **params: object) -> dict:
        while True:
            try:
                with tensor_float_32(self.net.module_.device, False):
                    return getattr(type(self.net), self.name)(self.net, batch, **params)
            except (RuntimeError, MemoryError) as error:
                n_images = batch[0]["x"].shape[:2].numel()
                if not is_out_of_memory(error) or not self.net.module_.halve(n_images):
                    raise
            # Outside the handler, whose error refers to the failed step's tensors.
            self.net.optimizer_.zero_grad()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
            warn(
                f"Out of memory in training with {n_images} images: the network runs "
                f"{self.net.module_.max_at_once} of them at once from now on, which is slower "
                "and gives the same model. A smaller batch_size needs less memory."
            )


def _run_single_epoch(
    net: NeuralNet,
    iterator: Batches | None,
    training: bool,
    prefix: str,
    step_fn: Callable[[tuple], dict],
) -> None:
    """Replace skorch's method to read all losses at once, as each read waits for the device."""
    losses = []
    for batch in iterator or ():
        net.notify("on_batch_begin", batch=batch, training=training)
        step = step_fn(batch)
        losses.append(step["loss"].detach())
        net.history.record_batch(f"{prefix}_batch_size", len(batch[1]))
        net.notify("on_batch_end", batch=batch, training=training, **step)
    if losses:
        rows = net.history[-1]["batches"][-len(losses) :]
        for row, loss in zip(rows, torch.stack(losses).cpu().tolist(), strict=True):
            row[f"{prefix}_loss"] = loss
        net.history.record(f"{prefix}_batch_count", len(losses))


def _run(net: NeuralNet, phases: list[Phase], log: EpochLog, has_callbacks: bool) -> None:
    """Run skorch's loop until the last epoch, or until a KeyboardInterrupt."""
    module, first_set = net.module_, phases[0].train_set
    module.input_stage = phases[0].input_stage
    names = ("train_step_single", "validation_step")
    methods: dict[str, Callable] = {name: _RetryInParts(net, name) for name in names}
    if module.device.type != "cpu" and not has_callbacks:  # which may read each loss
        methods["run_single_epoch"] = partial(_run_single_epoch, net)
    try:
        vars(net).update(methods)
        net.notify("on_train_begin", X=first_set, y=None)
        for n_epochs, input_stage, train_set, valid_set in phases:
            module.input_stage = input_stage
            net.train_split = None if valid_set is None else predefined_split(valid_set)
            net.fit_loop(train_set, epochs=n_epochs)
    except KeyboardInterrupt:
        # skorch's callbacks raise it after an epoch to end a training.
        log.is_interrupted = log.is_within_epoch
    except Exception as error:
        if log.valid is None and "valid_" in str(error):
            error.add_note(
                "There is no validation part that a callback could watch: give X_val and "
                "y_val, or early_stopping=True."
            )
        raise
    finally:
        net.notify("on_train_end", X=first_set, y=None)
        module.eval()
        module.input_stage = 0
        net.train_split, log.valid = None, None  # so that the net does not keep the rows
        for name in methods:
            del vars(net)[name]


def make_net(
    module: TunedModule,
    first_trained_stage: int,
    settings: TrainingSettings,
    callbacks: Sequence[Callback] = (),
) -> NeuralNet:
    """Make and initialise skorch's net for the module."""
    augment = None
    if settings.augment is not None:
        from sktransfer.fine_tuning._augment import BatchAugment

        draws = torch.Generator().manual_seed(settings.seed + 1)
        kind, n_outputs = settings.kind, settings.n_outputs
        augment = BatchAugment(settings.augment, kind, n_outputs, draws, settings.device)
    kinds = {"multiclass": NeuralNetClassifier, "regression": NeuralNetRegressor}
    arguments: dict[str, object] = {
        "criterion": WeightedLoss(settings.kind, settings.loss),
        "optimizer": partial(
            _make_optimizer, groups=_groups(module, first_trained_stage, settings), of=settings
        ),
        "lr": settings.lr,
        "batch_size": settings.batch_size,
        "iterator_train": Batches,
        "iterator_train__device": settings.device,
        "iterator_train__generator": torch.Generator().manual_seed(settings.seed),
        "iterator_train__augment": augment,
        "iterator_valid": Batches,
        "iterator_valid__device": settings.device,
        "train_split": None,
        "callbacks": [*callbacks, *_copied_callbacks(settings.callbacks or [])],
        "verbose": settings.verbose,
        "device": str(settings.device),
    }
    if settings.kind == "multiclass":
        arguments["classes"] = list(range(settings.n_outputs))
        arguments["callbacks__valid_acc"] = None  # ours is weighted
        arguments["predict_nonlinearity"] = partial(torch.softmax, dim=-1)
    elif settings.kind == "multilabel":
        arguments["predict_nonlinearity"] = torch.sigmoid
    return kinds.get(settings.kind, NeuralNet)(module, **arguments).initialize()


def _groups(module: TunedModule, first_stage: int, settings: TrainingSettings) -> Groups:
    """Return parameter groups of the head, then of the stages from `first_stage` on.

    A stage's rate is ``lr · layer_decay ** distance``, distance 1 for the stage below the head.
    Biases and the parameters of norms have a single dimension and do not decay.
    """
    head = [p for p in module.head.parameters() if p.requires_grad]
    groups = []
    for name, distance, parameters in [("head", 0, head), *module.groups(first_stage)]:
        for is_weight in (True, False):
            if own := [p for p in parameters if (p.ndim > 1) == is_weight]:
                groups.append(
                    {
                        "params": own,
                        "lr": settings.lr * settings.layer_decay**distance,
                        "weight_decay": settings.weight_decay if is_weight else 0.0,
                        "stage": name,
                    }
                )
    if not groups:
        raise ValueError(
            "There is nothing to train: no parameter of `head` requires a gradient, and no stage "
            "is unfrozen. Give head.requires_grad_(True), or another unfreeze."
        )
    return groups


def _make_optimizer(
    _: object, *, groups: Groups, of: TrainingSettings, **kwargs: object
) -> torch.optim.Optimizer:
    if of.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=of.lr)
    if of.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=of.lr, momentum=0.9)
    assert callable(of.optimizer)
    optimizer = of.optimizer(groups, lr=of.lr)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer={of.optimizer!r} returns {optimizer!r}: it must return a "
            "torch.optim.Optimizer."
        )
    return optimizer


def has_scheduler(callbacks: Sequence | None) -> bool:
    """Whether the user's callbacks set the learning rates."""
    parts = [part for c in callbacks or [] for part in (c if isinstance(c, tuple) else (c,))]
    return any(part is LRScheduler or isinstance(part, LRScheduler) for part in parts)


def _copied_callbacks(callbacks: Sequence) -> list:
    """Copy the user's callbacks, so that the estimator can be cloned."""
    own, memo = [], dict[int, object]()  # one memo, as callbacks may refer to each other
    for callback in callbacks:
        *name, kept = callback if isinstance(callback, tuple) and callback else (callback,)
        if not hasattr(kept, "on_train_begin"):
            raise TypeError(
                f"callbacks holds {callback!r}: skorch's callbacks are accepted, or pairs of a "
                "name and one."
            )
        try:
            copied = copy.deepcopy(kept, memo)
        except TypeError:  # it holds a lock, an open file or a connection
            copied = copy.copy(kept)
        own.append((*name, copied) if name else copied)
    return own


def report(log: EpochLog, class_name: str, start: str, trains_stages: bool) -> None:
    """Warn of an interruption, and of a training that did not improve on its start."""
    if log.is_interrupted:
        warn(
            f"The training of {class_name} was interrupted in epoch {log.epoch + 1}; the "
            f"weights of epoch {log.kept_epoch} are kept, and the estimator is fitted."
        )
    elif log.kept_epoch == 0 and log.epoch:
        what = "Fine-tuning" if trains_stages else "Training the head"
        first, *later = [row["valid_score"] for row in log.history]
        warn(
            f"{what} did not improve on the {start} (validation score "
            f"{first:.3f}, afterwards at most {max(later):.3f}): the {start} (epoch 0) is kept. "
            "More data, a smaller lr, fewer unfrozen stages or a smaller layer_decay may help; or "
            "the frozen features are the better model here."
        )
