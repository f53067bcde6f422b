"""scikit-learn's own battery over the fine-tuning estimators: all pass, none expected to fail."""

import warnings

import pytest
from sklearn.utils.estimator_checks import estimator_checks_generator, parametrize_with_checks
from tiny_networks import tiny_network

from sktransfer import FineTuningClassifier, FineTuningRegressor

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
