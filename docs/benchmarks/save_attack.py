"""Damage and forge files of ``save``: what loads, with what prediction, memory and side effects.

    python docs/benchmarks/save_attack.py [--mutations 500]

Three models (a pipeline, a fine-tuned stage, an own module) are saved standalone. Mutated files
keep the old digest: bits flipped, bytes changed, cut out, added, entries of the header edited.
Forged files have an edited header or edited classical steps, and the right digest.
"""

import argparse
import hashlib
import io
import json
import sys
import tempfile
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from torch import nn

from sktransfer import FineTuningClassifier, PretrainedFeatureExtractor, load, save

ODD = [
    None, -1, 0, 1.5, 10**30, "x", "", [], {}, True, np.nan, [1, [2]], 2**62, "<U9999", [2**40],
    "/etc/passwd", "../x.pt", "timm:hf-hub:a/b", "timm:local-dir:/tmp", "timm:test_vit",
    json.loads("[" * 700 + "]" * 700),
    {"__kind__": "array", "dtype": "<U99999", "shape": [10**5], "at": "values/0"},
    {"__kind__": "array", "dtype": "O", "shape": [10**9, 0], "items": []},
    {"__kind__": "array", "dtype": "<f8", "shape": [10**12], "at": "skops"},
    {"__kind__": "tensor", "at": "skops"}, {"__kind__": "dict", "items": [[[], 2]]},
    {"__kind__": "object", "of": "os", "name": "system", "how": "made", "arguments": {}},
    {"__kind__": "object", "of": "torch.nn", "name": "Linear", "how": "made",
     "arguments": {"__kind__": "dict", "items": [["in_features", 10**6], ["bias", False]]}},
]  # fmt: skip
# What a load must not do, as Python's audit events.
FORBIDDEN = (
    "socket.connect",
    "socket.getaddrinfo",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.fork",
)
FORBIDDEN += ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "shutil.", "pickle.find_class")


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.stage = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU())
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.stage(x).mean((2, 3)))


def parts_of(data):
    """Return the text of the header and the tensors of a file's bytes."""
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(data)
        with safe_open(file.name, framework="pt") as opened:
            metadata = opened.metadata()
        return metadata, load_file(file.name)


def digest_of(text, tensors):
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def edited_header(text, rng):
    """The header with one entry set to something odd."""
    header = json.loads(text)
    places = list(_places(header))
    container, key = places[rng.integers(len(places))]
    container[key] = ODD[rng.integers(len(ODD))]
    return json.dumps(header)


def _places(value):
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def mutated(data, rng):
    """Change a file's bytes; the digest in it stays."""
    kind = rng.integers(8)
    changed = bytearray(data)
    # Half of the places are in the first bytes, where the headers are.
    end = len(data) if rng.random() < 0.5 else min(len(data), 20_000)
    at, n = int(rng.integers(end)), int(rng.integers(1, 64))
    if kind == 0:
        changed[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        for place in rng.integers(end, size=8):
            changed[place] ^= 1 << int(rng.integers(8))
    elif kind == 2:
        changed[at : at + n] = rng.bytes(len(changed[at : at + n]))
    elif kind == 3:
        changed[at : at + n] = b""
    elif kind == 4:
        changed[at:at] = rng.bytes(n)
    elif kind == 5:
        del changed[at:]
    else:
        metadata, tensors = parts_of(data)
        if kind == 6:
            metadata["sktransfer"] = edited_header(metadata["sktransfer"], rng)
        else:
            name = sorted(tensors)[rng.integers(len(tensors))]
            other = tensors[name].clone().reshape(-1)
            other[rng.integers(len(other))] += 1
            tensors[name] = other.reshape(tensors[name].shape)
        return to_bytes(tensors, metadata)
    return bytes(changed)


def forged(data, rng):
    """Change the header or the classical steps of a file, and set the digest right."""
    metadata, tensors = parts_of(data)
    if "skops" in tensors and rng.random() < 0.5:
        tensors["skops"] = _edited_steps(tensors["skops"], rng)
    else:
        metadata["sktransfer"] = edited_header(metadata["sktransfer"], rng)
    metadata["sha256"] = digest_of(metadata["sktransfer"], tensors)
    return to_bytes(tensors, metadata)


def _edited_steps(skops, rng):
    source, target = io.BytesIO(skops.numpy().tobytes()), io.BytesIO()
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(target, "w") as after:
        for name in before.namelist():
            content = before.read(name)
            if name == "schema.json":
                content = edited_header(content, rng)
            after.writestr(name, content)
    return torch.frombuffer(bytearray(target.getvalue()), dtype=torch.uint8)


class Watch:
    """Notes what a call writes, starts or connects to."""

    def __init__(self):
        self.is_on, self.seen = False, []
        sys.addaudithook(self._note)

    def _note(self, event, arguments):
        if not self.is_on:
            return
        if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            self.seen.append((event, str(arguments[0])))
        elif event.startswith(FORBIDDEN):
            self.seen.append((event, str(arguments)[:80]))

    def call(self, function, *args, **kwargs):
        self.is_on = True
        try:
            return function(*args, **kwargs)
        finally:
            self.is_on = False


def outcome(path, watch, predict, expected, arguments):
    """``"refused"``, ``"same"``, ``"other"`` or the name of an error that is not ours."""
    try:
        loaded = watch.call(load, path, **arguments)
    except (ValueError, OSError):
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    try:
        return "same" if np.array_equal(predict(loaded), expected) else "other"
    except Exception:
        return "other"


def peak_growth(call):
    """Growth of the resident memory at its highest, in MB; 0 where Linux does not count it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        call()
        return _resident("VmHWM") - before
    except OSError:
        call()
        return 0.0


def _resident(name):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) / 1024


def models():
    """Name -> fitted model, and the arguments that `load` needs."""
    X = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    y = np.array(["a", "b", "c"] * 4)
    pipeline = make_pipeline(PretrainedFeatureExtractor(), LogisticRegression())
    tuned = FineTuningClassifier(unfreeze=1, max_epochs=1, random_state=0)
    torch.manual_seed(0)
    settings = {"size": 32, "crop": 32}
    own = make_pipeline(
        PretrainedFeatureExtractor(Small(), preprocessing=settings), LogisticRegression()
    )
    yield "pipeline", pipeline.fit(X, y), {}, X
    yield "fine-tuned", tuned.fit(X, y), {}, X
    yield "own module", own.fit(X, y), {"backbone": Small()}, X


def attack(path, change, n, watch, arguments, X):
    """Change a file `n` times; count the outcomes and take the highest growth of the memory."""
    data, rng, counts, peak = path.read_bytes(), np.random.default_rng(0), {}, 0.0
    expected = load(path, **arguments).predict_proba(X)
    for _ in range(n):
        path.write_bytes(change(data, rng))
        found = []

        def call(found=found):
            predict = lambda model: model.predict_proba(X)  # noqa: E731
            found.append(outcome(path, watch, predict, expected, arguments))

        peak = max(peak, peak_growth(call))
        counts[found[0]] = counts.get(found[0], 0) + 1
    path.write_bytes(data)
    return counts, peak


def main():
    from _report import save as report

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=500)
    n = -(-parser.parse_args().mutations // 3)
    watch, figures = Watch(), {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        for name, model, arguments, X in models():
            save(model, path, standalone=True)
            growth = max(peak_growth(partial(load, path, **arguments)) for _ in range(3))
            for change in (mutated, forged):
                counts, peak = attack(path, change, n, watch, arguments, X)
                figures[f"{name}, {change.__name__}"] = {
                    "outcomes": counts,
                    "peak_mb": peak,
                    "peak_mb_unchanged": growth,
                    "ratio": peak / growth if growth > 1 else None,  # less is noise
                }
                print(name, change.__name__, figures[f"{name}, {change.__name__}"])
    figures["written_or_reached"] = watch.seen
    print("written or reached:", watch.seen)
    report("save_attack", figures)


if __name__ == "__main__":
    main()
