"""Images to columns by a network of transformers, against transformers' own loop.

    python docs/benchmarks/hf_image_speed.py [--images 32] [--rounds 3]

A ViT-base with random weights on two threads, JPEG files of 500×375 pixels. The peer is what its
model cards show: AutoImageProcessor on a batch of opened images, then AutoModel, in batches of 8.
Runs alternate; the ratios are medians over rounds, of seconds and of the process's seconds of CPU.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers
from _report import save, timed, write_jpegs
from PIL import Image

from sktransfer import PretrainedFeatureExtractor

PEER = "transformers"


def write_network(folder):
    torch.manual_seed(0)
    transformers.ViTModel(transformers.ViTConfig()).save_pretrained(folder)
    transformers.ViTImageProcessor().save_pretrained(folder)


class Loop:
    """What transformers' users write."""

    def __init__(self, folder):
        self.processor = transformers.AutoImageProcessor.from_pretrained(folder)
        self.model = transformers.AutoModel.from_pretrained(folder).eval()

    @torch.inference_mode()
    def __call__(self, paths):
        rows = []
        for start in range(0, len(paths), 8):
            images = [Image.open(path).convert("RGB") for path in paths[start : start + 8]]
            inputs = self.processor(images=images, return_tensors="pt")
            rows.append(self.model(**inputs).pooler_output)
        return torch.cat(rows).numpy()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "vit"
        write_network(folder)
        paths = write_jpegs(Path(place), options.images)

        def extract(paths, **settings):
            extractor = PretrainedFeatureExtractor(f"hf:{folder}", memory=False, **settings)
            return extractor.fit_transform(paths)

        loop = Loop(folder)
        ways = {
            PEER: lambda: loop(paths),
            "float32": lambda: extract(paths),
            "bfloat16": lambda: extract(paths, precision="bfloat16"),
        }
        loop(paths[:2])
        for precision in ("float32", "bfloat16"):
            extract(paths[:2], precision=precision)
        rounds = [{name: timed(way) for name, way in ways.items()} for _ in range(options.rounds)]
    figures = {"options": vars(options)}
    for name in ways:
        seconds, busy = (np.median([r[PEER][k] / r[name][k] for r in rounds]) for k in (0, 1))
        expected = rounds[0][PEER][2]
        figures[name] = {
            "images_per_second": len(paths) / np.median([r[name][0] for r in rounds]),
            "times_as_fast": seconds,
            "times_as_fast_by_cpu": busy,
            "largest_difference": np.abs(rounds[0][name][2] - expected).max(),
            "largest_value": np.abs(expected).max(),
        }
        print(name, figures[name], flush=True)
    save("hf_image_speed", figures)


if __name__ == "__main__":
    main()
