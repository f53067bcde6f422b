"""scikit-learn's own battery over the fine-tuning estimators: all pass, none expected to fail."""

import warnings

import pytest
import torch
from sklearn.utils.estimator_checks import estimator_checks_generator, parametrize_with_checks

from sktransfer import FineTuningClassifier, FineTuningRegressor


def tiny_network():
    generator = torch.Generator().manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, stride=2),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(4, 6, 2),
        torch.nn.BatchNorm2d(6),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(6, 3),
    )
    for parameter in network.parameters():
        parameter.data.normal_(generator=generator)
    return network


COMMON = {
    "backbone": tiny_network,
    "image_shape": (1, -1),
    "preprocessing": {"size": 16, "crop": 16},
    "max_epochs": 2,
}
ESTIMATORS = [
    FineTuningClassifier(**COMMON, unfreeze=0),
    FineTuningClassifier(**COMMON, unfreeze=1, augment="light", dropout=0.2, head=(4,)),
    FineTuningRegressor(**COMMON, batch_size=64),
]


pytestmark = pytest.mark.usefixtures("one_thread")


# The battery's numbers are drawn from all over the line: pixels out of 0…1 are expected.
@pytest.mark.filterwarnings("ignore:.*outside 0…:UserWarning")
@parametrize_with_checks(ESTIMATORS)
def test_sklearn_estimator(estimator, check):
    check(estimator)


def test_whole_battery_runs():
    """2-D input is declared, so that no more is skipped than scikit-learn itself skips."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checks = list(estimator_checks_generator(ESTIMATORS[0]))
    assert len(checks) >= 55
    assert not [w for w in caught if "Can't test estimator" in str(w.message)]
