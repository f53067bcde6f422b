"""
Numbers, texts and photographs in one table
===========================================

Each row of a shop's table has a number, a line of text and a photograph. One column transformer
turns all three into columns, and a linear regression predicts the price from them.

The offers here are made up. For your own, give a folder as an argument: it holds ``offers.csv``
with volume, title, photo (a path in the folder) and price. A second argument names what embeds the
texts, such as ``hf:sentence-transformers/all-MiniLM-L6-v2`` from the local cache.
"""

# %%
# The table
# ---------
# A bag's volume is in a column of its own, its wear shows in the photograph, and how elegant it is
# is written in the title. The price depends on all three.
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from PIL import Image, ImageDraw
from sklearn.compose import make_column_transformer
from sklearn.feature_selection import VarianceThreshold
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sktransfer import PretrainedFeatureExtractor, PretrainedTextExtractor

rng = np.random.default_rng(0)
ELEGANCE = {
    "splendid": 1.0, "superb": 0.9, "gorgeous": 0.8, "elegant": 0.7, "lovely": 0.5, "pretty": 0.4,
    "neat": 0.2, "ordinary": 0.0, "usual": -0.1, "plain": -0.3, "simple": -0.4, "dull": -0.6,
    "boring": -0.7, "clumsy": -0.8, "ugly": -0.9, "awful": -1.0,
}  # fmt: skip
MATERIALS = ["leather", "cotton", "canvas", "nylon"]


def draw_bag(wear):
    """Return a photograph of a bag with more scratches for a greater `wear` in 0…1."""
    image = Image.new("RGB", (120, 120), (235, 230, 220))
    draw = ImageDraw.Draw(image)
    cloth = tuple(int(c) for c in rng.integers(60, 170, 3))
    left, top = rng.uniform(15, 30), rng.uniform(45, 60)
    draw.arc((left + 15, top - 30, 105 - left, top + 30), 180, 360, fill=cloth, width=6)
    draw.rounded_rectangle((left, top, 120 - left, 110), 8, fill=cloth)
    for _ in range(int(40 * wear)):
        x, y = rng.uniform(left, 110 - left), rng.uniform(top, 105)
        end = x + rng.uniform(4, 12), y + rng.uniform(-4, 4)
        draw.line((x, y, *end), fill=tuple(c + 70 for c in cloth), width=2)
    pixels = np.asarray(image) + rng.normal(0, 8, (120, 120, 3))
    return np.clip(pixels, 0, 255).astype("uint8")


def write_vectors():
    """Write a small table of word vectors, in which words of like meaning are neighbours."""
    vectors = {word: [value, value**2, 0, 0] for word, value in ELEGANCE.items()}
    vectors |= {word: [0, 0, i // 2, i % 2] for i, word in enumerate(MATERIALS)}
    lines = []
    for word, vector in vectors.items():
        numbers = np.array(vector) + rng.normal(0, 0.05, 4)
        lines.append(" ".join([word, *(f"{number:.4f}" for number in numbers)]))
    path = Path(tempfile.mkdtemp()) / "vectors.txt"
    path.write_text("\n".join(lines))
    return f"vectors:{path}"


if len(sys.argv) > 1:
    folder = Path(sys.argv[1])
    offers = pd.read_csv(folder / "offers.csv")
    offers["photo"] = [str(folder / path) for path in offers["photo"]]
    shown = [plt.imread(path) for path in offers["photo"][:4]]
else:
    words, wear = rng.choice(list(ELEGANCE), 240), rng.uniform(0, 1, 240)
    offers = pd.DataFrame({"volume": rng.uniform(5, 40, 240)})
    offers["title"] = [f"{word.title()} bag of {rng.choice(MATERIALS)}" for word in words]
    offers["photo"] = [draw_bag(share) for share in wear]
    elegance = np.array([ELEGANCE[word] for word in words])
    log_price = 3 + 0.03 * offers["volume"] - 1.2 * wear + 0.4 * elegance
    offers["price"] = np.exp(log_price + rng.normal(0, 0.1, 240))
    shown = offers["photo"][:4]
vectors = sys.argv[2] if len(sys.argv) > 2 else write_vectors()

offers.drop(columns="photo").head()

# %%
# One transformer for all columns
# -------------------------------
# Each kind of column has its own extractor. Both kinds of network are frozen, and each text and
# each image is embedded once for all the models and folds below.
#
# No weights for texts ship with the package. The words here have a table of four numbers each,
# written above; a real one is GloVe's, and a transformer's name works as well.
numbers = (StandardScaler(), ["volume"])
texts = (make_pipeline(PretrainedTextExtractor(vectors), StandardScaler()), ["title"])
network = make_pipeline(PretrainedFeatureExtractor(), VarianceThreshold(1e-4), StandardScaler())
images = (network, ["photo"])

folds = KFold(5, shuffle=True, random_state=0)
candidates = {
    "number": [numbers],
    "and text": [numbers, texts],
    "and image": [numbers, images],
    "all three": [numbers, texts, images],
}
scores = {}
for name, columns in candidates.items():
    model = make_pipeline(make_column_transformer(*columns), RidgeCV(np.logspace(0, 5, 11)))
    scores[name] = cross_val_score(model, offers, np.log(offers["price"]), cv=folds)
    print(f"{name:9} R² {scores[name].mean():.2f}")

# %%
# What each column adds
# ---------------------
# The folds are the same for all models, so the models can be compared fold by fold.
figure = plt.figure(figsize=(9, 4), layout="constrained")
left, right = figure.subfigures(1, 2)
for ax, image, title in zip(left.subplots(2, 2).flat, shown, offers["title"][:4], strict=True):
    ax.imshow(image)
    ax.set_title(title, fontsize=9)
    ax.axis("off")
ax = right.subplots()
ax.plot(list(scores), list(scores.values()), color="0.7")
ax.plot(list(scores), [fold.mean() for fold in scores.values()], "o-", linewidth=3, label="mean")
ax.set(ylabel="R² of the log price", title="Each grey line is a fold")
ax.legend(loc="lower right")
plt.show()
