"""Types and masks: every container keeps the type of its numbers, and none drops a mask."""

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from image_forms import BadImage, as_images, objects, pixels

from sktransfer import PretrainedFeatureExtractor

N, H, W = 6, 7, 9


@pytest.fixture(scope="module")
def numbers():
    """Images of 16 bits, the last of which is dark."""
    numbers = np.random.default_rng(0).integers(0, 65536, (N, H, W), dtype=np.uint16)
    numbers[-1] >>= 6
    return numbers


def arrow(numbers, make=pa.list_):
    value_type = pa.from_numpy_dtype(numbers.dtype)
    return pa.array(numbers.tolist(), type=make(make(value_type)))


def table(numbers, **options):
    return pa.table({"image": arrow(numbers, **options)})


def fixed_size(numbers):
    return pa.array(numbers.tolist(), type=pa.list_(pa.list_(pa.uint16(), W), H))


def scalars(numbers):
    """An array of objects that are NumPy's numbers."""
    return objects(list(numbers.ravel())).reshape(numbers.shape)


FORMS = {
    "polars Array": lambda s: pl.Series(s),
    "polars List": lambda s: pl.Series(s.tolist(), dtype=pl.List(pl.List(pl.UInt16))),
    "polars List of Array": lambda s: pl.Series(s.tolist(), dtype=pl.List(pl.Array(pl.UInt16, W))),
    "polars DataFrame": lambda s: pl.DataFrame({"image": pl.Series(s)}),
    "pyarrow array": arrow,
    "pyarrow large list": lambda s: arrow(s, pa.large_list),
    "pyarrow fixed-size list": fixed_size,
    "pyarrow tensor": pa.FixedShapeTensorArray.from_numpy_ndarray,
    "pyarrow chunked": lambda s: pa.chunked_array([arrow(s[:2]), arrow(s[2:])]),
    "pyarrow table": table,
    "pyarrow table of tensors": lambda s: pa.table(
        {"image": pa.FixedShapeTensorArray.from_numpy_ndarray(s)}
    ),
    "pandas from pyarrow": lambda s: table(s).to_pandas(),
    "Series from pyarrow": lambda s: table(s).to_pandas()["image"],
    "pandas of pyarrow types": lambda s: table(s).to_pandas(types_mapper=pd.ArrowDtype),
    "array of arrays": lambda s: objects(list(s)),
    "array of NumPy's numbers": scalars,
    "list of arrays of NumPy's numbers": lambda s: list(scalars(s)),
}
# Of these NumPy itself has made integers of no type.
UNTYPED = {
    "array of objects": lambda s: s.astype(object),
    "np.array(list, object)": lambda s: np.array(list(s), dtype=object),
    "list of arrays of objects": lambda s: [image.astype(object) for image in s],
}


@pytest.mark.parametrize("form", [*FORMS, *UNTYPED])
def test_uint16_stays_uint16(form, numbers):
    images = as_images((FORMS | UNTYPED)[form](numbers))
    expected = as_images(numbers)
    assert len(images) == N
    for i in range(N):
        np.testing.assert_array_equal(pixels(images, i), pixels(expected, i))
    assert images.take_warnings() == expected.take_warnings()


FLAT_FORMS = {
    "polars Array": lambda s: pl.Series(s),
    "polars List": lambda s: pl.DataFrame(
        {"image": pl.Series(s.tolist(), dtype=pl.List(pl.UInt16))}
    ),
    "polars columns": lambda s: pl.DataFrame(s),
    "pandas nullable": lambda s: pd.DataFrame(s).astype("UInt16"),
    "pandas of pyarrow types": lambda s: pd.DataFrame(s).astype(pd.ArrowDtype(pa.uint16())),
    "pyarrow list": lambda s: pa.table({"image": pa.array(s.tolist(), type=pa.list_(pa.uint16()))}),
    "pyarrow columns": lambda s: pa.table({str(j): s[:, j] for j in range(H * W)}),
    "array of objects": lambda s: s.astype(object),
    "Series": lambda s: pd.Series(list(s)),
}


@pytest.mark.parametrize("form", FLAT_FORMS)
def test_uint16_stays_uint16_in_flat_rows(form, numbers):
    images = as_images(FLAT_FORMS[form](numbers.reshape(N, -1)), (H, W))
    expected = as_images(numbers)
    for i in range(N):
        np.testing.assert_array_equal(pixels(images, i), pixels(expected, i))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
@pytest.mark.parametrize("form", ["pyarrow array", "array of arrays", "array of NumPy's numbers"])
def test_other_types_stay(form, dtype, numbers):
    numbers = (numbers / 65536 * (100 if dtype != np.float32 else 1)).astype(dtype)
    images, expected = as_images(FORMS[form](numbers)), as_images(numbers)
    assert [images.read(i).digest for i in range(N)] == [expected.read(i).digest for i in range(N)]


def test_small_integers_without_a_type_are_eight_bits(numbers):
    dark = numbers >> 8
    images, expected = as_images(dark.astype(object)), as_images(dark.astype(np.uint8))
    assert [images.read(i).digest for i in range(N)] == [expected.read(i).digest for i in range(N)]


def test_columns_of_strings_are_paths():
    for X in (
        pa.table({"a": ["x.png", None]}),
        pa.table({"a": pa.array(["x.png"] * 2).dictionary_encode()}),
    ):
        assert as_images(X).where(0) == "row 0 ('x.png')"
    rows = pa.table({"a": [["x.png", "y.png"]]})
    with pytest.raises(BadImage, match="flat array"):
        as_images(rows).read(0)


# -- masks -----------------------------------------------------------------------------------
def masked(numbers):
    return np.ma.masked_greater(numbers, 60_000)


class Dataset:
    """Gives the same buffer for each row."""

    def __init__(self, images):
        self._images = images

    def __len__(self):
        return len(self._images)

    def __getitem__(self, i):
        return self._images[i]


@pytest.mark.parametrize(
    "form",
    [list, objects, lambda s: pd.Series(list(s)), lambda s: pd.DataFrame({"a": list(s)}), Dataset],
)
def test_a_masked_image_is_a_bad_row(form, numbers):
    X = form(masked(numbers))
    with pytest.raises(BadImage, match=r"it is a masked array; .* give \.filled\(value\)"):
        as_images(X).read(0)
    extractor = PretrainedFeatureExtractor(on_error="nan", memory=False, value_range=(0, 65535))
    assert np.isnan(extractor.fit_transform(X)).all(axis=1).sum() == N - 1  # the last has no mask
    assert len(extractor.bad_images_) == N - 1


def test_a_masked_stack_is_an_error(numbers):
    for X, shape in ((masked(numbers), None), (masked(numbers).reshape(N, -1), (H, W))):
        with pytest.raises(ValueError, match=r"X is a masked array; .* \.filled\(value\)"):
            PretrainedFeatureExtractor(image_shape=shape).fit(X)
        flat = as_images(list(X), shape)
        with pytest.raises(BadImage, match=r"\.filled\(value\)"):
            flat.read(0)
    nothing_masked = as_images(np.ma.array(numbers, mask=False))
    assert nothing_masked.read(0).digest == as_images(numbers).read(0).digest
