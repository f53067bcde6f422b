"""
Outgrowing one machine
======================

Embedding is the expensive step, and it is done once. A store on disk keeps the columns for other
processes and later runs, a run that was interrupted continues where it stopped, and the same call
sends the images to the workers of a cluster.

Give a folder of your images, ``FOLDER/CLASS/*.jpg``, as an argument to embed them.
"""

# %%
# Many images
# -----------
# 600 crops of photographs that scikit-image ships, written as files.
import sys
import tempfile
import time
from pathlib import Path

import joblib
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from skimage import data
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from sktransfer import PretrainedFeatureExtractor, embedding_store

NAMES = ["astronaut", "brick", "coffee", "grass", "gravel", "rocket"]
work = Path(tempfile.mkdtemp())
if len(sys.argv) > 1:
    from sktransfer.datasets import load_folder

    paths, y = load_folder(sys.argv[1])
else:
    rng = np.random.default_rng(0)
    paths, y = [], np.repeat(NAMES, 100)
    for row, name in enumerate(y):
        photo = getattr(data, name)()
        top, left = rng.integers(photo.shape[0] - 200), rng.integers(photo.shape[1] - 200)
        paths.append(str(work / f"{row}.jpg"))
        Image.fromarray(photo[top : top + 200, left : left + 200]).save(paths[-1])

# %%
# A run that is interrupted
# -------------------------
# The first run ends after a third of the images. The second run computes the others only, and the
# third one none.
extractor = PretrainedFeatureExtractor(memory=str(work / "store"))
seconds, computed = {}, {}


def timed(name, call):
    n_before = len(embedding_store(work / "store"))
    start = time.perf_counter()
    call()
    seconds[name] = time.perf_counter() - start
    computed[name] = len(embedding_store(work / "store")) - n_before
    print(f"{name:28} {seconds[name]:5.2f} s, {computed[name]} new rows in the store")


extractor.fit_transform(paths[:2])  # loads the network
timed("first third", lambda: extractor.fit_transform(paths[: len(paths) // 3]))
timed("all images", lambda: extractor.fit_transform(paths))
timed("all images, again", lambda: extractor.fit_transform(paths))

# %%
# Several processes
# -----------------
# The processes of a search share the store: its 50 fits embed nothing. Most of the time is that of
# starting two processes.
model = make_pipeline(extractor, RidgeClassifier())
search = GridSearchCV(model, {"ridgeclassifier__alpha": np.logspace(0, 4, 10)}, n_jobs=2)
timed("a search of 50 fits", lambda: search.fit(paths, y))
print(f"accuracy {search.best_score_:.2f}")

# %%
# A cluster
# ---------
# Under a backend of a cluster the images are sent to its workers, and the rows come back in
# order. With dask that is::
#
#     client = distributed.Client("scheduler:8786")
#     with joblib.parallel_config("dask"):
#         columns = extractor.fit_transform(paths)
#
# ray and Spark work alike, and ``examples/parquet_to_embeddings.py`` embeds a table that is
# larger than the memory. What is sent is small, as a pickle holds no weights that a name brings
# back:
joblib.dump(extractor, work / "extractor.joblib")
print(f"{(work / 'extractor.joblib').stat().st_size} bytes")

# %%
# What each step took
# -------------------
# In a measurement of 10,000 files whose rows are on disk, a transform took 0.15 s
# (``docs/benchmarks/warm_store.py``).
figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
for ax, values, label in zip(
    axes, (seconds, computed), ("seconds", "images sent through the network"), strict=True
):
    ax.bar_label(ax.barh(list(values), list(values.values())), fmt="{:.3g}", padding=3)
    ax.set(xlabel=label, xmargin=0.15)
axes[0].invert_yaxis()
plt.show()
