"""Print the figures of the package's layout; tests/test_house.py holds their limits.

python docs/benchmarks/house.py
"""

import ast
import inspect
import io
import re
import sys
import tempfile
import threading
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sktransfer"
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
FOREIGN = ("sklearn", "torch", "torchvision")
NOT_CODE = {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER"}
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def tree_of(path):
    return ast.parse(path.read_text())


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def n_lines(path):
    return len(path.read_text().splitlines())


def n_code_lines(path):
    """Lines without blanks, comments and docstrings."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if tokenize.tok_name[token.type] not in NOT_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (*DEFINITIONS, ast.Module)) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def has_definitions(path):
    return any(isinstance(node, DEFINITIONS) for node in ast.walk(tree_of(path)))


def function_lengths(path):
    """(lines of the body without its docstring, name) of each function."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, DEFINITIONS[:2]):
            body = node.body[ast.get_docstring(node) is not None :]
            if body:
                yield body[-1].end_lineno - body[0].lineno + 1, node.name


def n_any(path):
    return len(re.findall(r"\bAny\b", path.read_text()))


def imported_names(path):
    """The dotted names that a file imports."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)


def private_foreign_names(path):
    """Private names of scikit-learn, torch and torchvision that a file uses."""
    names = set(imported_names(path))
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute):
            names.add(re.sub(r"^nn\.", "torch.nn.", ast.unparse(node)))
    return sorted(
        name
        for name in names
        if name.split(".")[0] in FOREIGN and any(map(is_private, name.split(".")))
    )


def n_private_imports(path):
    """Statements of a test that import private modules of the package."""
    count = 0
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        count += any(
            name.startswith("sktransfer.") and any(map(is_private, name.split(".")))
            for name in names
        )
    return count


def n_parameters(cls):
    return len(inspect.signature(cls).parameters)


def files_entered(call):
    """How many files of the package a call enters, in all threads."""
    import sktransfer

    seen, folder = set(), str(Path(sktransfer.__file__).parent)

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(folder):
            seen.add(frame.f_code.co_filename)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return len(seen)


def main():
    import numpy as np
    from PIL import Image

    from sktransfer import FineTuningClassifier, PretrainedFeatureExtractor

    print("lines:", sum(map(n_lines, FILES)), "of code:", sum(map(n_code_lines, FILES)))
    print("files with a function or class:", sum(map(has_definitions, FILES)))
    print("longest file:", max((n_lines(path), path.name) for path in FILES))
    print("longest function:", max(found for path in FILES for found in function_lengths(path)))
    print("Any:", sum(map(n_any, FILES)))
    for path in FILES:
        if path.name != "_validation.py" and (names := private_foreign_names(path)):
            print("private names of others:", path.name, names)
    print("tests import private modules:", sum(map(n_private_imports, TESTS)))
    print("longest test file:", max((n_lines(path), path.name) for path in TESTS))
    for cls in (FineTuningClassifier, PretrainedFeatureExtractor):
        print(f"parameters of {cls.__name__}:", n_parameters(cls))
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        paths = [f"{folder}/{i}.jpg" for i in range(24)]
        for path in paths:
            Image.fromarray(rng.integers(0, 255, (90, 90, 3), dtype=np.uint8)).save(path)
        y, options = np.arange(24) % 2, {"unfreeze": 1, "max_epochs": 1, "random_state": 0}
        extractor = PretrainedFeatureExtractor(memory=False).fit(paths)
        extractor.transform(paths[:12])
        FineTuningClassifier(**options).fit(paths, y)
        entered = files_entered(lambda: extractor.transform(paths[12:]))
        print("files entered by transform:", entered)
        entered = files_entered(lambda: FineTuningClassifier(**options).fit(paths, 1 - y))
        print("files entered by fit(unfreeze=1):", entered)


if __name__ == "__main__":
    main()
