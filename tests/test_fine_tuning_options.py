"""Fine-tuning's options against naive references, and the checks of its parameters."""

import pytest
from test_fine_tuning import small

from sktransfer import _backbones

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"n_jobs": 0}, "The 'n_jobs' parameter"),
        ({"memory": True}, "The 'memory' parameter"),
        ({"memory": "s3://bucket"}, "memory must be a local folder"),
        ({"device": "gpu"}, "device='gpu' is no torch device"),
        ({"precision": "int8"}, "The 'precision' parameter"),
    ],
    ids=str,
)
def test_impossible_settings_are_told_before_loading(stripes, parameters, message, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("loaded")

    monkeypatch.setattr(_backbones, "load_backbone", refuse)
    with pytest.raises(ValueError, match=message):
        small(**parameters).fit(*stripes)
