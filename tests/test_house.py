"""The house: imports go down only, there is no circle, files stay readable."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sktransfer"

# Files, and folders as one; each imports from the floors below it alone.
FLOORS = [
    {"_atomic_write", "_progress", "_threads", "_version"},
    {"images", "store"},
    {"networks", "_validation"},
    {"embedding"},
    {"fine_tuning"},
    {"_jsonable"},
    {"_save"},
]
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported(path):
    """The files and folders of the package that a file imports, wherever in it: (room, module)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            parts = (node.module or "").split(".")
            if node.level:  # from . import x, from .x import y: in the same folder
                for name in names if node.module is None else parts[:1]:
                    yield room_of(path), name
            elif parts == ["sktransfer"]:
                for name in names:
                    if name.startswith("_") and not name.startswith("__"):
                        yield name, name
            elif parts[0] == "sktransfer":
                yield parts[1], (parts + names)[2] if parts[1] in rooms() else parts[1]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("sktransfer."):
                    yield alias.name.split(".")[1], alias.name.split(".")[-1]


def rooms():
    return {path.name for path in PACKAGE.iterdir() if path.is_dir()}


def room_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def test_every_file_has_a_floor():
    assert {room_of(path) for path in FILES} == set(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    room = room_of(path)
    for other, _ in imported(path):
        assert other == room or FLOOR[other] < FLOOR[room], f"{room} imports {other}"


@pytest.mark.parametrize("room", sorted(rooms() - {"__pycache__"}))
def test_no_circle_within_a_folder(room):
    files = {path.stem: path for path in (PACKAGE / room).glob("*.py")}
    graph = {
        name: {module for other, module in imported(path) if other == room} & set(files)
        for name, path in files.items()
    }
    list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_readable(path):
    assert len(path.read_text().splitlines()) <= 500
