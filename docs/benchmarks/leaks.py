"""Recall and false alarms of `find_leaks`, and its time for 10,000 images.

python docs/benchmarks/leaks.py
"""

import csv
import io
import time

import numpy as np
import torch
from _report import data_set, save
from PIL import Image

from sktransfer import PretrainedFeatureExtractor
from sktransfer.transferability import find_leaks

THRESHOLDS = (0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9)
# files.csv counts shots: a new group begins after a gap in their numbers. Seen side by side, these
# groups are the same tile, photographed again (205 and 214 upside down).
SAME_TILES = [
    *[(60, 61, 62, 63, 64), (57, 58), (34, 35, 36), (12, 13, 15, 16), (24, 25), (49, 50), (46, 52)],
    *[(129, 130), (8, 19), (169, 170), (119, 120), (211, 212, 213), (219, 221), (177, 180)],
    *[(123, 124), (89, 90), (159, 160), (80, 81), (67, 68), (205, 214)],
]
N_PLANTED = 100


def of_split(paths, labels, train, test):
    """Recall and false alarms by threshold, for several meanings of "the same tile"."""
    X = [paths[i] for i in train], [paths[i] for i in test]
    default = find_leaks(*X).threshold_
    table = find_leaks(*X, threshold=0.3).table_
    return {name: curve(table, default, tiles, train, test) for name, tiles in labels.items()}


def curve(table, default, tiles, train, test):
    """Recall and false alarms in rows of the test set."""
    is_right = tiles[test[table["test_row"]]] == tiles[train[table["train_row"]]]
    has_twin = np.isin(tiles[test], tiles[train])
    figures = {"default": default, "rows": len(test), "rows with a twin": int(has_twin.sum())}
    for threshold in (default, *THRESHOLDS):
        listed = table["similarity"] >= threshold
        found = set(table["test_row"][listed & is_right])
        wrong = set(table["test_row"][listed & ~is_right]) - found
        figures["default threshold" if threshold is default else threshold] = {
            "recall": len(found) / max(has_twin.sum(), 1),
            "false alarms": len(wrong) / len(test),
        }
    return figures


def magnetic_tile():
    folder = data_set("magnetic_tile")
    files = list(csv.DictReader((folder / "files.csv").open()))
    paths = [str(folder / file["file"]) for file in files]
    groups = np.array([int(file["tile_group"]) for file in files])
    tiles = groups.copy()
    for same in SAME_TILES:
        tiles[np.isin(groups, same)] = same[0]
    is_test = np.array([file["split"] == "test" for file in files])
    train, test = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    labels = {"tiles": tiles, "groups of the file": groups}
    shuffled = np.random.default_rng(0).permutation(len(paths))
    random = shuffled[len(test) :], shuffled[: len(test)]
    return {
        "random split": of_split(paths, labels, *random),
        "split by tile": of_split(paths, labels, train, test),
    }


def changed(image, how, rng):
    if how == "resaved":
        file = io.BytesIO()
        image.save(file, "JPEG", quality=50)
        return file.getvalue()
    if how == "halved":
        return image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)
    if how == "flipped":
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = rng.uniform(0.5, 0.95)
    w, h = int(scale * image.width), int(scale * image.height)
    x, y = rng.integers(image.width - w + 1), rng.integers(image.height - h + 1)
    return image.crop((x, y, x + w, y + h))


def planted(name):
    """Changed copies of some images, looked for among all."""
    paths = sorted(map(str, data_set(name).glob("*/*/*.jpg")))
    rng = np.random.default_rng(0)
    rows = rng.permutation(len(paths))[:N_PLANTED]
    leaks = find_leaks(paths)
    figures = {"images": len(paths), "threshold": leaks.threshold_}
    figures["rows listed without copies"] = int(leaks.table_["test_row"].nunique())
    for how in ("resaved", "halved", "flipped", "cropped"):
        copies = [changed(Image.open(paths[i]).convert("RGB"), how, rng) for i in rows]
        table = find_leaks(paths, copies).table_
        found = table["test_row"][rows[table["test_row"]] == table["train_row"]].nunique()
        figures[how] = found / len(rows)
    return figures


def ten_thousand():
    z = np.load(data_set("tiny_imagenet_64") / "val.npz")
    headers = [z["jpeg_header_0"].tobytes(), z["jpeg_header_1"].tobytes()]
    blob, offset, header = z["blob"], z["offset"], z["header"]
    X = [headers[header[i]] + blob[offset[i] : offset[i + 1]].tobytes() for i in range(10_000)]
    PretrainedFeatureExtractor().fit(X).transform(X)
    wall, cpu = time.perf_counter(), time.process_time()
    leaks = find_leaks(X)
    return {
        "seconds": time.perf_counter() - wall,
        "seconds of CPU": time.process_time() - cpu,
        "threads": torch.get_num_threads(),
        "rows listed": int(leaks.table_["test_row"].nunique()),
    }


def main():
    figures = {"magnetic_tile": magnetic_tile()}
    print(figures, flush=True)
    for name in ("hymenoptera", "flowers5", "dtd10"):
        figures[name] = planted(name)
        print(name, figures[name], flush=True)
    figures["10,000 images of 64×64"] = ten_thousand()
    print(figures["10,000 images of 64×64"])
    save("leaks", figures)


if __name__ == "__main__":
    main()
