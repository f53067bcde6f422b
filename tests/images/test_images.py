"""The sequence of images: columns, views, places, copies for other processes."""

import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_forms import H, N, W, as_images, contents, objects, paths, pixels
from PIL import Image


@pytest.mark.parametrize("frame", [pd.DataFrame, pl.DataFrame])
def test_several_image_columns(frame, stack, folder):
    front, back = paths(stack, folder)[:2], paths(stack, folder)[2:]
    images = as_images(frame({"front": front, "back": back}))
    assert (len(images), images.n_rows, images.n_columns) == (4, 2, 2)
    assert images.feature_names == ["front", "back"]
    for i, j in enumerate([0, 2, 1, 3]):  # row by row
        np.testing.assert_array_equal(pixels(images, i), stack[j])
    assert [images.row(i) for i in range(4)] == [0, 0, 1, 1]
    np.testing.assert_array_equal(pixels(images[0::2], 1), stack[1])
    np.testing.assert_array_equal(pixels(images[1::2], 1), stack[3])
    view = images[1::2][1:]
    assert (len(view), view.n_rows, view.n_columns, view.feature_names) == (1, 1, 1, None)
    assert view.where(0) == images.where(3) == f"row 1, column 'back' ({back[1]!r})"
    assert view.row(0) == 1


def test_columns_without_names(stack, folder):
    front, back = paths(stack, folder)[:2], [stack[2], stack[3]]
    for X in (
        list(zip(front, back, strict=True)),
        np.column_stack([objects(front), objects(back)]),
    ):
        images = as_images(X)
        assert (images.n_columns, images.feature_names) == (2, None)
        np.testing.assert_array_equal(pixels(images[1::2], 1), stack[3])
        assert images[1::2].where(1) == "row 1, column 1 (array of shape (7, 9, 3), uint8)"


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
        assert [pixels(view, i)[0, 0, 0] for i in range(len(view))] == list(rows)


def test_masks_select_and_single_numbers_do_not(stack):
    images = as_images(stack)
    view = images[np.array([False, True, False, True])]
    assert [view.row(i) for i in range(len(view))] == [1, 3]
    with pytest.raises(TypeError, match=r"indexed by slices and 1-D arrays, got .*read\(i\)"):
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
    assert again.read(0).digest == view.read(0).digest
    tensor = torch.from_numpy(huge)
    for X in (tensor, list(tensor)):  # each of the list is a view of them all
        data = pickle.dumps(as_images(X)[500:501])
        assert len(data) < 20_000
        assert pickle.loads(data).read(0).digest == view.read(0).digest
    frame = pd.DataFrame({"a": paths(stack, folder), "b": contents(stack, folder)})
    again = pickle.loads(pickle.dumps(as_images(frame)[5:]))
    assert again.where(0).startswith("row 2, column 'b'")
    np.testing.assert_array_equal(pixels(again, 0), stack[2])
    again = pickle.loads(pickle.dumps(as_images(frame)))
    assert (again.n_rows, again.n_columns, again.feature_names) == (4, 2, ["a", "b"])
