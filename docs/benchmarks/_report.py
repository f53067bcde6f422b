"""Where a benchmark's figures go: printed, and kept as JSON with the machine they are of."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(os.environ.get("SKTRANSFER_DATA", Path(__file__).parents[3] / "shared"))
RESULTS = Path(__file__).parent / "results"


def data_set(name: str) -> Path:
    """Return the folder of a data set."""
    folder = DATA / "data" / name
    if not folder.exists():
        raise FileNotFoundError(
            f"{folder} does not exist. Set the environment variable SKTRANSFER_DATA to the folder "
            "that holds data/ and weights/."
        )
    return folder


def machine() -> dict[str, Any]:
    """Describe what the figures depend on."""
    import torch

    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = lines[0].split(":")[1].strip() if lines else cpu
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def save(name: str, figures: dict[str, Any]) -> None:
    """Write ``results/NAME.json`` beside the script."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    content = {"machine": machine(), "figures": figures}
    path.write_text(json.dumps(content, indent=1, default=_plain) + "\n")
    print(f"\nwritten: {path.name}")


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value)} has no JSON form")


def timed(function: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds, seconds of CPU in all threads, and the result."""
    start, cpu = time.perf_counter(), time.process_time()
    result = function()
    return time.perf_counter() - start, time.process_time() - cpu, result


def write_jpegs(folder: Path, n_images: int, size: tuple[int, int] = (500, 375)) -> list[str]:
    """Write JPEG files cut from scikit-image's photographs; each file differs."""
    from PIL import Image
    from skimage import data

    pictures = [Image.fromarray(f()) for f in (data.astronaut, data.coffee, data.cat, data.rocket)]
    rng = np.random.default_rng(0)
    paths = []
    for i in range(n_images):
        picture = pictures[i % len(pictures)]
        # A random box of the target's shape, scaled to the target's size.
        scale = rng.uniform(0.6, 1.0) * min(picture.width / size[0], picture.height / size[1])
        w, h = size[0] * scale, size[1] * scale
        x, y = rng.uniform(0, picture.width - w), rng.uniform(0, picture.height - h)
        crop = picture.resize(size, Image.Resampling.BICUBIC, box=(x, y, x + w, y + h))
        path = folder / f"{i:06d}.jpg"
        crop.save(path, quality=90)
        paths.append(str(path))
    return paths
