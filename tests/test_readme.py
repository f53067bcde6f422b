"""The README: each row of its table runs, and so do its ten lines."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

README = (Path(__file__).parents[1] / "README.md").read_text()
TABLE = README.split("| you want | you write |\n|---|---|\n")[1].split("\n\n")[0]
ROWS = [re.findall("`([^`]+)`", row.split("|")[2]) for row in TABLE.splitlines()]
IMPORTS = """
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sktransfer import *
from sktransfer.datasets import load_folder
from sktransfer.inspection import SaliencyDisplay
from sktransfer.transferability import find_leaks, rank_backbones, transfer_report
"""
# What would download is run with random weights, a small network in place of a large one.
IN_PLACE = {
    '("resnet50"': '("resnet18", weights=None',
    '("timm:xception41")': '("timm:mobilenetv3_small_050", weights=None)',
    '["builtin", "squeezenet1_1"]': '["builtin"]',
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, weights and word vectors where the README's lines look for them."""
    folder = tmp_path_factory.mktemp("readme")
    rng = np.random.default_rng(0)
    for name, brightest in (("ant", 120), ("bee", 255)):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, brightest, (40, 40, 3), dtype="uint8")
            Image.fromarray(pixels).save(folder / "images" / name / f"{i}.png")
    torch.save(torchvision.models.squeezenet1_1().state_dict(), folder / "squeezenet.pt")
    (folder / "glove.txt").write_text("good 1.0 0.0\nbad -1.0 0.5\n")
    return folder


@pytest.mark.parametrize("lines", ROWS, ids=[row[0][:50] for row in ROWS])
def test_each_row_of_the_table_runs(lines, folder, monkeypatch):
    if "Text" in lines[0]:
        pytest.importorskip("gensim")
    if "Display" in lines[0]:
        pytest.importorskip("matplotlib").use("agg")
    monkeypatch.chdir(folder)
    names = {"texts": ["good", "bad"]}
    exec(IMPORTS, names)
    for line in dict.fromkeys([ROWS[0][0], ROWS[2][0], *lines]):
        for written, run in IN_PLACE.items():
            line = line.replace(written, run)
        exec(line, names)
        if line.startswith("Pretrained") and ".fit" not in line:
            assert len(eval(line, names).fit_transform(names["paths"][:2])) == 2


def test_the_ten_lines_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    paths = sorted(Path("images/ant").glob("*.png"))
    rows = [f"{path},{path},{i % 3},{30 + i},{i}" for i, path in enumerate(paths)]
    Path("houses.csv").write_text("\n".join(["frontal,kitchen,bedrooms,area,price", *rows]))
    code = README.split("```python\n")[1].split("```")[0]
    exec(code, names := {})
    assert names["columns"].fit_transform(names["houses"]).shape == (12, 2 * 1408 + 2)
