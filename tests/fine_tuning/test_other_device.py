"""Fine-tuning on another device: no operation mixes devices, and no copy is read too early."""

import numpy as np
import pytest
from fake_device import FakeDevice
from small_models import small


@pytest.mark.parametrize("is_streaming", [True, False])
@pytest.mark.parametrize("options", [{"unfreeze": 1}, {"unfreeze": 0}, {"augment": "light"}])
def test_fits_are_those_of_the_cpu(stripes, options, is_streaming, monkeypatch):
    X, y = stripes[0][:24], stripes[1][:24]

    def fitted(device):
        model = small(device=device, early_stopping=True, lr=1e-3, memory=False, **options)
        before = model.fit(X, y).predict_proba(X)
        model.partial_fit(X, y)
        return np.concatenate([before, model.predict_proba(X)]), model.transform(X)

    expected = fitted("cpu")
    with FakeDevice(monkeypatch, is_streaming) as device:
        found = fitted("meta")
    assert device.n_uploads
    for values, reference in zip(found, expected, strict=True):
        np.testing.assert_allclose(values, reference, rtol=1e-3, atol=1e-4)
