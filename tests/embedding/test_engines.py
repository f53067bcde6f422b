"""Ray and Spark with a fitted extractor as it is; skipped where they are not installed."""

import os
import sys
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from seen_pictures import SeenPictures

from sktransfer import PretrainedFeatureExtractor

pytestmark = [
    pytest.mark.slow,
    # The engines' own: sockets, pipes and threads of child processes, old names of libraries.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:.*[Ss]park:UserWarning"),  # "does not support stage-level …"
]

N = 24


@pytest.fixture
def frame(pictures, tmp_path):
    paths = []
    for i in range(N):
        paths.append(str(tmp_path / f"{i:02d}.png"))
        Image.fromarray(np.roll(pictures[i % 12], 8 * (i // 12), axis=0)).save(paths[-1])
    return pd.DataFrame({"image": paths})


@pytest.fixture(scope="module")
def environment():
    """The workers run what runs these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
        patch.setenv("PYSPARK_PYTHON", sys.executable)
        patch.setenv("RAY_AUTH_MODE", "disabled")  # or a token stays in the home folder
        yield


@pytest.fixture(scope="module")
def ray(environment):
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def spark(environment):
    sql = pytest.importorskip("pyspark.sql")
    # Two tasks at once, each in a Python process of its own; one may fail thrice.
    builder = sql.SparkSession.builder.master("local[2,4]").config("spark.ui.enabled", "false")
    session = builder.config("spark.driver.bindAddress", "127.0.0.1").getOrCreate()
    session.sparkContext.setLogLevel("OFF")
    yield session
    session.stop()


def dying_extractor(frame, folder):
    """Return rows to expect, and an extractor whose process dies once, half way."""
    extractor = PretrainedFeatureExtractor(preprocessing=SeenPictures(folder), memory=False)
    expected = extractor.fit(frame).transform(frame)
    (folder / "seen").unlink()
    extractor.set_params(preprocessing=SeenPictures(folder, die_at=N // 2))
    return expected, extractor.set_output(transform="pandas").fit(frame)


def assert_same_rows(got, frame, expected):
    """Rows may come in another order: their paths tell which they are."""
    got = got.set_index("image").loc[frame["image"]].to_numpy(dtype=float)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_joblib_on_ray(ray, frame, tmp_path):
    from ray.util.joblib import register_ray

    register_ray()
    seen = SeenPictures(tmp_path)
    extractor = PretrainedFeatureExtractor(preprocessing=seen, memory=False).fit(frame)
    expected = extractor.transform(frame)
    own = seen.pids
    with joblib.parallel_config("ray"):
        rows = extractor.transform(frame)
    assert not (seen.pids_since(N) & own)
    np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_ray_data_and_a_worker_that_dies(ray, frame, tmp_path):
    import ray.data

    expected, extractor = dying_extractor(frame, tmp_path)

    def embed(batch):
        return extractor.transform(batch).assign(image=batch["image"])

    images = ray.data.from_pandas(frame).repartition(4)
    rows = images.map_batches(embed, batch_format="pandas").to_pandas()
    assert (tmp_path / "died").exists()
    assert_same_rows(rows, frame, expected)


def test_joblib_on_spark(spark, frame, tmp_path):
    pytest.importorskip("joblibspark").register_spark()
    seen = SeenPictures(tmp_path)
    extractor = PretrainedFeatureExtractor(preprocessing=seen, memory=False).fit(frame)
    expected = extractor.transform(frame)
    own = seen.pids
    with joblib.parallel_config("spark"):
        rows = extractor.transform(frame)
    assert not (seen.pids_since(N) & own)
    np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_spark_data_frames_and_a_worker_that_dies(spark, frame, tmp_path):
    expected, extractor = dying_extractor(frame, tmp_path)

    def embed(batches):
        for batch in batches:
            yield extractor.transform(batch).assign(image=batch["image"])

    columns = [f"`{name}` float" for name in extractor.get_feature_names_out()]
    images = spark.createDataFrame(frame).repartition(4)
    rows = images.mapInPandas(embed, ", ".join([*columns, "image string"])).toPandas()
    assert (tmp_path / "died").exists()
    assert_same_rows(rows, frame, expected)
