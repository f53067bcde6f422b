"""Only the pages' examples are tests here; the benchmark scripts are run by hand."""

collect_ignore_glob = ["*.py", "**/*.py"]
