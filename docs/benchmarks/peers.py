"""The same network, weights and images, side by side: embetter, img2vec, a loop, skorch, and ours.

    pip install "embetter[vision]" img2vec_pytorch
    python docs/benchmarks/peers.py [--images 192] [--search-images 24] [--rounds 2]

ResNet-18 with random weights, the same for all (seed 0), from 500×375 JPEG files; peers that are
not installed are left out. Each round runs every contender once, each in a process of its own
so that its peak memory is its own; the ratio is to ours in the same round, its median is quoted.
The search is 5 folds × 10 candidates of logistic regression behind the network, in a pipeline,
with 51 fits for each; the rows of a peer without a transformer come through
`FunctionTransformer`. Every contender gets what it recommends: its own preprocessing, torch's
default threads. How far a peer's rows are from the loop's is printed: preprocessing differs.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _report import save, write_jpegs


def peak_bytes():
    """The largest resident size of this process since it started."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def the_network(weights):
    import torch
    import torchvision

    model = torchvision.models.resnet18(weights=None)
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model


def headless(weights):
    import torch

    model = the_network(weights)
    model.fc = torch.nn.Identity()
    return model.eval()


def preset():
    import torchvision

    return torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()


# Each returns what turns a list of paths into rows, as a transformer.
def ours(weights):
    from sktransfer import PretrainedFeatureExtractor

    return PretrainedFeatureExtractor("resnet18", weights=weights)


def plain_loop(weights):
    import torch
    from PIL import Image
    from sklearn.preprocessing import FunctionTransformer

    model, prepare = headless(weights), preset()

    def embed(paths):
        rows = []
        with torch.inference_mode():
            for start in range(0, len(paths), 32):
                images = [prepare(Image.open(p).convert("RGB")) for p in paths[start : start + 32]]
                rows.append(model(torch.stack(images)))
        return torch.cat(rows).numpy()

    return FunctionTransformer(embed)


def with_skorch(weights):
    import torch
    from PIL import Image
    from sklearn.preprocessing import FunctionTransformer
    from skorch import NeuralNet

    prepare = preset()

    class Files(torch.utils.data.Dataset):
        def __init__(self, paths):
            self.paths = paths

        def __len__(self):
            return len(self.paths)

        def __getitem__(self, i):
            return prepare(Image.open(self.paths[i]).convert("RGB")), 0

    net = NeuralNet(headless(weights), torch.nn.MSELoss, batch_size=32).initialize()
    return FunctionTransformer(lambda paths: net.predict(Files(paths)))


def with_embetter(weights):
    import timm
    from sklearn.pipeline import make_pipeline

    create = timm.create_model

    def without_download(name, pretrained=False, **keywords):
        import torch

        model = create(name, pretrained=False, **keywords)
        state = torch.load(weights, weights_only=True)
        state = {key: value for key, value in state.items() if not key.startswith("fc.")}
        model.load_state_dict(state, strict=True)
        # TimmEncoder never calls eval(): done for it here, so that rows can be compared.
        return model.eval()

    timm.create_model = without_download
    from embetter.vision import ImageLoader, TimmEncoder

    return make_pipeline(ImageLoader(), TimmEncoder("resnet18.tv_in1k"))


def with_img2vec(weights):
    from unittest import mock

    import torch
    from PIL import Image
    from sklearn.preprocessing import FunctionTransformer

    state = torch.load(weights, weights_only=True)
    with mock.patch("torchvision.models._api.WeightsEnum.get_state_dict", return_value=state):
        from img2vec_pytorch import Img2Vec

        encoder = Img2Vec(model="resnet18")

    def embed(paths):
        rows = []
        for start in range(0, len(paths), 32):
            images = [Image.open(p).convert("RGB") for p in paths[start : start + 32]]
            rows.append(encoder.get_vec(images))
        return np.concatenate(rows)

    return FunctionTransformer(embed)


CONTENDERS = {
    "sktransfer": (ours, "sktransfer"),
    "plain loop": (plain_loop, "torchvision"),
    "skorch": (with_skorch, "skorch"),
    "embetter": (with_embetter, "embetter"),
    "img2vec_pytorch": (with_img2vec, "img2vec_pytorch"),
}


def run_alone(name, folder, n_search):
    """Measure one contender in this process and print the figures as JSON."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline

    folder = Path(folder)
    paths = sorted(str(path) for path in folder.glob("*.jpg"))
    transformer = CONTENDERS[name][0](str(folder / "resnet18.pt"))
    before = peak_bytes()
    transformer.fit_transform(paths[:32])
    start = time.perf_counter()
    rows = transformer.fit_transform(paths[32:])
    took = time.perf_counter() - start
    np.save(folder / f"{name}.npy", rows)
    peak = peak_bytes()

    X, y = paths[32 : 32 + n_search], np.arange(n_search) % 2
    if name == "sktransfer":  # so that nothing of the pass above is found in the store
        from sktransfer import embedding_store

        embedding_store().clear()
    model = make_pipeline(transformer, LogisticRegression(max_iter=2000))
    search = GridSearchCV(model, {"logisticregression__C": np.logspace(-4, 0, 10)}, cv=5)
    start = time.perf_counter()
    search.fit(X, y)
    figures = {
        "images_per_s": len(rows) / took,
        "peak_MiB": peak / 2**20,
        "peak_above_the_loaded_network_MiB": (peak - before) / 2**20,
        "search_s": time.perf_counter() - start,
    }
    print(json.dumps(figures))


def measure(name, folder, n_search):
    script = [sys.executable, __file__, "--alone", name, str(folder)]
    script += ["--search-images", str(n_search)]
    run = subprocess.run(script, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{name} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def compare(folder, names, n_search, rounds):
    runs = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            runs[name].append(measure(name, folder, n_search))
    expected = np.load(folder / "plain loop.npy")
    figures = {}
    for name, results in runs.items():
        line = {key: statistics.median(r[key] for r in results) for key in results[0]}
        pairs = list(zip(results, runs["sktransfer"], strict=True))
        line["ours_times_faster"] = statistics.median(
            o["images_per_s"] / r["images_per_s"] for r, o in pairs
        )
        line["our_search_times_faster"] = statistics.median(
            r["search_s"] / o["search_s"] for r, o in pairs
        )
        rows = np.load(folder / f"{name}.npy")
        line["relative_distance_from_the_loop"] = float(
            np.linalg.norm(rows - expected) / np.linalg.norm(expected)
        )
        figures[name] = line
        print(
            f"{name:>16}: " + ", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in line.items())
        )
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--search-images", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--alone", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        run_alone(*options.alone, options.search_images)
        return
    import torch
    import torchvision

    names = [n for n, (_, module) in CONTENDERS.items() if importlib.util.find_spec(module)]
    print("not installed:", sorted(set(CONTENDERS) - set(names)) or "none")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_jpegs(folder, 32 + max(options.images, options.search_images))
        torch.manual_seed(0)
        torch.save(torchvision.models.resnet18(weights=None).state_dict(), folder / "resnet18.pt")
        time.sleep(2.5)  # so that the files' times are settled
        figures = compare(folder, names, options.search_images, options.rounds)
    save("peers", {"n_images": options.images, "n_search": options.search_images, **figures})


if __name__ == "__main__":
    main()
