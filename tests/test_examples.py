"""The examples have the form of a gallery and run on a small folder of images."""

import ast
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("plot_*.py"))
if not SCRIPTS:
    pytest.skip("the examples are not here", allow_module_level=True)

# These run everywhere; the site's build runs all of them at their full size.
FAST = {"plot_another_domain", "plot_few_labels", "plot_leaks_and_search", "plot_medical_images"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_has_the_form_of_a_gallery(path):
    text = path.read_text()
    title, underline = ast.get_docstring(ast.parse(text)).splitlines()[:2]
    assert underline == "=" * len(title)
    assert "\n# %%\n" in text
    assert "sys.argv" in text, "a folder of the user's is an argument"
    assert "plt.show()" in text
    assert len(text.splitlines()) <= 140


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of noise: 64 images of one class and 16 of each of two others."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for k, (name, n) in enumerate({"good": 64, "scratch": 16, "stain": 16}.items()):
        (folder / name).mkdir()
        for i in range(n):
            pixels = rng.integers(0, 120 + 60 * k, (40 - 8 * k, 40, 3), dtype="uint8")
            Image.fromarray(pixels).save(folder / name / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def tables(folder, tmp_path_factory):
    """A folder of two tables of these images."""
    tables = tmp_path_factory.mktemp("tables")
    labels = ["path,wide,dark"]
    houses = ["area,bedrooms,bathrooms,price,frontal,bedroom,bathroom,kitchen"]
    offers = ["volume,title,photo,price"]
    for i, path in enumerate(sorted(folder.glob("*/*.png"))):
        labels.append(f"{path},{int(path.parent.name != 'good')},{i % 2}")
        houses.append(f"{100 + i},{i % 4},{i % 3},{100 + i * i % 70}" + f",{path}" * 4)
        offers.append(f"{i},a plain bag,{path},{100 + i}")
    (tables / "labels.csv").write_text("\n".join(labels))
    (tables / "houses.csv").write_text("\n".join(houses))
    (tables / "offers.csv").write_text("\n".join(offers))
    return tables


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[] if path.stem in FAST else pytest.mark.slow, id=path.stem)
        for path in SCRIPTS
    ],
)
def test_runs_on_a_folder(path, folder, tables, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    pytest.importorskip("skimage")
    pytest.importorskip("sktransfer.datasets")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    arguments = {
        "plot_table_and_photos": [tables],
        "plot_several_labels_and_targets": [tables],
        "plot_texts_beside_images": [tables],
        "plot_another_domain": [folder, folder],
    }.get(path.stem, [folder])
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.extend(plt.get_fignums()))
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    runpy.run_path(str(path), run_name="__main__")
    assert shown
    plt.close("all")
