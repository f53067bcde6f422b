"""From a parquet file of images to one of embeddings, in constant memory
======================================================================

::

    python examples/parquet_to_embeddings.py images.parquet embeddings.parquet

The images are in a column of ``{"bytes": …, "path": …}`` cells, as in published image sets, or of
paths or encoded bytes. One batch of rows is in memory at a time, and the other columns are copied.
With ``--memory FOLDER`` an interrupted run continues where it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sktransfer import PretrainedFeatureExtractor


def embed_parquet(
    source: str | Path,
    target: str | Path,
    extractor: PretrainedFeatureExtractor,
    column: str = "image",
    batch_size: int = 256,
) -> int:
    """Write the columns of `source` with `column` replaced by ``"embedding"``.

    Parameters
    ----------
    source, target : str or Path
    extractor : PretrainedFeatureExtractor
        It need not be fitted: `fit` reads no image.
    column : str, default="image"
    batch_size : int, default=256
        Rows in memory at once.

    Returns
    -------
    n_rows : int
        Rows written.
    """
    n_rows = 0
    writer = None
    # The buffer would read many row groups ahead.
    with pq.ParquetFile(source, pre_buffer=False) as file:
        try:
            for batch in file.iter_batches(batch_size=batch_size):
                table = pa.Table.from_batches([batch])
                images = table[column].to_pylist()
                if writer is None:
                    extractor.fit(images)
                rows = extractor.transform(images)
                values = pa.array(rows.ravel(), type=pa.float32())
                embedding = pa.FixedSizeListArray.from_arrays(values, rows.shape[1])
                table = table.drop_columns([column]).append_column("embedding", embedding)
                if writer is None:
                    writer = pq.ParquetWriter(target, table.schema)
                writer.write_table(table)
                n_rows += len(rows)
        finally:
            if writer is not None:
                writer.close()
    return n_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--column", default="image")
    parser.add_argument("--backbone", default="builtin")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--memory", help="a folder that keeps the embeddings")
    options = parser.parse_args()
    # Bad images become rows of NaN, so that both files have the same rows. Within one run no row
    # is needed twice, so without a folder none is stored.
    extractor = PretrainedFeatureExtractor(
        options.backbone, memory=options.memory or False, on_error="nan"
    )
    n = embed_parquet(options.source, options.target, extractor, options.column, options.batch_size)
    print(f"{n} rows written to {options.target}")


if __name__ == "__main__":
    main()
