"""The forms that X comes in, with the same four images each, and how tests read them."""

import base64
import io
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from PIL import Image

from sktransfer.images._images import BadImage, as_images

__all__ = ["FLAT_FORMS", "FORMS", "BadImage", "H", "N", "W", "as_images", "pixels"]

N, H, W = 4, 7, 9


def pixels(images, i, min_size=None):
    """The pixels of image `i`, as an array."""
    return np.asarray(images.decode(i, min_size))


def paths(stack, folder):
    return [str(folder / f"{i}.png") for i in range(N)]


def contents(stack, folder):
    return [(folder / f"{i}.png").read_bytes() for i in range(N)]


def data_urls(stack, folder):
    head = "data:image/png;base64,"
    return [head + base64.b64encode(data).decode() for data in contents(stack, folder)]


def memory_urls(stack, folder):
    fs = fsspec.filesystem("memory")
    for i, data in enumerate(contents(stack, folder)):
        fs.pipe(f"/sktransfer/{i}.png", data)
    return [f"memory://sktransfer/{i}.png" for i in range(N)]


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
    "StringDType": lambda s, f: np.array(  # of NumPy 2
        paths(s, f), dtype=np.dtypes.StringDType() if hasattr(np.dtypes, "StringDType") else str
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
