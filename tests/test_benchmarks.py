"""The benchmarks say where they look for data."""

import sys
from pathlib import Path

import pytest


def test_missing_data_are_an_error_that_names_the_variable(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "docs" / "benchmarks")
    import builtin_transfer

    monkeypatch.setattr(sys.modules["_report"], "DATA", tmp_path)
    with pytest.raises(FileNotFoundError, match="SKTRANSFER_DATA"):
        builtin_transfer.load_set("flowers5")
