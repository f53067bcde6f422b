"""Small fine-tuned models, and what their trained weights are."""

import numpy as np
from skorch.callbacks import Callback
from tiny_networks import tiny_network
from torch.nn import functional as F

from sktransfer import FineTuningClassifier, FineTuningRegressor

SMALL = {"preprocessing": {"size": 16, "crop": 16}, "random_state": 0}


# Values of each row, by the kind of the targets.
LOSSES = {
    "labels": lambda s, t: F.cross_entropy(s, t, reduction="none"),
    "indicators": lambda s, t: F.binary_cross_entropy_with_logits(s, t, reduction="none").mean(1),
    "numbers": lambda s, t: (s - t).square().mean(1),
}


def of_kind(coded, kind):
    """An estimator's class, images and targets of a kind."""
    X, k = coded
    y = {"labels": k, "indicators": np.stack([k == 1, k != 2], 1).astype(int), "numbers": k * 5.0}
    return FineTuningRegressor if kind == "numbers" else FineTuningClassifier, X, y[kind]


def small(cls=FineTuningClassifier, **parameters):
    """An estimator with a tiny backbone, two epochs."""
    return cls(**{"backbone": tiny_network, **SMALL, "max_epochs": 2, **parameters})


def quick(cls=FineTuningClassifier, **parameters):
    """One epoch of the head alone."""
    return small(cls, **{"unfreeze": 0, "max_epochs": 1, **parameters})


def state_of(model_or_net):
    """Copies of the weights and statistics in the net."""
    net = getattr(model_or_net, "net_", model_or_net)
    return {k: v.numpy().copy() for k, v in net.module_.state_dict().items()}


def assert_same_model(a, b, **tolerance):
    """Check the trained weights; a net may have its frozen stages or only what comes after."""
    left, right = state_of(a), state_of(b)
    common = left.keys() & right.keys()
    assert {name for name in left if name.startswith("head.")} <= common
    for name in common:
        np.testing.assert_allclose(left[name], right[name], err_msg=name, **tolerance)


class Record(Callback):
    """Keeps the weights at the start of training, and before and after each step."""

    def __deepcopy__(self, memo):
        return self  # the test looks at this one

    def on_train_begin(self, net, **kwargs):
        self.start, self.before, self.after = state_of(net), [], []

    def on_batch_begin(self, net, training=False, **kwargs):
        if training:
            self.before.append(state_of(net))

    def on_batch_end(self, net, training=False, **kwargs):
        if training:
            self.after.append(state_of(net))
