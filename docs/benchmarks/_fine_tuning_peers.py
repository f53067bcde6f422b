"""What the fine-tuning benchmarks share: image sets, and the same networks trained by skorch."""

from __future__ import annotations

import copy

import numpy as np
from _report import DATA, data_set

SETS = ("hymenoptera", "flowers5", "dtd10", "brain_mri", "magnetic_tile")
# For read_mixed: exposures of the same magnetic tile would be in both parts.
MIXED_SETS = SETS[:4]
BALANCED = {"magnetic_tile"}  # scored by balanced accuracy
WEIGHTS = {
    "builtin": "DEFAULT",
    "mobilenet_v2": DATA / "weights/mobilenet_v2_imagenet.safetensors",
    "squeezenet1_1": DATA / "weights/squeezenet1_1_imagenet.safetensors",
}


def input_settings(backbone, size=0):
    """Parameters that load a backbone's weights, for images of `size` pixels; 0: its own."""
    settings = {"weights": WEIGHTS[backbone]}
    if size:
        settings["preprocessing"] = {"size": size * 8 // 7, "crop": size}
    return settings


def head_of(backbone):
    """Name of the network's last layer."""
    return "head" if backbone == "builtin" else "classifier.1"


def read_set(name, per_class, seed, max_test=0):
    """Paths and labels: `per_class` training images a class (0: all), and the test part."""
    rng = np.random.default_rng(seed)
    parts = {}
    for part, limit in (("train", per_class), ("test", max_test)):
        X, y = [], []
        # The test images are the same for every seed.
        draw = rng if part == "train" else np.random.default_rng(0)
        for folder in sorted((data_set(name) / part).iterdir()):
            paths = sorted(map(str, folder.glob("*.jpg")))
            if limit:
                paths = [paths[i] for i in draw.permutation(len(paths))[:limit]]
            X += paths
            y += [folder.name] * len(paths)
        parts[part] = X, np.array(y)
    return *parts["train"], *parts["test"]


def read_mixed(name, per_class, seed, max_test=0):
    """As :func:`read_set`, from both parts mixed: more test images, and no shift between them."""
    rng = np.random.default_rng(seed + 100)
    train, test = ([], []), ([], [])
    for folder in sorted((data_set(name) / "train").iterdir()):
        paths = sorted(map(str, folder.parents[1].glob(f"*/{folder.name}/*.jpg")))
        paths = [paths[i] for i in rng.permutation(len(paths))]
        n_train = min(per_class, len(paths) // 2)
        for (X, y), part in ((train, paths[:n_train]), (test, paths[n_train:][: max_test or None])):
            X += part
            y += [folder.name] * len(part)
    return train[0], np.array(train[1]), test[0], np.array(test[1])


def score(name, y_test, got, is_mixed=False):
    from sklearn.metrics import accuracy_score, balanced_accuracy_score

    metric = balanced_accuracy_score if is_mixed or name in BALANCED else accuracy_score
    return metric(y_test, got)


def scores_of(runs, key, value):
    """(set, seed) -> score of the runs whose `key` is `value`."""
    return {(run["set"], run["seed"]): run["score"] for run in runs if run[key] == value}


def module_of(backbone, n_classes=None):
    """The whole network as its authors wrote it, with its weights; a new head if asked for."""
    import torch

    from sktransfer import load_backbone

    module = copy.deepcopy(load_backbone(backbone, weights=WEIGHTS[backbone]).network.module)
    module.requires_grad_(True)
    if n_classes is not None:
        path = head_of(backbone)
        parent, _, leaf = path.rpartition(".")
        old = module.get_submodule(path)
        if isinstance(old, torch.nn.Conv2d):
            new = torch.nn.Conv2d(old.in_channels, n_classes, 1)
        else:
            new = torch.nn.Linear(old.in_features, n_classes)
        setattr(module.get_submodule(parent), leaf, new)
    return module


def pictures(backbone, paths, targets, is_augmented=False, size=0):
    """A torch data set that decodes each image when it is asked for, as tutorials do.

    Augmented as in PyTorch's transfer-learning tutorial: a random part of it, perhaps mirrored.
    """
    import torch
    from PIL import Image
    from torchvision.transforms import v2

    from sktransfer import load_backbone

    preprocessing = load_backbone(backbone, **input_settings(backbone, size)).preprocessing
    mean = torch.tensor(preprocessing.mean).view(3, 1, 1)
    std = torch.tensor(preprocessing.std).view(3, 1, 1)
    crop = v2.Compose([v2.RandomResizedCrop(preprocessing.crop_size), v2.RandomHorizontalFlip()])

    class Pictures(torch.utils.data.Dataset):
        def __len__(self):
            return len(paths)

        def __getitem__(self, i):
            picture = Image.open(paths[i]).convert("RGB")
            if is_augmented:
                pixels = np.asarray(crop(picture))
            else:
                pixels = preprocessing.resize_crop(np.asarray(picture))
            x = torch.tensor(pixels).permute(2, 0, 1) / 255
            return (x - mean) / std, int(targets[i])

    return Pictures()


def skorch_net(module, is_frozen, max_epochs, optimizer="sgd", lr=1e-3, batch_size=32):
    """skorch around `module`; `is_frozen` (parameter name -> bool) as its Freezer takes it."""
    import torch
    from skorch import NeuralNetClassifier
    from skorch.callbacks import Freezer, LRScheduler

    settings = {"optimizer": torch.optim.AdamW}
    if optimizer == "sgd":
        settings = {"optimizer": torch.optim.SGD, "optimizer__momentum": 0.9}
    return NeuralNetClassifier(
        module, criterion=torch.nn.CrossEntropyLoss, lr=lr, batch_size=batch_size,
        max_epochs=max_epochs, train_split=None, verbose=0, iterator_train__shuffle=True,
        device="cuda" if torch.cuda.is_available() else "cpu",
        callbacks=[LRScheduler(policy="StepLR", step_size=7, gamma=0.1), Freezer(is_frozen)],
        **settings,
    )  # fmt: skip
