"""Relative paths of `memory` and `weights` start at the folder in which fit was called."""

import os
import pickle
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from torchvision.models import squeezenet1_1

from sktransfer import FineTuningClassifier, PretrainedFeatureExtractor


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The working folder, and another one to go to."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "first")
    return tmp_path / "first", tmp_path / "second"


@pytest.mark.parametrize("form", [str, Path, lambda name: joblib.Memory(name, verbose=0)])
def test_memory_of_an_extractor(form, folders, pictures, count_embedded):
    first, second = folders
    extractor = PretrainedFeatureExtractor(memory=form("kept")).fit(pictures)
    rows = extractor.transform(pictures)
    os.chdir(second)
    n_before = count_embedded["images"]
    for same in (extractor, pickle.loads(pickle.dumps(extractor))):
        np.testing.assert_array_equal(same.transform(pictures), rows)
    assert count_embedded["images"] == n_before
    assert os.listdir(first) == ["kept"]
    assert os.listdir(second) == []
    extractor.set_params(memory=str(second / "own")).transform(pictures)
    assert os.listdir(second) == ["own"]


def test_memory_of_fine_tuning(folders, pictures):
    first, second = folders
    model = FineTuningClassifier(memory="kept", unfreeze=0, max_epochs=1, random_state=0)
    model.fit(pictures, np.arange(len(pictures)) % 2)
    os.chdir(second)
    model.predict(pictures)
    assert os.listdir(first) == ["kept"]
    assert os.listdir(second) == []


def test_weights(folders, pictures):
    second = folders[1]
    torch.save(squeezenet1_1().state_dict(), "weights.pt")
    extractor = PretrainedFeatureExtractor("squeezenet1_1", weights="weights.pt", memory=False)
    copy = pickle.dumps(extractor.fit(pictures))
    os.chdir(second)
    np.testing.assert_allclose(
        pickle.loads(copy).transform(pictures), extractor.transform(pictures), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(FileNotFoundError, match=f"'weights.pt' does not exist.*in '{second}'"):
        extractor.fit(pictures)


def test_messages_name_the_folder(folders, pictures):
    first = folders[0]
    (first / "file").touch()
    with pytest.raises(ValueError, match=f"folder, and '{first / 'file'}' is a file"):
        PretrainedFeatureExtractor(memory="file").fit(pictures)
    above = f"'../a.pt' does not exist; looked for 'a.pt' in '{first.parent}'"
    with pytest.raises(FileNotFoundError, match=above):
        PretrainedFeatureExtractor("resnet18", weights="../a.pt").fit(pictures)
    with pytest.raises(ValueError, match=f"there is no such file in '{first}', where relative"):
        PretrainedFeatureExtractor().fit_transform(["none.jpg"])
