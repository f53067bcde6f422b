"""
Save, export and serve
======================

A fitted model goes to a server in one of two ways: :func:`~sktransfer.save` writes a file that
answers images of any kind with sktransfer, :func:`~sktransfer.export` one that needs torch or
onnxruntime only. Both give the probabilities of the model.

Give a folder of your images, ``FOLDER/CLASS/*.jpg``, as an argument to train on them.
"""

# %%
# A model
# -------
# Crops of photographs that scikit-image ships; the class is the photograph.
import json
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from skimage import data
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torchvision.transforms import v2

from sktransfer import PretrainedFeatureExtractor, export, load, save

NAMES = ["astronaut", "coffee", "immunohistochemistry", "retina"]
rng = np.random.default_rng(0)
if len(sys.argv) > 1:
    from sktransfer.datasets import load_folder

    X, y = load_folder(sys.argv[1])
else:
    X, y = [], np.repeat(NAMES, 30)
    for name in y:
        photo = getattr(data, name)()
        top, left = rng.integers(photo.shape[0] - 120), rng.integers(photo.shape[1] - 120)
        X.append(photo[top : top + 120, left : left + 120])
X_train, X_test, y_train, y_test = train_test_split(X, y, stratify=y, random_state=0)

# No image comes twice to a server, so its columns need not be kept.
extractor = PretrainedFeatureExtractor(memory=False)
model = make_pipeline(extractor, StandardScaler(), LogisticRegression(C=0.01))
model.fit(X_train, y_train)
probabilities = model.predict_proba(X_test)

# %%
# Two files
# ---------
# With ``standalone=True`` the saved file holds all weights. No code in it is run when it is
# loaded. The exported program says in its metadata how an image is resized, and which column is
# which class.
folder = Path(tempfile.mkdtemp())
save(model, folder / "model.sktransfer", standalone=True)
loaded = load(folder / "model.sktransfer")
loaded.set_params(pretrainedfeatureextractor__memory=False)  # a file does not hold it

export(model, folder / "model.pt2", format="torch")
extra = {"sktransfer": ""}
program = torch.export.load(folder / "model.pt2", extra_files=extra).module()
metadata = json.loads(extra["sktransfer"])
print(metadata["labels"], metadata["resize"])

# %%
# Answers
# -------
# The saved model takes what the fitted one took. The exported one takes pixels of one size: three
# lines of torchvision resize an image to it.
resize = metadata["resize"]
prepare = v2.Compose(
    [
        v2.Resize(resize["size"], v2.InterpolationMode(resize["interpolation"])),
        v2.CenterCrop(resize["crop"]),
        v2.PILToTensor(),
    ]
)


def opened(image):
    return (Image.fromarray(image) if isinstance(image, np.ndarray) else Image.open(image)).convert(
        "RGB"
    )


def exported(images):
    with torch.inference_mode():
        return program(torch.stack([prepare(opened(image)) for image in images])).numpy()


ways = {"fitted": model.predict_proba, "saved": loaded.predict_proba, "exported": exported}
for name, answer in ways.items():
    answer(X_test[:1])  # the first call loads the network
    difference = np.abs(answer(X_test) - probabilities).max()
    start = time.perf_counter()
    for image in X_test[:20]:
        answer([image])
    milliseconds = 50 * (time.perf_counter() - start)
    print(f"{name:8} {milliseconds:5.1f} ms an image, greatest difference {difference:.1e}")
for path in sorted(folder.iterdir()):
    print(f"{path.name:16} {path.stat().st_size / 1e6:.1f} MB")

# %%
# Serve
# -----
# ``examples/serve`` is a small FastAPI application around ``load``. For a photograph of 500×375
# pixels it takes 8.4 ms with the saved built-in network and 2.8 ms with the exported one in
# onnxruntime, medians on two cores (``docs/benchmarks/serving.py``).
figure, axes = plt.subplots(2, 3, figsize=(9, 5), layout="constrained")
for ax, bars, image in zip(axes[0], axes[1], X_test, strict=False):
    ax.imshow(opened(image))
    ax.axis("off")
    for k, (name, answer) in enumerate(ways.items()):
        places = np.arange(len(model.classes_)) + 0.25 * k
        bars.barh(places, answer([image])[0], height=0.22, label=name)
    bars.set_yticks(np.arange(len(model.classes_)) + 0.25, [c[:10] for c in model.classes_])
    bars.set(xlim=(0, 1), xlabel="probability")
axes[1, 0].legend(fontsize="small")
plt.show()
