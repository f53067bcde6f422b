"""The package as a whole: what importing it costs, what it offers."""

import subprocess
import sys
import warnings

import numpy as np
import pytest

import sktransfer


def test_import_loads_no_torch():
    code = (
        "import sys, sktransfer; dir(sktransfer); "
        "heavy = {'torch', 'torchvision', 'skorch', 'timm', 'PIL', 'pandas', 'sklearn'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_constructing_and_cloning_load_no_torch():
    code = (
        "import sys\n"
        "from sklearn.base import clone\n"
        "from sktransfer import PretrainedFeatureExtractor\n"
        "repr(clone(PretrainedFeatureExtractor('resnet50')).set_params(layer='layer3'))\n"
        "print(sorted({'torch', 'torchvision', 'skorch', 'timm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", sktransfer.__all__)
def test_public_names_load(name):
    assert getattr(sktransfer, name) is getattr(sktransfer, name)
    assert name in dir(sktransfer)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = sktransfer.nothing


def test_a_warning_points_at_the_users_line():
    images = [np.full((40, 40), 100.0)]  # read as 0…255, with a warning
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sktransfer.PretrainedFeatureExtractor(memory=False).fit_transform(images)
    assert len(caught) == 1
    if sys.version_info >= (3, 12):  # Python 3.11 cannot skip the frames of other packages
        assert caught[0].filename == __file__
