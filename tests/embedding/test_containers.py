"""Containers of other classes: each cell is read once, by one thread at a time."""

import io
from collections import Counter, deque

import numpy as np
import pytest
from PIL import Image

from sktransfer import PretrainedFeatureExtractor
from sktransfer.images._cells import own_copy
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


@pytest.mark.parametrize("memory", [None, False])
@pytest.mark.parametrize(
    "kind", [OneBuffer, OneTensor, OneDict, OneList, OneFile, OneStream, Frames]
)
def test_a_container_with_a_state_gives_right_rows(many_pictures, kind, memory):
    expected = PretrainedFeatureExtractor(memory=False).fit_transform(many_pictures)
    X = kind(many_pictures)
    extractor = PretrainedFeatureExtractor(n_jobs=2, batch_size=4, memory=memory).fit(X)
    assert not X.n_read
    np.testing.assert_allclose(extractor.transform(X), expected, rtol=1e-4, atol=1e-4)
    assert set(X.n_read.values()) == {1}
    assert len(X.n_read) == len(many_pictures)


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


@pytest.mark.parametrize("kind", [OneBuffer, OneTensor, OneDict, OneList, OneFile, OneStream])
def test_the_next_cell_does_not_change_the_one_before(pictures, kind):
    X = kind(pictures)
    cell = own_copy(X[0])
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
