"""Every form that pictures come in gives the same pictures."""

import base64
import functools
import http.server
import io
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sktransfer.images._images import BadImage, as_images

N, H, W = 4, 7, 9


@pytest.fixture(scope="module")
def stack():
    return np.random.default_rng(0).integers(0, 256, (N, H, W, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(stack, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures with space")
    for i, picture in enumerate(stack):
        Image.fromarray(picture).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def server(folder):
    """The address of a local HTTP server of the folder; `hits` counts its requests."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            hits.append(self.command)

    hits = []
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        httpd.hits = hits
        httpd.url = f"http://127.0.0.1:{httpd.server_address[1]}"
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield httpd
        httpd.shutdown()
        thread.join()


def paths(stack, folder):
    return [str(folder / f"{i}.png") for i in range(N)]


def contents(stack, folder):
    return [(folder / f"{i}.png").read_bytes() for i in range(N)]


def data_urls(stack, folder):
    head = "data:image/png;base64,"
    return [head + base64.b64encode(data).picture() for data in contents(stack, folder)]


def memory_urls(stack, folder):
    fs = fsspec.filesystem("memory")
    for i, data in enumerate(contents(stack, folder)):
        fs.pipe(f"/sktransfer/{i}.png", data)
    return [f"memory://sktransfer/{i}.png" for i in range(N)]


def from_home(stack, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    return [f"~/{i}.png" for i in range(N)]


def lazy_pil(stack, folder):
    return [Image.open(io.BytesIO(data)) for data in contents(stack, folder)]


def cells(stack, folder):
    return [{"bytes": data, "path": "nowhere.png"} for data in contents(stack, folder)]


def tensors(stack):
    return torch.from_numpy(stack).permute(0, 3, 1, 2)


def objects(values):
    out = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        out[i] = value
    return out


def dask_series(values):
    dd = pytest.importorskip("dask.dataframe")
    return dd.from_pandas(pd.Series(values), npartitions=2)


class NotAnArray:
    def __init__(self, data):
        self._data = data

    def __array__(self, dtype=None, copy=None):
        return self._data


class OnDisk(NotAnArray):
    """Like h5py's and zarr's arrays: one picture can be had without the others."""

    def __init__(self, data):
        super().__init__(data)
        self.shape, self.ndim, self.dtype = data.shape, data.ndim, data.dtype

    def __array__(self, dtype=None, copy=None):
        raise AssertionError("read as a whole")

    def __len__(self):
        return len(self._data)

    def __getitem__(self, i):
        return self._data[i]


def nested_table(stack):
    return pa.table({"picture": stack.tolist()})


def memory_map(stack, folder):
    np.save(folder / "stack.npy", stack)
    return np.load(folder / "stack.npy", mmap_mode="r")


def read_only(stack):
    stack = stack.copy()
    stack.flags.writeable = False
    return stack


# Each makes an X of the four pictures from (stack, folder).
FORMS = {
    "str": paths,
    "tuple": lambda s, f: tuple(paths(s, f)),
    "Path": lambda s, f: [Path(path) for path in paths(s, f)],
    "file URL": lambda s, f: ["file://" + path for path in paths(s, f)],
    "quoted file URL": lambda s, f: [Path(path).as_uri() for path in paths(s, f)],
    "memory URL": memory_urls,
    "data URL": data_urls,
    "bytes": contents,
    "bytearray": lambda s, f: [bytearray(data) for data in contents(s, f)],
    "memoryview": lambda s, f: [memoryview(data) for data in contents(s, f)],
    "open files": lambda s, f: [io.BytesIO(data) for data in contents(s, f)],
    "bytes cells": cells,
    "path cells": lambda s, f: [{"bytes": None, "path": path} for path in paths(s, f)],
    "mixed": lambda s, f: [paths(s, f)[0], contents(s, f)[1], s[2], Image.fromarray(s[3])],
    "PIL": lambda s, f: [Image.fromarray(picture) for picture in s],
    "PIL not loaded": lazy_pil,
    "PIL RGBA": lambda s, f: [Image.fromarray(picture).convert("RGBA") for picture in s],
    "uint8": lambda s, f: list(s),
    "uint16": lambda s, f: [picture.astype(np.uint16) * 257 for picture in s],
    "big-endian uint16": lambda s, f: [(picture.astype(">u2") * 257) for picture in s],
    "int64": lambda s, f: list(s.astype(np.int64)),
    "float16": lambda s, f: list((s / 255).astype(np.float16)),
    "float32": lambda s, f: list((s / 255).astype(np.float32)),
    "float64": lambda s, f: list(s / 255),
    "RGBA": lambda s, f: [np.dstack([picture, np.full((H, W), 255, np.uint8)]) for picture in s],
    "tensors": lambda s, f: list(tensors(s)),
    "float tensors": lambda s, f: list(tensors(s) / 255),
    "grad tensors": lambda s, f: list((tensors(s) / 255).requires_grad_()),
    "int32 tensors": lambda s, f: list(tensors(s).to(torch.int32)),
    "strided tensors": lambda s, f: list(tensors(s).repeat_interleave(2, dim=3)[..., ::2]),
    "4-D": lambda s, f: s,
    "4-D float": lambda s, f: (s / 255).astype(np.float32),
    "4-D tensor": lambda s, f: tensors(s),
    "nested lists": lambda s, f: s.tolist(),
    "Fortran order": lambda s, f: np.asfortranarray(s),
    "strided": lambda s, f: s.repeat(2, axis=1).repeat(2, axis=2)[:, ::2, ::2],
    "read-only": lambda s, f: read_only(s),
    "memory map": memory_map,
    "__array__": lambda s, f: NotAnArray(s),
    "read by piece": lambda s, f: OnDisk(s),
    "list of __array__": lambda s, f: [NotAnArray(picture) for picture in s],
    "object array of paths": lambda s, f: np.array(paths(s, f), dtype=object),
    "string array": lambda s, f: np.array(paths(s, f)),
    "StringDType": lambda s, f: np.array(
        paths(s, f), dtype=getattr(np.dtypes, "StringDType", str)()
    ),
    "column array": lambda s, f: np.array(paths(s, f), dtype=object)[:, None],
    "list of lists": lambda s, f: [[path] for path in paths(s, f)],
    "object array of arrays": lambda s, f: objects(s),
    "object 4-D": lambda s, f: s.astype(object),
    "Series": lambda s, f: pd.Series(paths(s, f), index=list("wxyz")),
    "Series of objects": lambda s, f: pd.Series(objects(s)),
    "Series of bytes": lambda s, f: pd.Series(contents(s, f)),
    "Series of Path": lambda s, f: pd.Series([Path(path) for path in paths(s, f)]),
    "nullable Series": lambda s, f: pd.Series(paths(s, f), dtype="string"),
    "Arrow Series": lambda s, f: pd.Series(paths(s, f), dtype=pd.ArrowDtype(pa.string())),
    "Arrow bytes": lambda s, f: pd.Series(contents(s, f), dtype=pd.ArrowDtype(pa.binary())),
    "Arrow struct": lambda s, f: pd.Series(
        cells(s, f), dtype=pd.ArrowDtype(pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    ),
    "categories": lambda s, f: pd.Series(paths(s, f), dtype="category"),
    "DataFrame": lambda s, f: pd.DataFrame({"picture": paths(s, f)}),
    "DataFrame of dicts": lambda s, f: pd.DataFrame({"picture": cells(s, f)}),
    "polars Series": lambda s, f: pl.Series("picture", paths(s, f)),
    "polars bytes": lambda s, f: pl.Series("picture", contents(s, f)),
    "polars struct": lambda s, f: pl.DataFrame({"picture": cells(s, f)}),
    "polars DataFrame": lambda s, f: pl.DataFrame({"picture": paths(s, f)}),
    "nested pandas": lambda s, f: nested_table(s).to_pandas(),
    "nested Arrow in pandas": lambda s, f: nested_table(s).to_pandas(types_mapper=pd.ArrowDtype),
    "nested polars": lambda s, f: pl.DataFrame({"picture": s.tolist()}),
    "nested polars Series": lambda s, f: pl.Series(s.tolist()),
    "polars Array": lambda s, f: pl.Series(s),
    "nested table": lambda s, f: nested_table(s),
    "dask Series": lambda s, f: dask_series(paths(s, f)),
    "Arrow array": lambda s, f: pa.chunked_array([paths(s, f)]),
    "Arrow table": lambda s, f: pa.table({"picture": cells(s, f)}),
}
# The same for flat rows with image_shape=(H, W, 3).
FLAT_FORMS = {
    "array": lambda s: s.reshape(N, -1),
    "float array": lambda s: s.reshape(N, -1) / 255,
    "Fortran order": lambda s: np.asfortranarray(s.reshape(N, -1)),
    "objects": lambda s: s.reshape(N, -1).astype(object),
    "lists": lambda s: (s.reshape(N, -1) / 255).tolist(),
    "list of arrays": lambda s: list(s.reshape(N, -1)),
    "list of tensors": lambda s: list(torch.from_numpy(s.reshape(N, -1))),
    "tensor": lambda s: torch.from_numpy(s.reshape(N, -1)),
    "__array__": lambda s: NotAnArray(s.reshape(N, -1)),
    "DataFrame": lambda s: pd.DataFrame(s.reshape(N, -1)),
    "nullable DataFrame": lambda s: pd.DataFrame(s.reshape(N, -1)).astype("UInt8"),
    "polars": lambda s: pl.DataFrame(s.reshape(N, -1)),
    "sliced": lambda s: np.repeat(s.reshape(N, -1), 2, axis=1)[:, ::2],
}


def assert_shows(images, stack):
    assert len(images) == len(stack)
    assert images.n_columns == 1
    for i, picture in enumerate(stack):
        decoded = images.picture(i)
        np.testing.assert_array_equal(decoded, picture)
        assert decoded.dtype == np.uint8
        assert decoded.flags.c_contiguous
        assert not decoded.flags.writeable
    digests = [images.digest(i) for i in range(len(stack))]
    assert [len(digest) for digest in digests] == [16] * len(stack)
    assert len(set(digests)) == len(stack)
    assert images.take_warnings() is None  # there is nothing to warn of


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_pictures(form, stack, folder):
    assert_shows(as_images(FORMS[form](stack, folder)), stack)


@pytest.mark.parametrize("shape", [(H, W, 3), (-1, W, 3), (H, W, -1)])
@pytest.mark.parametrize("form", FLAT_FORMS)
def test_every_form_of_flat_rows_gives_the_same_pictures(form, shape, stack):
    assert_shows(as_images(FLAT_FORMS[form](stack), shape), stack)


def test_home_is_expanded(stack, folder, monkeypatch):
    assert_shows(as_images(from_home(stack, folder, monkeypatch)), stack)


def test_relative_paths(stack, folder, monkeypatch):
    monkeypatch.chdir(folder)
    images = as_images([f"{i}.png" for i in range(N)])
    assert_shows(images, stack)
    assert images.stat(1)[0] == str(folder / "1.png")


def test_http_is_read_once_for_digest_and_decode(stack, folder, server):
    images = as_images([f"{server.url}/{i}.png" for i in range(N)])
    assert images.stat(0) is None
    server.hits.clear()
    assert_shows_in_pairs(images, stack)
    assert server.hits.count("GET") == N
    with pytest.raises(BadImage, match="there is nothing at this URL"):
        as_images([f"{server.url}/none.png"]).picture(0)


def assert_shows_in_pairs(images, stack):
    digests = [images.digest(i) for i in range(len(images))]
    assert len(set(digests)) == len(stack)
    for i, picture in enumerate(stack):
        np.testing.assert_array_equal(images.picture(i), picture)


@pytest.mark.parametrize(
    "grey",
    [
        lambda g: list(g),
        lambda g: list(g[..., None]),
        lambda g: g,
        lambda g: g / 255,
        lambda g: g[..., None],
        lambda g: np.stack([g, np.full_like(g, 255)], axis=-1),
        lambda g: torch.from_numpy(g)[:, None],
        lambda g: list(torch.from_numpy(g)),
        lambda g: [Image.fromarray(picture) for picture in g],
        lambda g: [Image.fromarray(picture).convert("LA") for picture in g],
        lambda g: g.astype(np.uint16) * 257,
        lambda g: g.tolist(),
    ],
)
def test_grey_is_three_equal_channels(grey, stack):
    g = np.concatenate([stack[..., 0], stack[..., 1]])  # five or more: no channel count
    assert_shows(as_images(grey(g)), np.repeat(g[..., None], 3, axis=3))


def test_bool_is_black_and_white():
    mask = np.eye(6, dtype=bool)
    expected = np.repeat(mask[..., None] * np.uint8(255), 3, axis=2)
    for form in [mask, mask[..., None], torch.from_numpy(mask), Image.fromarray(mask)]:
        np.testing.assert_array_equal(as_images([form]).picture(0), expected)


def test_pictures_of_different_sizes(stack):
    pictures = [stack[0], stack[1][:5], stack[2][:, :2], stack[3][:3, :3]]
    for X in (
        pictures,
        objects(pictures),
        pd.Series(pictures),
        pl.Series(pictures, dtype=pl.Object),
    ):
        images = as_images(X)
        for i, picture in enumerate(pictures):
            np.testing.assert_array_equal(images.picture(i), picture)


def test_a_view_shares_the_users_array(stack):
    assert np.shares_memory(as_images(stack).picture(2), stack)
    assert stack.flags.writeable


def test_no_pixel_is_read_and_nothing_copied():
    images = as_images(["nowhere/a.jpg", "s3://bucket/b.jpg", b"no image", None])
    assert len(images) == 4
    huge = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (10**6, 999, 999, 3), (0,) * 4)
    assert len(as_images(huge)) == 10**6
    assert len(as_images(huge.reshape(10**6, -1)[:, :10], (2, 5))) == 10**6


def test_pil_not_loaded_stays_so(stack, folder):
    (image,) = lazy_pil(stack, folder)[:1]
    images = as_images([image, image])
    assert images.digest(0) == images.digest(1) == as_images(contents(stack, folder)).digest(0)
    images.picture(0)
    assert image.tile  # still to be read
    np.testing.assert_array_equal(np.asarray(image), stack[0])


def test_an_open_file_stays_where_it_stood(stack, folder):
    stream = io.BytesIO(contents(stack, folder)[0])
    stream.seek(5)
    as_images([stream]).picture(0)
    assert stream.tell() == 5


# ---------------------------------------------------------------------------
# Digests
# ---------------------------------------------------------------------------
FILE_FORMS = ["str", "Path", "memory URL", "data URL", "bytes", "bytes cells", "Arrow bytes"]
ARRAY_FORMS = ["uint8", "4-D", "tensors", "4-D tensor", "Fortran order", "memory map"]


@pytest.mark.parametrize("forms", [FILE_FORMS, ARRAY_FORMS])
def test_digest_is_of_the_content(forms, stack, folder):
    digests = [
        [images.digest(i) for i in range(N)]
        for images in (as_images(FORMS[form](stack, folder)) for form in forms)
    ]
    assert all(digest == digests[0] for digest in digests)


def test_digest_tells_shapes_and_types_apart():
    zeros = [
        np.zeros((4, 6), np.uint8),
        np.zeros((6, 4), np.uint8),
        np.zeros((4, 2, 3), np.uint8),
        np.zeros((4, 6), np.int8),
        np.zeros((4, 6), bool),
        np.zeros((2, 6), np.uint16),
        Image.new("L", (6, 4)),
        Image.new("L", (4, 6)),
        Image.new("P", (6, 4)),
    ]
    images = as_images(zeros)
    assert len({images.digest(i) for i in range(len(images))}) == len(zeros)


def test_digest_of_pil_sees_palette_and_orientation():
    a, b, c = (Image.new("P", (3, 2)) for _ in range(3))
    a.putpalette([1, 2, 3])
    b.putpalette([3, 2, 1])
    c.putpalette([1, 2, 3])
    c.getexif()[0x0112] = 6
    images = as_images([a, b, c, a.copy()])
    digests = [images.digest(i) for i in range(4)]
    assert len(set(digests)) == 3
    assert digests[0] == digests[3]
    assert images.picture(2).shape == (3, 2, 3)


def test_digest_of_pil_sees_what_32_bit_numbers_mean():
    grey = (np.arange(64) * 1000).astype(">u2").reshape(8, 8)
    of_file = Image.open(io.BytesIO(b"P5 8 8 65535\n" + grey.tobytes()))
    of_file.load()
    assert of_file.mode == "I"
    images = as_images([of_file, of_file.copy()])  # a copy no longer says that it has 16 bits
    assert np.abs(images.picture(0).astype(int) - images.picture(1)).max() > 0
    assert images.digest(0) != images.digest(1)


@pytest.mark.parametrize("form", [Image.open, functools.partial(open, mode="rb")])
def test_what_is_decoded_is_what_was_digested(form, stack, folder, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes((folder / "0.png").read_bytes())
    with form(path) as cell:
        images = as_images([cell])
        before = images.digest(0)
        with open(path, "r+b") as file:  # in place: the open file sees it
            file.write((folder / "1.png").read_bytes())
            file.truncate()
        np.testing.assert_array_equal(images.picture(0), stack[0])
        assert images.digest(0) != before


def test_stat_is_of_local_files_only(stack, folder):
    path = folder / "0.png"
    status = path.stat()
    X = [str(path), path, path.as_uri(), {"bytes": None, "path": str(path)}]
    X.append({"bytes": np.nan, "path": str(path)})
    images = as_images(X)
    stats = [images.stat(i) for i in range(len(X))]
    assert stats == stats[:1] * len(X)
    assert stats[0][:3] == (str(path), status.st_size, status.st_mtime_ns)
    X = [stack[0], path.read_bytes(), "none.png", None, np.nan, "", "a\0b", "memory://a", "data:,"]
    X.append({"bytes": b"12", "path": str(path)})
    images = as_images(X)
    assert [images.stat(i) for i in range(len(X))] == [None] * len(X)


def test_stat_sees_a_change_that_left_size_and_time(tmp_path):
    path = tmp_path / "picture"
    path.write_bytes(b"old")
    images, status = as_images([path]), path.stat()
    before = images.stat(0)
    time.sleep(0.02)  # for the file system's clock
    path.write_bytes(b"new")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert images.stat(0)[:3] == before[:3]
    assert images.stat(0) != before


# ---------------------------------------------------------------------------
# Columns, views, labels
# ---------------------------------------------------------------------------
@pytest.mark.parametrize("frame", [pd.DataFrame, pl.DataFrame])
def test_several_image_columns(frame, stack, folder):
    front, back = paths(stack, folder)[:2], paths(stack, folder)[2:]
    images = as_images(frame({"front": front, "back": back}))
    assert (len(images), images.n_rows, images.n_columns) == (4, 2, 2)
    assert images.feature_names == ["front", "back"]
    for i, j in enumerate([0, 2, 1, 3]):  # row by row
        np.testing.assert_array_equal(images.picture(i), stack[j])
    assert [images.row(i) for i in range(4)] == [0, 0, 1, 1]
    np.testing.assert_array_equal(images.column(0).picture(1), stack[1])
    np.testing.assert_array_equal(images.column(1).picture(1), stack[3])
    view = images.column(1)[1:]
    assert (len(view), view.n_rows, view.n_columns, view.feature_names) == (1, 1, 1, None)
    assert view.where(0) == images.where(3) == f"row 1, column 'back' ({back[1]!r})"
    assert view.row(0) == 1
    with pytest.raises(IndexError, match="there is no image column 2; there are 2"):
        images.column(2)


def test_columns_without_names(stack, folder):
    front, back = paths(stack, folder)[:2], [stack[2], stack[3]]
    for X in (
        list(zip(front, back, strict=True)),
        np.column_stack([objects(front), objects(back)]),
    ):
        images = as_images(X)
        assert (images.n_columns, images.feature_names) == (2, None)
        np.testing.assert_array_equal(images.column(1).picture(1), stack[3])
        assert images.column(1).where(1) == "row 1, column 1 (array of shape (7, 9, 3), uint8)"


def test_names(stack, folder):
    assert as_images(pd.Series(paths(stack, folder), name="a")).feature_names == ["a"]
    assert as_images(pl.Series(paths(stack, folder))).feature_names is None
    assert as_images(pd.DataFrame({0: paths(stack, folder)})).feature_names is None
    assert as_images(pd.DataFrame(stack.reshape(N, -1)), (H, W, 3)).feature_names is None


@pytest.mark.parametrize(
    ("cell", "label"),
    [
        ("a/b.jpg", "row 1 ('a/b.jpg')"),
        (Path("a") / "b.jpg", f"row 1 ({str(Path('a') / 'b.jpg')!r})"),
        (np.str_("b.jpg"), "row 1 ('b.jpg')"),
        (b"1234", "row 1 (4 bytes)"),
        ({"bytes": b"1234", "path": None}, "row 1 (4 bytes)"),
        ({"bytes": b"1234", "path": "b.jpg"}, "row 1 ('b.jpg')"),
        (None, "row 1 (None)"),
        (np.nan, "row 1 (nan)"),
        (Image.new("L", (3, 2)), "row 1 (PIL image, mode L, 3 × 2)"),
        (np.zeros((2, 3)), "row 1 (array of shape (2, 3), float64)"),
        (torch.zeros(3, 2, 2), "row 1 (tensor of shape (3, 2, 2), torch.float32)"),
    ],
)
def test_labels(cell, label):
    assert as_images(["other.jpg", cell]).where(1) == label


def test_a_long_label_is_cut():
    label = as_images(["data:image/png;base64," + 10_000 * "A"]).where(0)
    assert len(label) < 200
    assert "…" in label


@given(st.data())
def test_views_keep_their_rows(data):
    n = data.draw(st.integers(1, 8))
    rows = np.arange(n)
    images = as_images(np.arange(n, dtype=np.uint8)[:, None, None].repeat(5, 1).repeat(6, 2))
    for _ in range(data.draw(st.integers(1, 3))):
        if len(rows) and data.draw(st.booleans()):
            index = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1))), dtype=int)
        else:
            index = data.draw(st.slices(len(rows)))
        rows, images = rows[index], images[index]
    again = pickle.loads(pickle.dumps(images))
    for view in (images, again):
        assert [view.row(i) for i in range(len(view))] == list(rows)
        assert [view.picture(i)[0, 0, 0] for i in range(len(view))] == list(rows)


def test_masks_select_and_single_numbers_do_not(stack):
    images = as_images(stack)
    view = images[np.array([False, True, False, True])]
    assert [view.row(i) for i in range(len(view))] == [1, 3]
    with pytest.raises(TypeError, match=r"indexed by slices and 1-D arrays, got .*decode\(i\)"):
        images[1]


def test_a_pickled_view_takes_its_own_pictures_along(stack, folder):
    huge = np.zeros((1000, 100, 100), np.uint8)
    huge[500] = 7
    view = as_images(huge)[500:501]
    data = pickle.dumps(view)
    assert len(data) < 20_000
    again = pickle.loads(data)
    assert again.row(0) == 500
    assert again.where(0) == view.where(0)
    assert again.digest(0) == view.digest(0)
    tensor = torch.from_numpy(huge)
    for X in (tensor, list(tensor)):  # each of the list is a view of them all
        data = pickle.dumps(as_images(X)[500:501])
        assert len(data) < 20_000
        assert pickle.loads(data).digest(0) == view.digest(0)
    frame = pd.DataFrame({"a": paths(stack, folder), "b": contents(stack, folder)})
    again = pickle.loads(pickle.dumps(as_images(frame)[5:]))
    assert again.where(0).startswith("row 2, column 'b'")
    np.testing.assert_array_equal(again.picture(0), stack[2])
    again = pickle.loads(pickle.dumps(as_images(frame)))
    assert (again.n_rows, again.n_columns, again.feature_names) == (4, 2, ["a", "b"])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tensors_on_a_device(stack):
    X = tensors(stack).to("cuda")
    assert_shows(as_images(X), stack)
    assert_shows(as_images(list(X / 255)), stack)
    assert as_images(X).digest(0) == as_images(stack).digest(0)


# ---------------------------------------------------------------------------
# Threads
# ---------------------------------------------------------------------------
def test_threads(stack, folder):
    opened = Image.open(folder / "0.png")
    palette = Image.fromarray(stack[1]).quantize(16)
    X = [opened, palette, paths(stack, folder)[2], stack[3] * 1.0] * 50
    serial = [as_images([cell]).picture(0) for cell in X[:4]]
    images = as_images(X)
    with ThreadPoolExecutor(8) as pool:
        decoded = list(pool.map(images.decode, range(len(X))))
        digests = list(pool.map(images.digest, range(len(X))))
    opened.close()
    for i, picture in enumerate(decoded):
        np.testing.assert_array_equal(picture, serial[i % 4])
    assert len(set(digests)) == 4
    assert "50 pictures of floats" in images.take_warnings()
