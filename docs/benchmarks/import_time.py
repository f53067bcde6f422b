"""What ``import sktransfer`` adds to ``import sklearn.base``.

python docs/benchmarks/import_time.py
"""

import statistics
import subprocess
import sys

from _report import save

CODE = """
import time
import sklearn.base
start = time.perf_counter()
import {module}
print(time.perf_counter() - start)
"""


def seconds(module):
    command = [sys.executable, "-c", CODE.format(module=module)]
    runs = [
        float(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(7)
    ]
    return statistics.median(runs)


if __name__ == "__main__":
    ours, torch = seconds("sktransfer"), seconds("torch")
    print(f"sktransfer adds {ours * 1e3:.1f} ms, torch {torch * 1e3:.0f} ms: 1/{torch / ours:.0f}")
    save("import_time", {"sktransfer_s": ours, "torch_s": torch, "ratio": ours / torch})
