"""The example that embeds a parquet file reads and writes it piece by piece."""

import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sktransfer import PretrainedFeatureExtractor

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

EXAMPLE = Path(__file__).parents[2] / "examples" / "parquet_to_embeddings.py"


@pytest.fixture(scope="module")
def example():
    if not EXAMPLE.exists():
        pytest.skip("the examples are not here")
    spec = importlib.util.spec_from_file_location("parquet_to_embeddings", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def encoded(picture):
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "png")
    return stream.getvalue()


def test_rows_in_order_and_the_other_columns(example, pictures, tmp_path):
    cells = [{"bytes": encoded(p), "path": f"{i}.png"} for i, p in enumerate(pictures)]
    labels = list("abcabcabcabc")
    source, target = tmp_path / "images.parquet", tmp_path / "embeddings.parquet"
    pq.write_table(pa.table({"image": cells, "label": labels}), source, row_group_size=5)
    extractor = PretrainedFeatureExtractor()
    assert example.embed_parquet(source, target, extractor, batch_size=4) == 12
    table = pq.read_table(target)
    assert table.column_names == ["label", "embedding"]
    assert table["label"].to_pylist() == labels
    rows = np.array(table["embedding"].to_pylist(), dtype=np.float32)
    np.testing.assert_array_equal(rows, extractor.transform(pictures_of(cells)))


def pictures_of(cells):
    return [cell["bytes"] for cell in cells]


class Watcher:
    """Stands in for an extractor and watches Arrow's memory."""

    def __init__(self):
        self.allocated, self.n_rows = [], []

    def fit(self, X):
        return self

    def transform(self, X):
        self.allocated.append(pa.total_allocated_bytes())
        self.n_rows.append(len(X))
        return np.array([[len(cell["bytes"]), cell["bytes"][0]] for cell in X], dtype=np.float32)


@pytest.mark.parametrize("n_groups", [10, 40])
def test_memory_does_not_grow_with_the_file(example, n_groups, tmp_path):
    group = 1_000_000  # bytes, of ten cells that do not compress
    rng = np.random.default_rng(0)
    source = tmp_path / "images.parquet"
    schema = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()})})
    with pq.ParquetWriter(source, schema) as writer:
        for _ in range(n_groups):
            cells = [{"bytes": rng.bytes(group // 10), "path": "x"} for _ in range(10)]
            writer.write_table(pa.table({"image": cells}, schema=schema))
    before = pa.total_allocated_bytes()
    watcher = Watcher()
    n = example.embed_parquet(source, tmp_path / "out.parquet", watcher, batch_size=10)
    assert n == 10 * n_groups
    assert max(watcher.n_rows) == 10
    assert max(watcher.allocated) - before < 5 * group
