"""Containers of images with labels, folders and patterns: the message says what to give instead."""

import glob

import numpy as np
import pandas as pd
import pytest
import torch
from image_forms import BadImage, as_images, pixels
from PIL import Image
from sklearn.utils import Bunch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset
from torchvision.datasets import FakeData, ImageFolder


class OfHuggingFace:
    """What sets their Dataset apart."""

    column_names = ("image", "label")
    shape = (3, 2)

    def __len__(self):
        return 3

    def __getitem__(self, key):
        return {"image": "a.png", "label": 0}


OfHuggingFace.__module__ = "datasets.arrow_dataset"


class ImagesAlone(ImageFolder):
    """A user's own class."""

    def __getitem__(self, i):
        return super().__getitem__(i)[0]


class Inherited(ImageFolder):
    """A subclass whose items are pairs still."""


@pytest.fixture
def root(tmp_path):
    for i, name in enumerate(["a/0.png", "a/1.png", "b/2.png"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (5, 4), (i, 0, 0)).save(tmp_path / name)
    return tmp_path


MADE = {
    "ImageFolder": lambda f: f,
    "Inherited": lambda f: Inherited(f.root),
    "Subset": lambda f: Subset(f, [2, 0]),
    "Subset of a Subset": lambda f: Subset(Subset(f, [2, 0]), [0, 1]),
    "ConcatDataset": lambda f: ConcatDataset([f, f]),
    "TensorDataset": lambda f: TensorDataset(torch.zeros(3, 3, 5, 4), torch.zeros(3)),
    "DataLoader": lambda f: DataLoader(f),
    "DataLoader of tensors": lambda f: DataLoader(TensorDataset(torch.zeros(3, 3, 5, 4))),
    "DataLoader of images": lambda f: DataLoader(ImagesAlone(f.root)),
    "FakeData": lambda f: FakeData(3, (3, 5, 4)),
}


@pytest.mark.parametrize("case", MADE)
def test_what_the_message_says_works(case, root):
    X = MADE[case](ImageFolder(root))
    kind = case.split()[0]
    with pytest.raises(TypeError, match=f"X is of type {kind}, .*: give ") as caught:
        as_images(X)
    images = as_images(eval(str(caught.value).split(": give ")[1], {"X": X}))
    assert pixels(images, 0).shape == (5, 4, 3) if "ensor" in case else (4, 5, 3)


def test_arrays_of_a_data_set():
    X = FakeData(3, (3, 5, 4))
    X.data = np.zeros((3, 5, 4, 3), np.uint8)  # as CIFAR10 and MNIST have
    with pytest.raises(TypeError, match=r"give X\.data$"):
        as_images(X)


def test_hugging_face():
    with pytest.raises(TypeError, match=r'OfHuggingFace, .*give X\["image"\]$'):
        as_images(OfHuggingFace())
    with pytest.raises(TypeError, match=r'give X\.dataset\["image"\]$'):
        as_images(DataLoader(OfHuggingFace()))


def test_data_sets_of_images_alone_are_containers(root):
    own = ImagesAlone(root)
    np.testing.assert_array_equal(pixels(as_images(own), 2)[0, 0], [2, 0, 0])
    np.testing.assert_array_equal(pixels(as_images(Subset(own, [1])), 0)[0, 0], [1, 0, 0])


class Rows(Dataset):
    """A user's own class, whose rows hold more than the image."""

    def __init__(self, row):
        self.row = row

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return self.row


PAIRS = r"of pairs \(image, label\) give the images alone: \[image for image, _ in X\]"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("a.png", 0), rf"tuple that begins with 'a\.png'; {PAIRS}"),
        ((Image.new("L", (3, 2)), 0), PAIRS),
        ((np.zeros((4, 5)), 0), PAIRS),
        ((torch.zeros(3, 4, 5), torch.tensor(1)), PAIRS),
        ((np.zeros((4, 5)), 0, "id"), PAIRS),
        ([Image.new("L", (3, 2)), 0], PAIRS),
        ({"image": "a.png", "label": 0}, r"the images alone: \[row\[KEY\] for row in X\]"),
    ],
)
def test_rows_that_hold_more_than_an_image(row, message):
    with pytest.raises(BadImage, match=message):
        pixels(as_images(Rows(row)), 0)


def test_mappings(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 4, 5)))
    with np.load(tmp_path / "a.npz") as X, pytest.raises(TypeError, match=r"\['images'\].*X\[KEY"):
        as_images(X)
    for X in (Bunch(data=1, images=2), {"train": 1}):
        with pytest.raises(TypeError, match=rf"type {type(X).__name__} with the keys .*X\[KEY\]"):
            as_images(X)


def test_folders_and_patterns(root):
    everything = r"sorted\(glob\.glob\('FOLDER/\*\*/\*\.jpg', recursive=True\)\)"
    for X in (str(root), root, f"{root}/*/*.png"):
        with pytest.raises(TypeError, match=f"single cell .*{everything}"):
            as_images(X)
    with pytest.raises(BadImage, match=r"^it is a folder; .*sorted\(glob\.glob\("):
        pixels(as_images([root]), 0)
    pattern = f"{root}/*/*.png"
    with pytest.raises(BadImage, match=r"^there is no such file; .*sorted\(glob\.glob\(pattern"):
        pixels(as_images([pattern]), 0)
    assert len(as_images(sorted(glob.glob(pattern)))) == 3


LABELS = ["cat", "dog"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: pd.DataFrame({"path": p, "kind": LABELS}), "column 'kind' of X holds 'cat' and"),
        (lambda p: pd.DataFrame({"path": p, "kind": pd.Categorical(LABELS)}), "column 'kind'"),
        (lambda p: pd.DataFrame({"kind": [None, "dog"], "path": p}), "column 'kind'.*'dog'"),
        (lambda p: pd.DataFrame({"path": p, "kind": "St. Bernard"}), "column 'kind'.*'St. Bern"),
        (lambda p: pd.DataFrame({"path": p, "at": pd.Timestamp(0)}), "column 'at'.*1970"),
        (lambda p: np.array([p, LABELS]).T, "column 1 of X holds 'cat'"),
        (lambda p: np.array([p, [0, 1]], dtype=object).T, "column 1 of X holds 0 and the like"),
        (lambda p: list(zip(p, LABELS, strict=True)), "column 1 of X holds 'cat'"),
        (lambda p: list(zip(p, [0, 1], strict=True)), "column 1 of X holds 0"),
        (lambda p: [(Image.new("L", (3, 2)), True)] * 2, "column 1 of X holds True"),
    ],
)
def test_a_column_of_labels_is_named_once(make, message, root):
    paths = [str(root / "a/0.png"), str(root / "a/1.png")]
    with pytest.raises(ValueError, match=f"{message}.*give the image columns alone"):
        as_images(make(paths))


def test_file_names_without_an_ending_are_no_labels(root, monkeypatch):
    monkeypatch.chdir(root)
    (root / "a/0.png").rename(root / "first")
    images = as_images(pd.DataFrame({"front": ["first"], "back": ["b/2.png"]}))
    assert pixels(images, 0).shape == pixels(images, 1).shape


def test_shown_values_are_cut():
    text = "iVBORw0KGgo" + "A" * 600_000
    images = as_images([text])
    with pytest.raises(BadImage, match=r"it is base64 rather than a path; give base64\.b64decode"):
        pixels(images, 0)
    assert len(images.where(0)) < 100
    with pytest.raises(BadImage, match=r"^it is base64; give base64\.b64decode"):
        pixels(as_images([text.encode()]), 0)
    assert as_images(Rows([Image.new("L", (3, 2)), 0])).where(0) == (
        "row 0 (list that begins with array of shape (2, 3, 3), uint8)"
    )
    for value in ("x" * 10_000, {"x" * 10_000: 1}, ("x" * 10_000, 1), "/tmp/" + "x" * 10_000):
        images = as_images(Rows(value))
        with pytest.raises(BadImage) as caught:
            pixels(images, 0)
        assert len(images.where(0)) < 150
        assert len(str(caught.value)) < 300
