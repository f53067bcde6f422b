"""scikit-learn's own battery over our estimators: all pass, none is expected to fail."""

import warnings

import pytest
from sklearn.utils.estimator_checks import estimator_checks_generator, parametrize_with_checks
from tiny_networks import tiny_network

from sktransfer import PretrainedFeatureExtractor

ESTIMATORS = [
    PretrainedFeatureExtractor(image_shape=(1, -1)),
    PretrainedFeatureExtractor(image_shape=(1, -1), layer=["stage1", "stage3"], pooling="avgmax"),
    PretrainedFeatureExtractor(
        "squeezenet1_1", weights=None, image_shape=(-1, 1), preprocessing={"size": 32, "crop": 32}
    ),
    PretrainedFeatureExtractor(
        tiny_network, image_shape=(1, -1), preprocessing={"size": 16, "crop": 16}, memory=False
    ),
    PretrainedFeatureExtractor(image_shape=(1, -1), on_error="nan", batch_size=3, n_jobs=2),
]


# The battery's numbers are drawn from the whole real line: pixels outside 0…1 are expected.
@pytest.mark.filterwarnings("ignore:.*outside 0…:UserWarning")
@parametrize_with_checks(ESTIMATORS)
def test_sklearn_estimator(estimator, check):
    check(estimator)


def test_whole_battery_runs():
    """2-D input is declared, so that no more is skipped than scikit-learn itself skips."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checks = list(estimator_checks_generator(ESTIMATORS[0]))
    assert len(checks) >= 40
    assert not [w for w in caught if "Can't test estimator" in str(w.message)]
