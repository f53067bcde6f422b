"""find_leaks: planted copies are found with their kind, different images are not."""

import io
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images
from sklearn.model_selection import GroupKFold

from sktransfer.transferability import find_leaks

CHANGES = {
    "copy": lambda image: resaved(image, 50),
    "halved": lambda image: image.resize((image.width // 2, image.height // 2)),
    "brighter": lambda image: image.point(lambda level: min(255, int(1.4 * level + 10))),
    "shifted": lambda image: image.crop((0, 6, image.width, image.height)),
    "crop": lambda image: image.crop((20, 16, 96, 84)),
    "flip": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "upside down": lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    "rotation": lambda image: image.transpose(Image.Transpose.ROTATE_90),
}
KINDS = {
    "halved": {"copy"},
    "brighter": {"near", "copy"},
    "shifted": {"near", "crop", "copy"},
    "upside down": {"flip"},
}


def resaved(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


@pytest.fixture(scope="module")
def photos():
    """Forty different parts of two photographs, 106 × 90 pixels."""
    parts = [
        Image.fromarray(image[y : y + 90, x : x + 106])
        for image in load_sample_images().images
        for y in range(0, 337, 82)
        for x in range(0, 534, 106)
    ]
    return [part for part in parts if np.asarray(part.convert("L")).std() > 20][:40]


def pairs_of(leaks):
    return set(zip(leaks.table_["test_row"], leaks.table_["train_row"], strict=True))


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_found(photos, change):
    rows = [3, 8, 21, 33]
    leaks = find_leaks(photos, [CHANGES[change](photos[i]) for i in rows])
    assert {(k, i) for k, i in enumerate(rows)} <= pairs_of(leaks)
    planted = leaks.table_[leaks.table_["train_row"] == np.take(rows, leaks.table_["test_row"])]
    assert set(planted["kind"]) <= KINDS.get(change, {change})
    assert (planted["similarity"] >= leaks.threshold_).all()


def test_different_images_are_not_listed(photos):
    leaks = find_leaks(photos[:25], photos[25:])
    assert len(leaks.table_) == 0
    assert list(leaks.groups_) == list(range(len(photos)))
    assert "0 of 15 test rows" in str(leaks)


def test_stripes_and_single_blobs_do_not_match_each_other():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64]
    stripes = [np.sin(x * f + p) * 90 + 128 for f, p in rng.uniform([0.2, 0], [1.2, 6], (20, 2))]
    blobs = [
        np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * s**2)) * 200 + rng.normal(20, 4, (64, 64))
        for cx, cy, s in rng.uniform([20, 20, 4], [44, 44, 9], (20, 3))
    ]
    images = np.array(stripes + blobs).astype(np.uint8)
    table = find_leaks(images[::2], images[1::2]).table_
    assert table["test_row"].nunique() <= 2


@pytest.mark.parametrize("container", ["paths", "bytes", "arrays", "frame", "series"])
def test_the_same_pixels_are_exact_in_any_container(photos, container, tmp_path):
    paths = [str(tmp_path / f"{i}.png") for i in range(12)]
    for photo, path in zip(photos, paths, strict=False):
        photo.save(path)
    X = {
        "paths": paths,
        "bytes": [Path(path).read_bytes() for path in paths],
        "arrays": np.array([np.asarray(photo) for photo in photos[:12]]),
        "frame": pd.DataFrame({"image": paths}, index=range(50, 62)),
        "series": pd.Series(paths, index=range(50, 62)),
    }[container]
    leaks = find_leaks(X, [photos[5], np.asarray(photos[0])])
    assert leaks.table_.to_numpy().tolist() == [[0, 5, 1.0, "exact"], [1, 0, 1.0, "exact"]]


def test_within_one_set(photos):
    X = [*photos[:12], photos[2], CHANGES["flip"](photos[7]), photos[2]]
    leaks = find_leaks(X)
    assert pairs_of(leaks) == {(12, 2), (14, 2), (14, 12), (13, 7)}
    kept = np.setdiff1d(np.arange(len(X)), leaks.table_["test_row"])
    assert len(find_leaks([X[i] for i in kept]).table_) == 0
    for train, test in GroupKFold(3).split(X, groups=leaks.groups_):
        assert not set(leaks.groups_[train]) & set(leaks.groups_[test])
    assert leaks.groups_[2] == leaks.groups_[12] == leaks.groups_[14]
    assert len(np.unique(leaks.groups_)) == 12


def test_groups_join_rows_across_sets_that_have_no_pair(photos):
    """Two training rows that are copies are joined though neither has a twin in the test set."""
    leaks = find_leaks([*photos[:12], CHANGES["copy"](photos[4])], photos[20:24])
    assert len(leaks.table_) == 0
    assert leaks.groups_[4] == leaks.groups_[12]


def test_known_groups(photos):
    X = [photos[0], photos[1], photos[0], photos[1]]
    assert pairs_of(find_leaks(X, groups=["a", "b", "a", "c"])) == {(3, 1)}
    leaks = find_leaks(photos[:3], [photos[0], photos[9]], groups=[7, 8, 9, 7, 9])
    assert leaks.table_["kind"].tolist() == ["exact", "group"]
    assert leaks.table_["train_row"].tolist() == [0, 2]
    assert leaks.groups_.tolist() == [0, 1, 2, 0, 2]
    with pytest.raises(ValueError, match=r"groups has shape \(3,\); .* each of 5 rows"):
        find_leaks(photos[:3], photos[3:5], groups=[0, 1, 2])


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA])
def test_a_row_whose_group_is_unknown_is_alone(photos, missing):
    X = [photos[0], photos[1], photos[0], photos[1], photos[2]]
    leaks = find_leaks(X, groups=["a", missing, missing, missing, "a"])
    assert pairs_of(leaks) == {(2, 0), (3, 1)}
    assert leaks.groups_.tolist() == [0, 1, 0, 1, 0]
    assert len(find_leaks(X, groups=[1, 2, "1", 2, 3]).table_) == 1  # 1 is another group than "1"


def test_groups_of_two_containers_are_compared_by_value(photos):
    """Those of an array are numbers of NumPy."""
    leaks = find_leaks(photos[:3], photos[3:6], groups=[*np.array([1, 2, 3]), 3, 2.0, "1"])
    assert pairs_of(leaks) == {(0, 2), (1, 1)}
    assert leaks.groups_.tolist() == [0, 1, 2, 2, 1, 3]


def test_many_equal_images_give_ten_partners_a_row(photos):
    leaks = find_leaks([photos[0]] * 40, [photos[0]] * 3)
    assert leaks.table_.groupby("test_row").size().tolist() == [10, 10, 10]
    assert set(leaks.groups_) == {0}


def test_several_image_columns(photos):
    X = pd.DataFrame({"front": photos[:6], "back": photos[6:12]})
    other = pd.DataFrame({"front": [photos[20], photos[21]], "back": [photos[22], photos[3]]})
    assert pairs_of(find_leaks(X, other)) == {(1, 3)}


def test_unreadable_images_are_listed(photos):
    leaks = find_leaks([*photos[:3], None], [b"no image", photos[1]])
    assert pairs_of(leaks) == {(1, 1)}
    assert [bad.row for bad in leaks.bad_images_] == [3, 0]
    assert "X_test, row 0" in leaks.bad_images_[1].where
    assert len(leaks.groups_) == 6
    assert "2 unreadable" in str(leaks)


def test_a_set_of_which_nothing_can_be_read(photos):
    with pytest.raises(ValueError, match="X_train has no image that can be read") as error:
        find_leaks([None, b"no image"])
    assert [bad.row for bad in error.value.bad_images] == [0, 1]
    with pytest.raises(ValueError, match=r"X_test has no .*\n.*a good film.*\n.*equal texts"):
        find_leaks(photos[:3], ["a good film"])


def test_a_wrong_set_is_named_before_any_is_read(photos):
    with pytest.raises(ValueError, match=r"0 sample\(s\)") as error:
        find_leaks([b"no image"], [])
    assert error.value.__notes__ == ["This is about X_test of find_leaks."]


@pytest.mark.parametrize("images", ["one colour", "noise", "digits"])
def test_images_without_texture_or_of_few_pixels(images):
    rng = np.random.default_rng(0)
    X = {
        "one colour": np.arange(0, 240, 20)[:, None, None] + np.zeros((12, 30, 30)),
        "noise": rng.integers(0, 256, (12, 30, 30)),
        "digits": rng.integers(0, 256, (12, 4, 4)).repeat(2, 1).repeat(2, 2),
    }[images].astype(np.uint8)
    assert len(find_leaks(X).table_) == 0
    assert pairs_of(find_leaks(X, X[3:4])) == {(0, 3)}


def test_threshold(photos):
    X_test = [CHANGES["copy"](photos[3]), CHANGES["crop"](photos[8])]
    assert pairs_of(find_leaks(photos, X_test, threshold=0.9)) == {(0, 3)}
    assert find_leaks(photos, X_test, threshold=0.9).threshold_ == 0.9
    for threshold in ("high", 1.5, -0.1, None, np.array([0.5, 0.6])):
        with pytest.raises(ValueError, match='threshold must be "auto" or a number within 0…1'):
            find_leaks(photos, X_test, threshold=threshold)


def test_flat_rows_are_refused_with_what_to_do():
    with pytest.raises(ValueError, match="image_shape") as error:
        find_leaks(np.zeros((5, 64)))
    assert "reshape" in error.value.__notes__[1]


def test_it_does_not_need_pandas():
    code = """
import sys
sys.modules["pandas"] = None
import numpy as np
from sktransfer.transferability import find_leaks
X = np.random.default_rng(0).integers(0, 256, (4, 20, 20), dtype=np.uint8)
leaks = find_leaks(X, X[2:3])
assert leaks.table_["train_row"].tolist() == [2], leaks
assert leaks.table_["kind"].tolist() == ["exact"]
leaks._repr_html_()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_it_prints_well(photos):
    leaks = find_leaks(photos[:12], [photos[3], CHANGES["flip"](photos[2])])
    assert str(leaks).startswith("2 of 2 test rows have a twin in the training set")
    assert "1 exact, 1 flip" in repr(leaks)
    assert "<table" in leaks._repr_html_()
    plt.close("all")
    assert len(leaks.plot().images_) == 4
    plt.close("all")
    display = leaks.plot(n_pairs=1)
    assert len(display.images_) == 2
    assert plt.get_fignums() == [display.figure_.number]  # it is drawn once
    assert leaks.plot(ax=display.ax_).ax_ is display.ax_


def test_exposures_of_a_tile(shared_data):
    """Real shots of the same thing with another brightness, some shifted by a few pixels."""
    folder = shared_data / "data" / "magnetic_tile"
    files = pd.read_csv(folder / "files.csv").query("140 <= tile_group < 176")
    X = [str(folder / file) for file in files["file"]]
    tile, is_test = files["tile_group"].to_numpy(), files["exposure"].to_numpy() % 3 == 0
    train, test = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    table = find_leaks([X[i] for i in train], [X[i] for i in test]).table_
    is_right = tile[test[table["test_row"]]] == tile[train[table["train_row"]]]
    has_twin = np.isin(tile[test], tile[train])
    assert table["test_row"][is_right].nunique() >= 0.9 * has_twin.sum()
    # The groups are those of the files' numbers, and a few tiles were photographed twice.
    assert table["test_row"][~is_right].nunique() <= 0.05 * len(test)
