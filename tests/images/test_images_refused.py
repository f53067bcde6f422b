"""What cannot be a collection of pictures, or could be two, is refused at the border."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from image_forms import as_images, pixels
from PIL import Image
from scipy import sparse

z = np.zeros
REFUSED = {
    "str": ("a.jpg", None, TypeError, r"a single cell \('a.jpg'\).* wrap it in a list, \[X\]"),
    "Path": (Path("a.jpg"), None, TypeError, r"a single cell \('a.jpg'\).*wrap it in a list"),
    "0-D": (np.array("a.jpg"), None, TypeError, r"a single cell \('a.jpg'\)"),
    "bytes": (b"123", None, TypeError, "a single cell .3 bytes.*wrap it in a list"),
    "PIL": (
        Image.new("L", (3, 2)),
        None,
        TypeError,
        "single cell .PIL image, mode L, 3 × 2",
    ),
    "dict": ({"bytes": b""}, None, TypeError, r"a single cell .0 bytes.*wrap it"),
    "file": (io.BytesIO(), None, TypeError, "a single cell .*BytesIO.*wrap it"),
    "None": (None, None, TypeError, "X is None; X holds one image per row"),
    "number": (3, None, TypeError, "X is 3; X holds one image per row"),
    "generator": (iter(["a"]), None, TypeError, r"no rows to index.*list\(X\)"),
    "set": ({"a"}, None, TypeError, r"type set, which has no rows.*list\(X\)"),
    "lazy": (pl.LazyFrame({"a": ["b"]}), None, TypeError, r"X\.collect\(\)"),
    "sparse": (sparse.csr_array(np.eye(4)), None, TypeError, r"sparse .*X\.toarray\(\)"),
    "complex": (z((5, 9, 9), complex), None, ValueError, "Complex data not supported"),
    "complex tensor": (torch.zeros(5, 9, 9) * 1j, None, ValueError, "Complex data not supported"),
    "dates": (z(3, "M8[s]"), None, TypeError, "dtype datetime64.*holds no images"),
    "no rows": ([], None, ValueError, r"0 sample\(s\) \(shape=\(0,\)\).*minimum of 1"),
    "no rows 2-D": (z((0, 4)), (2, 2), ValueError, r"0 sample\(s\) \(shape=\(0, 4\)\)"),
    "no columns": (z((4, 0)), (2, 2), ValueError, r"0 feature\(s\) \(shape=\(4, 0\)\)"),
    "no frame": (pd.DataFrame(), None, ValueError, r"0 sample\(s\)"),
    "1-D": (z(4), None, ValueError, "Expected 2D array.*Reshape your data"),
    "1-D list": ([1.0, 2.0], None, ValueError, "Expected 2D array.*Reshape your data"),
    "1-D Series": (pd.Series([1, 2]), None, ValueError, "Expected 2D array"),
    "2-D": (z((9, 9)), None, ValueError, r"image_shape=\(H, W\).*one image.*\[X\]"),
    "2-D frame": (pd.DataFrame(z((2, 4))), None, ValueError, r"give image_shape=\(H, W\)"),
    "1-D cells": ([z(4), z(4)], None, ValueError, r"list of arrays.*image_shape=\(H, W\)"),
    "5-D": (z((1, 2, 3, 4, 5)), None, ValueError, "3 or 4 dimensions"),
    "H, W, C": (z((9, 8, 3)), None, ValueError, r"one image of 9 × 8 with 3 .*9 grey .* 8 × 3"),
    "C, H, W": (torch.zeros(3, 9, 8), None, ValueError, "one image of 9 × 8 .*3 grey .* 9 × 8"),
    "N, C, H, W": (z((5, 3, 9, 8)), None, ValueError, r"channels last.*X\.transpose\(0, 2, 3, 1\)"),
    "N, ?": (z((5, 7, 9, 8)), None, ValueError, r"1, 2, 3 or 4 channels, not 8\.$"),
    "N, H, W, C": (torch.zeros(5, 9, 8, 3), None, ValueError, r"X\.permute\(0, 3, 1, 2\)"),
    "both": (z((5, 3, 8, 3)), None, ValueError, r"5 images of 3 × 8 .*or of 8 × 3 .*list\(X\)"),
    "both, tensor": (torch.zeros(5, 3, 8, 3), None, ValueError, "of 8 × 3 .* or of 3 × 8 "),
    "image_shape 1": (z((2, 4)), 4, TypeError, "image_shape must be .*got 4"),
    "image_shape 2": (z((2, 4)), (4,), ValueError, r"image_shape must be .*got \(4,\)"),
    "image_shape 3": (z((2, 4)), (0, 4), ValueError, r"positive integers.*got \(0, 4\)"),
    "image_shape 4": (z((2, 4)), (-1, -1), ValueError, r"one of which may be -1; got \(-1, -1\)"),
    "image_shape 5": (z((2, 4)), (2, 2.0), ValueError, "image_shape must be"),
    "image_shape 6": (z((2, 5)), (1, 1, 5), ValueError, "C in 1…4"),
    "misfit": (z((2, 7)), (2, 4), ValueError, r"7 features.*image_shape=\(2, 4\) \(8 values\)"),
    "misfit -1": (z((2, 7)), (2, -1), ValueError, r"7 features.*image_shape=\(2, -1\)"),
    "misfit channels": (z((2, 30)), (2, 3, -1), ValueError, "30 features"),
    "mixed frame": (
        pd.DataFrame({"path": ["a"], "price": [1.0]}),
        None,
        ValueError,
        r"columns \['price'\] of X hold numbers.*ColumnTransformer",
    ),
    "ragged": (
        [[1, 2], [3]],
        (1, 2),
        ValueError,
        "nested list that does not form an array.*list of arrays",
    ),
    "ragged rows": ([["a"], ["b", "c"]], None, ValueError, "lists of different lengths"),
    "objects": (
        np.array([[{}, 1.0]], dtype=object),
        (1, 2),
        TypeError,
        "must be .*string.* number",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    X, image_shape, error, message = REFUSED[case]
    with pytest.raises(error, match="(?s)" + message):
        as_images(X, image_shape)


def test_the_ways_out_of_ambiguity_that_the_messages_name():
    X = np.arange(9 * 8 * 3, dtype=np.uint8).reshape(9, 8, 3)
    assert pixels(as_images([X]), 0).shape == (9, 8, 3)
    assert pixels(as_images(X[..., None]), 8).shape == (8, 3, 3)
    X = torch.zeros(3, 9, 8)
    assert pixels(as_images([X]), 0).shape == (9, 8, 3)
    assert pixels(as_images(X[:, None]), 2).shape == (9, 8, 3)
    X = np.zeros((5, 3, 8, 3))
    assert pixels(as_images(list(X)), 4).shape == (3, 8, 3)
    assert pixels(as_images(list(X.transpose(0, 2, 3, 1))), 4).shape == (8, 3, 3)
    X = torch.zeros(5, 3, 8, 3)
    assert pixels(as_images(list(X)), 4).shape == (8, 3, 3)
    assert pixels(as_images(list(X.permute(0, 3, 1, 2))), 4).shape == (3, 8, 3)
