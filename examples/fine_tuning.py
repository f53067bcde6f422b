"""
Fine-tune a network and compare it with its linear probe
========================================================

Four photographs are cut into small crops. The test crops come from the half of each photograph
that training does not see.
"""

# %%
import numpy as np
from skimage import data

from sktransfer import FineTuningClassifier

names = ["brick", "grass", "gravel", "coins"]
rng = np.random.default_rng(0)


def crops(side, n=20, size=48):
    """Crops of the left (0) or the right (1) half of each photograph."""
    X, y = [], []
    for name in names:
        photo = getattr(data, name)()
        half = photo.shape[1] // 2
        for _ in range(n):
            top = rng.integers(photo.shape[0] - size)
            left = side * half + rng.integers(half - size)
            X.append(photo[top : top + size, left : left + size])
            y.append(name)
    return np.stack(X), np.array(y)


X_train, y_train = crops(0)
X_test, y_test = crops(1)

# %%
# With no epochs the model is the linear probe.
probe = FineTuningClassifier(max_epochs=0, random_state=0).fit(X_train, y_train)
print(f"linear probe:      {probe.score(X_test, y_test):.2f}")

# %%
# Unfreeze the last stage: the frozen stages below it are computed once.
tuned = FineTuningClassifier(unfreeze=1, max_epochs=4, random_state=0).fit(X_train, y_train)
print(f"last stage tuned:  {tuned.score(X_test, y_test):.2f}")
for row in tuned.history_:
    print(f"  epoch {row['epoch']}: training loss {row['train_loss']:.4f}, {row['seconds']:.2f} s")
