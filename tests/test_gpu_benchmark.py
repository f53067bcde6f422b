"""The check of a GPU, docs/benchmarks/gpu.py, runs without one in small."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "docs" / "benchmarks"
IN_OTHER_PROCESSES = {"opened_on_a_cpu", "two_workers", "fine_tuning"}


def figures_of(monkeypatch, folder, parts):
    monkeypatch.setenv("OUT", str(folder))
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    import gpu

    parts = parts or [name for name in gpu.PARTS if name not in IN_OTHER_PROCESSES]
    gpu.main(["--device", "cpu", "--quick", "--only", *parts])
    figures = json.loads((folder / "gpu.json").read_text())["figures"]
    assert list(figures) == [name for name in gpu.PARTS if name in parts]
    return figures


def test_it_runs(tmp_path, monkeypatch):
    figures = figures_of(monkeypatch, tmp_path, None)
    assert not [value for value in figures.values() if "FAILED" in str(value)]
    assert figures["agreement"] == {"float32": 0.0}
    assert figures["memory_after_fits"] == "SKIPPED: needs CUDA"


@pytest.mark.slow  # it trains a ResNet, and starts processes
def test_the_long_parts_run(tmp_path, monkeypatch):
    figures = figures_of(monkeypatch, tmp_path, sorted(IN_OTHER_PROCESSES))
    assert not [value for value in figures.values() if "FAILED" in str(value)]
    assert figures["opened_on_a_cpu"] == {"saved": 0.0, "pickled": 0.0}
