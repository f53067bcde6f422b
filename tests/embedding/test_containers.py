"""Containers of other classes: each cell is read once, by one thread at a time."""

import io
import pickle
from collections import Counter, deque

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline

from sktransfer import FineTuningClassifier, PretrainedFeatureExtractor
from sktransfer.images._cells import copy_cell
from sktransfer.images._images import as_images


class OneBuffer:
    """Fills and returns the same array for each row."""

    def __init__(self, pictures):
        self.pictures, self.buffer = pictures, np.empty_like(pictures[0])
        self.n_read = Counter()

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        self.n_read[i] += 1
        self.buffer[:] = self.pictures[i]
        return self.convert(self.buffer)

    def convert(self, buffer):
        return buffer


class OneTensor(OneBuffer):
    """The same with a torch tensor, which shares the array's memory."""

    def convert(self, buffer):
        import torch

        return torch.from_numpy(buffer).permute(2, 0, 1)


class OneDict(OneBuffer):
    """The same with a dict."""

    def __init__(self, pictures):
        super().__init__(pictures)
        self.dict = {}

    def convert(self, buffer):
        stream = io.BytesIO()
        Image.fromarray(buffer).save(stream, "PNG")
        self.dict["bytes"] = stream.getvalue()
        return self.dict


class OneList(OneBuffer):
    """The same with a nested list."""

    def __init__(self, pictures):
        super().__init__(pictures)
        self.rows = []

    def convert(self, buffer):
        self.rows[:] = buffer.tolist()
        return self.rows


class OneObjectArray(OneList):
    """The same with an array of lists."""

    def convert(self, buffer):
        rows = np.empty(len(buffer), dtype=object)
        rows[:] = super().convert(buffer)
        return rows


class OneCanvas(OneBuffer):
    """The same with a PIL image, onto which each image is pasted."""

    def __init__(self, pictures):
        super().__init__(pictures)
        self.canvas = Image.fromarray(pictures[0])

    def convert(self, buffer):
        self.canvas.paste(Image.fromarray(buffer))
        return self.canvas


class OneBufferAsList(list):
    """A list whose items are computed, in the same array."""

    def __init__(self, pictures):
        super().__init__(range(len(pictures)))
        self.inner = OneBuffer(pictures)
        self.n_read = self.inner.n_read

    def __getitem__(self, i):
        return self.inner[i]


class OneBufferAsArray(OneBuffer):
    """As h5py's data sets: with a shape and a type, read row by row."""

    def __init__(self, pictures):
        super().__init__(pictures)
        self.shape, self.ndim, self.dtype = pictures.shape, pictures.ndim, pictures.dtype


class LazyCell:
    """An image that is read, into a shared array, when NumPy asks for it."""

    def __init__(self, source, i):
        self.source, self.i = source, i

    def __array__(self, dtype=None, copy=None):
        return self.source[self.i]


class OneFile(OneBuffer):
    """All images in one open file, of which the cell is the position."""

    def __init__(self, pictures):
        super().__init__(pictures)
        self.file, self.ends = io.BytesIO(), [0]
        for picture in pictures:
            Image.fromarray(picture).save(self.file, "PNG")
            self.ends.append(self.file.tell())

    def __getitem__(self, i):
        self.n_read[i] += 1
        self.file.seek(self.ends[i])
        return self.file.read(self.ends[i + 1] - self.ends[i])


class OneStream(OneFile):
    """The same stream object for each row, with another content."""

    def __init__(self, pictures):
        super().__init__(pictures)
        self.stream = io.BytesIO()

    def __getitem__(self, i):
        data = super().__getitem__(i)
        self.stream.seek(0)
        self.stream.truncate()
        self.stream.write(data)
        return self.stream


class Frames(OneBuffer):
    """The frames of one PIL image."""

    def __init__(self, pictures):
        super().__init__(pictures)
        stream = io.BytesIO()
        first, *rest = map(Image.fromarray, pictures)
        first.save(stream, "TIFF", save_all=True, append_images=rest)
        self.image = Image.open(stream)

    def __getitem__(self, i):
        self.n_read[i] += 1
        self.image.seek(i)
        return self.image


@pytest.fixture
def many_pictures(pictures):
    return np.concatenate([np.roll(pictures, shift, axis=1) for shift in (0, 8, 16, 24)])


KINDS = [OneBuffer, OneTensor, OneDict, OneList, OneFile, OneStream]


@pytest.mark.parametrize("memory", [None, False])
@pytest.mark.parametrize(
    "kind", [*KINDS, OneCanvas, OneObjectArray, OneBufferAsList, OneBufferAsArray, Frames]
)
def test_a_container_with_a_state_gives_right_rows(many_pictures, kind, memory):
    expected = PretrainedFeatureExtractor(memory=False).fit_transform(many_pictures)
    X = kind(many_pictures)
    extractor = PretrainedFeatureExtractor(n_jobs=2, batch_size=4, memory=memory).fit(X)
    assert not X.n_read
    np.testing.assert_allclose(extractor.transform(X), expected, rtol=1e-4, atol=1e-4)
    assert set(X.n_read.values()) == {1}
    assert len(X.n_read) == len(many_pictures)


@pytest.mark.parametrize("kind", [OneBuffer, OneTensor, OneBufferAsList])
def test_fine_tuning_reads_a_container_with_a_state(many_pictures, kind):
    y = many_pictures[:, 0, 0, 0] > np.median(many_pictures[:, 0, 0, 0])
    model = FineTuningClassifier(
        unfreeze=1,
        max_epochs=1,
        n_jobs=2,
        memory=False,
        random_state=0,
        preprocessing={"size": 32, "crop": 32},
    )
    expected = model.fit(many_pictures, y).predict_proba(many_pictures)
    got = model.fit(kind(many_pictures), y).predict_proba(kind(many_pictures))
    np.testing.assert_allclose(got, expected, atol=1e-3)


@pytest.mark.slow  # starts processes
def test_processes_read_a_container_with_a_state(many_pictures):
    y = np.arange(len(many_pictures)) % 2
    pipe = make_pipeline(PretrainedFeatureExtractor(memory=False, n_jobs=2), LogisticRegression())
    settings = {"cv": 2, "method": "decision_function", "n_jobs": 2}
    expected = cross_val_predict(pipe, many_pictures, y, **settings)
    source = OneBuffer(many_pictures)
    X = [LazyCell(source, i) for i in range(len(source))]  # scikit-learn takes folds of lists
    got = cross_val_predict(pipe, X, y, **settings)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)


def test_lazy_cells_in_a_list(many_pictures):
    expected = PretrainedFeatureExtractor(memory=False).fit_transform(many_pictures)
    source = OneBuffer(many_pictures)
    X = [LazyCell(source, i) for i in range(len(source))]
    rows = PretrainedFeatureExtractor(memory=False, n_jobs=2, batch_size=4).fit_transform(X)
    np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-4)


def test_the_frames_of_one_image_in_a_list(pictures):
    """A list is read by several threads, and an image within it by one at a time."""
    frames = Frames(pictures[:3])
    expected = PretrainedFeatureExtractor(memory=False).fit_transform(pictures[1:2])
    frames.image.seek(1)
    rows = PretrainedFeatureExtractor(memory=False, n_jobs=2).fit_transform([frames.image] * 6)
    np.testing.assert_allclose(rows, expected.repeat(6, axis=0), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of scikit-image, about its own plugins
def test_sequences_of_paths(picture_files):
    from skimage.io import ImageCollection

    expected = PretrainedFeatureExtractor(memory=False).fit_transform(picture_files)
    for X in (deque(picture_files), ImageCollection(picture_files)):
        rows = PretrainedFeatureExtractor(memory=False, n_jobs=2).fit_transform(X)
        np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_cell_does_not_change_the_one_before(pictures, kind):
    X = kind(pictures)
    cell = copy_cell(X[0])
    _ = X[1]
    np.testing.assert_array_equal(as_images([cell]).decode(0), pictures[0])


def test_a_container_of_unusable_streams():
    class Texts(OneBuffer):
        def convert(self, buffer):
            return io.StringIO("text")

    with pytest.raises(ValueError, match="row 0: the file is open in text mode"):
        PretrainedFeatureExtractor().fit_transform(Texts(np.zeros((1, 8, 8, 3), np.uint8)))


def test_what_a_container_raises_is_a_bad_image(pictures):
    class Failing(OneBuffer):
        def __getitem__(self, i):
            if i == 5:
                raise OSError("the disk is gone")
            return super().__getitem__(i)

    extractor = PretrainedFeatureExtractor(on_error="nan").fit(Failing(pictures))
    rows = extractor.transform(Failing(pictures))
    assert np.flatnonzero(np.isnan(rows).any(axis=1)).tolist() == [5]
    (bad,) = extractor.bad_images_
    assert (bad.row, bad.where) == (5, "row 5")
    assert bad.reason == "X[5] raises OSError: the disk is gone"
    # Also where a worker of a cluster gets a part of the rows.
    part = pickle.loads(pickle.dumps(as_images(Failing(pictures))[4:7]))
    with pytest.raises(ValueError, match=r"^X\[5\] raises OSError: the disk is gone$"):
        part.read(1)
    assert part.where(1) == "row 5"
    np.testing.assert_array_equal(part.decode(2), pictures[6])


class Raising:
    """A cell that raises whatever NumPy, a path or a dict asks of it."""

    def __init__(self, error):
        self.error = error

    def __array__(self, dtype=None, copy=None):
        raise self.error

    def __repr__(self):
        raise self.error


class RaisingPath(Raising):
    def __fspath__(self):
        raise self.error


@pytest.mark.parametrize("error", [KeyError("gone"), MemoryError(), OSError(5, "gone")])
@pytest.mark.parametrize("kind", [Raising, RaisingPath])
@pytest.mark.parametrize("memory", [None, False])
def test_what_a_cell_raises_is_a_bad_image(pictures, kind, error, memory):
    X = [*pictures[:3], kind(error), *pictures[3:]]
    expected = PretrainedFeatureExtractor(memory=memory).fit_transform(pictures)
    extractor = PretrainedFeatureExtractor(on_error="nan", memory=memory, n_jobs=2)
    rows = extractor.fit_transform(X)
    assert np.isnan(rows[3]).all()
    np.testing.assert_allclose(np.delete(rows, 3, axis=0), expected, rtol=1e-4, atol=1e-4)
    (bad,) = extractor.bad_images_
    assert bad.where == f"row 3 (<{kind.__name__}>)"
    assert bad.reason.startswith(f"reading it raises {type(error).__name__}: ")


def test_fine_tuning_leaves_out_what_raises(pictures):
    X = [*pictures, Raising(KeyError("gone"))]
    y = np.arange(len(X)) % 2
    model = FineTuningClassifier(on_error="skip", unfreeze=0, max_epochs=1, random_state=0)
    with pytest.warns(UserWarning, match="row 12 .*reading it raises KeyError: 'gone'"):
        model.fit(X, y)
