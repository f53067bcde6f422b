"""The layout of the package: imports go down only, without circles, and files stay readable."""

import importlib.util
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import sktransfer

# The same measurements, printed: docs/benchmarks/house.py.
path = Path(__file__).parents[1] / "docs" / "benchmarks" / "house.py"
spec = importlib.util.spec_from_file_location("house", path)
house = importlib.util.module_from_spec(spec)
spec.loader.exec_module(house)

# Seven floors of files and folders; each imports from those below it only.
FLOORS = [
    {"_progress", "_rows", "_threads", "_version", "datasets"},
    {"images", "store", "texts"},
    {"networks", "_validation"},
    {"embedding"},
    {"fine_tuning"},
    {"inspection", "saving"},
    {"__init__", "transferability"},
]
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
FOLDERS = sorted(file.parent.name for file in house.PACKAGE.glob("*/__init__.py"))


def room_of(file):
    return file.relative_to(house.PACKAGE).with_suffix("").parts[0]


def imported(file):
    """The files and folders of the package that a file imports, wherever in it: (room, module)."""
    for name in house.imported_names(file):
        package, *rest = name.split(".")
        if package == "sktransfer" and rest:
            room = rest[0] if rest[0] in FLOOR else "__init__"
            yield room, (rest[1] if room in FOLDERS and len(rest) > 1 else room)


of_each_file = pytest.mark.parametrize(
    "file", house.FILES, ids=lambda file: str(file.relative_to(house.PACKAGE))
)
of_each_test = pytest.mark.parametrize("file", house.TESTS, ids=lambda file: file.name)


def test_every_file_has_a_floor():
    assert {room_of(file) for file in house.FILES} == set(FLOOR)


@of_each_file
def test_imports_go_down_only(file):
    room = room_of(file)
    for other, _ in imported(file):
        assert other == room or FLOOR[other] < FLOOR[room], f"it imports {other}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_circle_within_a_folder(folder):
    files = {file.stem: file for file in (house.PACKAGE / folder).glob("*.py")}
    graph = {
        name: {module for room, module in imported(file) if room == folder} & set(files)
        for name, file in files.items()
    }
    list(TopologicalSorter(graph).static_order())


@of_each_file
def test_files_stay_readable(file):
    assert house.n_lines(file) <= 500
    assert max(house.function_lengths(file), default=(0, ""))[0] <= 60


@of_each_file
def test_no_private_names_of_others(file):
    names = house.private_foreign_names(file)
    if file.name == "_validation.py":
        names = [name for name in names if not name.startswith("sklearn")]
    assert not names


@of_each_test
def test_tests_stay_readable(file):
    assert house.n_lines(file) <= 500


# What stands on the two ideas, each in files of its own.
ON_TOP = {"datasets", "inspection", "saving", "transferability"}
# Texts, and the networks of the package transformers.
OF_TEXTS = {"_blocks", "_huggingface", "_text", "_text_extractor", "_tables"}
OF_TEXTS |= {"_hf_images", "_tokens", "_word_vectors"}


def part_of(file):
    if room_of(file) == "texts" or file.stem in OF_TEXTS:
        return "texts"
    return "on top" if room_of(file) in ON_TOP else "core"


@pytest.mark.parametrize(
    ("part", "n_lines", "n_code_lines", "n_files"),
    [("core", 12_300, 8_400, 46), ("texts", 2_200, 1_500, 10), ("on top", 6_500, 4_000, 31)],
)
def test_the_package_stays_small(part, n_lines, n_code_lines, n_files):
    files = [file for file in house.FILES if part_of(file) == part]
    assert sum(map(house.n_lines, files)) <= n_lines
    assert sum(map(house.n_code_lines, files)) <= n_code_lines
    assert sum(map(house.has_definitions, files)) <= n_files


def test_types_are_named():
    assert sum(map(house.n_any, house.FILES)) <= 60


def test_tests_use_public_names():
    assert sum(map(house.n_private_imports, house.TESTS)) <= 25


@pytest.mark.parametrize(
    ("name", "n"), [("FineTuningClassifier", 31), ("PretrainedFeatureExtractor", 15)]
)
def test_parameters_stay_few(name, n):
    assert house.n_parameters(getattr(sktransfer, name)) <= n
