"""load_folder: a folder for each class, or images with a CSV file."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sktransfer import PretrainedFeatureExtractor
from sktransfer.datasets import load_folder


def make_images(folder, *names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (40 * number, 90, 20)).save(folder / name)


def relative(paths, folder):
    return [Path(path).relative_to(folder).as_posix() for path in paths]


def test_a_folder_for_each_class(tmp_path):
    make_images(tmp_path, "bee/b.JPG", "bee/a.png", "ant/c.webp")
    for junk in ("bee/Thumbs.db", "ant/.hidden.png", "notes.txt", ".DS_Store"):
        (tmp_path / junk).write_text("no image")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    paths, y = load_folder(tmp_path)
    assert relative(paths, tmp_path) == ["ant/c.webp", "bee/a.png", "bee/b.JPG"]
    assert y.tolist() == ["ant", "bee", "bee"]
    assert PretrainedFeatureExtractor(memory=False).fit_transform(paths).shape == (3, 1408)


@pytest.mark.parametrize("given", ["folder", "table"])
@pytest.mark.parametrize(
    ("written", "labels"),
    [
        (["cat", "dog"], ["cat", "dog"]),
        (["3", "-5"], [3, -5]),
        (["3", "0.5"], [3.0, 0.5]),
        (["007", "010"], ["007", "010"]),
        (["-007", "2"], ["-007", "2"]),
        (["1_0", "2"], ["1_0", "2"]),
        (["1", "9" * 20], ["1", "9" * 20]),
        (["1", " -1.5e3"], [1.0, -1500.0]),
        (["--5", "2"], ["--5", "2"]),
        (["3", "many"], ["3", "many"]),
    ],
)
def test_images_with_a_table(tmp_path, given, written, labels):
    make_images(tmp_path, "b.png", "in/a.png")
    table = tmp_path / "labels.csv"
    table.write_text(
        f"file,what\nb.png,{written[0]}\nin/a.png,{written[1]}\n", encoding="utf-8-sig"
    )
    paths, y = load_folder(tmp_path if given == "folder" else str(table))
    assert relative(paths, tmp_path) == ["b.png", "in/a.png"]
    assert y.tolist() == labels
    assert np.issubdtype(y.dtype, np.number) == (not isinstance(labels[0], str))


def test_the_column_of_the_labels(tmp_path):
    make_images(tmp_path, "a.png", "b.png")
    (tmp_path / "t.csv").write_text("id,photo,price\n1,a.png,10.5\n2,b.png,20\n")
    assert load_folder(tmp_path, label="price")[1].tolist() == [10.5, 20.0]
    with pytest.raises(ValueError, match=r"Which column .* Set label to one of \['id', 'price'\]"):
        load_folder(tmp_path)
    with pytest.raises(
        ValueError, match=r"no column 'weight' for the labels, but \['id', 'price'\]"
    ):
        load_folder(tmp_path, label="weight")


def test_a_column_of_long_texts(tmp_path):
    make_images(tmp_path, "a.png", "b.png")
    text = "No file has so long a name. " * 10
    (tmp_path / "t.csv").write_text(f"caption,photo,price\n{text},a.png,1\n{text},b.png,2\n")
    paths, y = load_folder(tmp_path, label="price")
    assert relative(paths, tmp_path) == ["a.png", "b.png"]
    assert y.tolist() == [1, 2]


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    make_images(tmp_path, "pets/ant/a.png", "pets/bee/b.png")
    paths, _ = load_folder("~/pets")
    assert relative(paths, tmp_path) == ["pets/ant/a.png", "pets/bee/b.png"]
    with pytest.raises(FileNotFoundError, match="'~no-user' is neither"):
        load_folder("~no-user")


@pytest.mark.parametrize(
    ("images", "tables", "message"),
    [
        ([], {}, "0 images, 0 folders and 0 CSV files"),
        (["a.png", "b.png"], {}, "2 images, 0 folders and 0 CSV files"),
        (["a.png", "bee/b.png"], {}, "1 images, 1 folders and 0 CSV files"),
        (["a.png"], {"t.csv": "a", "u.csv": "a"}, "1 images, 0 folders and 2 CSV files"),
        (["train/ant/a.png", "test/ant/b.png"], {}, r"Did you mean load_folder\('.*test'\)\?"),
        (["a.png"], {"t.csv": "file,y\n"}, "has no rows below its header"),
        (["a.png"], {"t.csv": "file,y\nc.png,1\n"}, r"No column .* names a file: .*'c\.png'"),
        (["a.png"], {"t.csv": "file,y\na.png,1\nc.png,2\n"}, r"Row 1 .* has no file '.*c\.png'"),
        (["a.png"], {"t.csv": "file,y\na.png,1\n,2\n"}, "Row 1 .* has no file"),
        (["a.png"], {"t.csv": "file,y\na.png,\n"}, "Row 0 .* has no 'y'"),
        (["a.png"], {"t.csv": "file,y\na.png\n"}, "Row 0 .* has no 'y'"),
    ],
)
def test_other_layouts_are_errors(tmp_path, images, tables, message):
    make_images(tmp_path, *images)
    for name, text in tables.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_folder(tmp_path)


def test_a_table_in_another_encoding(tmp_path):
    make_images(tmp_path, "a.png")
    (tmp_path / "t.csv").write_bytes("file,y\na.png,müde\n".encode("cp1252"))
    with pytest.raises(ValueError, match=r"t\.csv' is not in UTF-8 .*: save it in UTF-8"):
        load_folder(tmp_path)


def test_an_empty_class_is_an_error(tmp_path):
    make_images(tmp_path, "ant/a.png")
    (tmp_path / "bee").mkdir()
    with pytest.raises(ValueError, match="bee', a folder of a class, holds no image"):
        load_folder(tmp_path)


def test_a_label_needs_a_table(tmp_path):
    make_images(tmp_path, "ant/a.png")
    with pytest.raises(ValueError, match=r"label='y' names a column, but .* has no CSV file"):
        load_folder(tmp_path, label="y")


def test_a_missing_folder(tmp_path):
    missing = re.escape(repr(str(tmp_path / "nowhere")))
    with pytest.raises(FileNotFoundError, match=f"{missing} is neither a folder nor a file"):
        load_folder(tmp_path / "nowhere")
