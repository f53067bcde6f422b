"""compile=True: the same rows, from machine code where there is a compiler."""

import pickle
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from sklearn.base import clone

from sktransfer import PretrainedFeatureExtractor, load, save
from sktransfer.networks._inference import clear_networks

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="torch.compile needs a C++ compiler",
)


class Tiny(torch.nn.Sequential):
    """A network that is compiled in seconds."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(
            torch.nn.Conv2d(3, 8, 4, stride=4),
            torch.nn.BatchNorm2d(8),
            torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
        )


@pytest.fixture(autouse=True)
def _networks_of_its_own():
    """What one test made ``torch.compile`` do is not found by the next."""
    clear_networks()
    yield
    clear_networks()


@pytest.fixture
def pictures():
    return np.random.default_rng(0).integers(0, 256, (21, 32, 32, 3), dtype=np.uint8)


def tiny(**parameters):
    parameters = {"memory": False, "n_jobs": 1, **parameters}
    return PretrainedFeatureExtractor(
        Tiny(), preprocessing={"size": 32, "crop": 32}, batch_size=8, **parameters
    )


@pytest.fixture
def failing(monkeypatch):
    """Make of ``torch.compile`` what it is without a C++ compiler: failing at the first call."""
    n_calls = []

    def compile(network):
        def run(batch):
            n_calls.append(len(batch))
            raise RuntimeError("No working C++ compiler found in config.cpp.cxx\nSet TORCH_LOGS")

        return run

    monkeypatch.setattr(torch, "compile", compile)
    return n_calls


@needs_compiler
def test_compiled_rows_are_the_same_rows(pictures):
    expected = tiny().fit_transform(pictures)
    extractor = tiny(compile=True).fit(pictures)
    torch._dynamo.utils.counters.clear()
    # The last of three batches is smaller; one image; another number of images.
    for X in (pictures, pictures[:1], pictures[:3]):
        np.testing.assert_allclose(extractor.transform(X), expected[: len(X)], atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # compiled once for all

    copied = pickle.loads(pickle.dumps(extractor))
    for other in (copied, clone(extractor).fit(pictures)):
        assert other.compile is True
        np.testing.assert_allclose(other.transform(pictures), expected, atol=1e-4)


def test_without_a_compiler_the_network_runs_as_it_is(pictures, failing):
    expected = tiny().fit_transform(pictures)
    extractor = tiny(compile=True).fit(pictures)
    with pytest.warns(UserWarning, match=r"RuntimeError: No working C\+\+ compiler.*going on"):
        rows = extractor.transform(pictures)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(extractor.transform(pictures), expected)  # not warned again
    assert failing == [8]


def test_the_networks_own_errors_are_not_the_compilers(failing):
    from sktransfer.networks._compiling import CompiledNetwork

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        CompiledNetwork(torch.nn.Linear(3, 2))(torch.zeros(2, 5))


def test_running_out_of_memory_is_left_to_who_halves_the_batch(pictures, monkeypatch):
    def compile(network):
        def run(batch):
            if len(batch) > 4:
                raise torch.OutOfMemoryError("out of memory")
            return network(batch)

        return run

    expected = tiny().fit_transform(pictures)
    monkeypatch.setattr(torch, "compile", compile)
    with pytest.warns(UserWarning, match="Out of memory with 8 images at once"):
        rows = tiny(compile=True).fit_transform(pictures)
    np.testing.assert_allclose(rows, expected, atol=1e-5)


def test_one_thread_compiles_and_the_others_wait(monkeypatch):
    from sktransfer.networks._compiling import CompiledNetwork

    events = []

    def compile(network):
        def run(batch):
            events.append("begun")
            time.sleep(0.05 if len(events) == 1 else 0)
            events.append("ended")
            return network(batch)

        return run

    monkeypatch.setattr(torch, "compile", compile)
    network = CompiledNetwork(lambda batch: [batch])
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(network, [torch.zeros(2, 3)] * 4))
    assert events[:2] == ["begun", "ended"]
    assert len(events) == 8


def test_compiled_and_plain_share_the_rows_kept(pictures, failing):
    from sktransfer.store._store import MemoryStore

    store = MemoryStore()
    expected = tiny(memory=store).fit_transform(pictures)
    np.testing.assert_array_equal(
        tiny(memory=store, compile=True).fit_transform(pictures), expected
    )
    assert failing == []


def test_saved_and_loaded(tmp_path):
    X = [np.full((16, 16, 3), 100, np.uint8)]
    save(PretrainedFeatureExtractor(compile=True).fit(X), tmp_path / "extractor.safetensors")
    assert load(tmp_path / "extractor.safetensors").compile is True
