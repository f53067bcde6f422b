"""Threads, several callers and interruptions: the traps of n_jobs."""

import io
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from PIL import Image
from seen_pictures import SeenPictures

from sktransfer import PretrainedFeatureExtractor, embedding_store

N_CORES = joblib.cpu_count()


@pytest.fixture
def many_pictures():
    """Forty-eight small pictures, each different."""
    return np.random.default_rng(0).integers(0, 256, (48, 40, 48, 3), dtype=np.uint8)


@pytest.fixture
def numbered(many_pictures):
    many_pictures[:, 0, 0, 0] = np.arange(len(many_pictures))
    return many_pictures


class ThreadsOf:
    """Preprocessing that notes which thread it runs in and how many torch threads that has."""

    fingerprint = "threads of"

    def __init__(self):
        self.found = {}

    def __deepcopy__(self, memo):
        return self  # the test's own

    def __call__(self, picture):
        self.found[threading.get_ident()] = torch.get_num_threads()
        return np.moveaxis(picture[:32, :32], -1, 0).astype(np.float32) / 255


def n_threads_at_work(pictures, n_jobs=None):
    threads = ThreadsOf()
    extractor = PretrainedFeatureExtractor(preprocessing=threads, memory=False, n_jobs=n_jobs)
    extractor.fit(pictures)
    threads.found.clear()  # of finding out the input's size, in this thread
    extractor.transform(pictures)
    threads.found.pop(threading.get_ident(), None)
    return sum(threads.found.values())


def test_no_more_threads_than_cores(many_pictures):
    assert n_threads_at_work(many_pictures) <= torch.get_num_threads()
    assert n_threads_at_work(many_pictures, n_jobs=1) == 1
    assert n_threads_at_work(many_pictures, n_jobs=3) <= 3


def test_no_more_threads_than_cores_in_joblib_workers(many_pictures, monkeypatch):
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    with joblib.parallel_config("loky", n_jobs=2):
        counts = joblib.Parallel()(
            joblib.delayed(n_threads_at_work)(many_pictures) for _ in range(2)
        )
    assert all(count * 2 <= max(2, N_CORES) for count in counts)


def test_the_callers_torch_threads_are_left_alone(numbered):
    def of_new_thread():
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        extractor = PretrainedFeatureExtractor(memory=False).fit(numbered)
        extractor.transform(numbered)
        assert torch.get_num_threads() == of_new_thread() == 3

        failing = PretrainedFeatureExtractor(preprocessing=FailsAt(5), memory=False)
        with pytest.raises(RuntimeError, match="picture 5"):
            failing.fit(numbered).transform(numbered)
        assert torch.get_num_threads() == of_new_thread() == 3

        with ThreadPoolExecutor(4) as pool:  # several calls at once end in any order
            list(pool.map(extractor.transform, [numbered[i::4] for i in range(4)]))
        assert torch.get_num_threads() == of_new_thread() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("batch_size", ["auto", 32])
def test_workers_share_out_the_last_batches(batch_size, sizes_of_batches):
    """They shrink towards the end, so that nobody waits long for the others' last one."""
    X = np.random.default_rng(0).integers(0, 256, (150, 20, 20, 3), dtype=np.uint8)
    X[99] = X[100] = X[101] = X[3]  # what is known already is in no batch
    sizes = sizes_of_batches
    extractor = PretrainedFeatureExtractor(batch_size=batch_size, n_jobs=2, memory=False)
    rows = extractor.fit_transform(X)
    assert sum(sizes) == 147
    assert sorted(sizes)[::-1] == (
        [32, 30, 22, 17, 13, 9, 8, 8, 8] if batch_size == "auto" else [32] * 4 + [19]
    )
    np.testing.assert_array_equal(rows[99:102], rows[[3, 3, 3]])


@pytest.mark.parametrize(("side", "largest"), [(64, 32), (112, 32), (160, 15), (224, 8), (640, 4)])
def test_large_pictures_come_in_small_batches(side, largest, sizes_of_batches):
    X = np.random.default_rng(0).integers(0, 256, (40, 20, 20, 3), dtype=np.uint8)
    sizes = sizes_of_batches
    options = {"preprocessing": {"size": side, "crop": side}, "n_jobs": 1, "memory": False}
    for batch_size, expected in (("auto", largest), (24, 24)):
        sizes.clear()
        PretrainedFeatureExtractor(batch_size=batch_size, **options).fit(X).transform(X)
        assert max(sizes) == expected
        assert sum(sizes) == len(X)


def test_known_files_start_no_thread(tmp_path, monkeypatch):
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for i, path in enumerate(paths):
        Image.fromarray(np.full((40, 40, 3), 40 * i, np.uint8)).save(path)
        os.utime(path, (1e9, 1e9))
    extractor = PretrainedFeatureExtractor(memory=tmp_path / "store").fit(paths)
    expected = extractor.transform(paths)
    monkeypatch.setattr(threading.Thread, "start", None)
    np.testing.assert_array_equal(extractor.transform(paths), expected)


@pytest.mark.parametrize("memory", [None, False, "disk"])
def test_threads_that_share_an_extractor(many_pictures, memory, tmp_path):
    memory = tmp_path if memory == "disk" else memory
    expected = PretrainedFeatureExtractor(memory=False).fit_transform(many_pictures)
    extractor = PretrainedFeatureExtractor(memory=memory, batch_size=4).fit(many_pictures)
    rng = np.random.default_rng(0)
    orders = [rng.permutation(len(many_pictures))[:30] for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        results = pool.map(extractor.transform, [many_pictures[order] for order in orders])
        for order, rows in zip(orders, results, strict=True):
            np.testing.assert_allclose(rows, expected[order], rtol=1e-4, atol=1e-4)


def test_threads_that_share_a_store_embed_once(many_pictures, tmp_path):
    seen = SeenPictures(tmp_path)
    extractor = PretrainedFeatureExtractor(preprocessing=seen, batch_size=4).fit(many_pictures)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(extractor.transform, [many_pictures] * 4))
    assert seen.n_seen == len(many_pictures)


def test_callers_do_not_wait_for_each_others_bad_images(many_pictures):
    good, broken = [], []
    for i, picture in enumerate(many_pictures):
        stream = io.BytesIO()
        Image.fromarray(picture).save(stream, "png")
        good.append(stream.getvalue())
        broken.append(stream.getvalue()[: 100 + i])  # found out when it is decoded
    X = [cell for pair in zip(good, broken, strict=True) for cell in pair]
    extractor = PretrainedFeatureExtractor(batch_size=4, on_error="nan").fit(X)
    orders = [X, X[::-1], X[30:] + X[:30]]
    with ThreadPoolExecutor(3) as pool:
        for order, rows in zip(orders, pool.map(extractor.transform, orders), strict=True):
            is_bad = [len(cell) < 300 for cell in order]
            np.testing.assert_array_equal(np.isnan(rows).any(axis=1), is_bad)


def test_processes_that_share_a_store_embed_once(many_pictures, tmp_path):
    seen = SeenPictures(tmp_path)
    extractor = PretrainedFeatureExtractor(
        preprocessing=seen, batch_size=4, memory=tmp_path / "store"
    ).fit(many_pictures)
    calls = (joblib.delayed(extractor.transform)(many_pictures[::step]) for step in (1, -1))
    first, second = joblib.Parallel(n_jobs=2)(calls)
    np.testing.assert_array_equal(first, second[::-1])
    assert seen.n_seen == len(many_pictures)


# -- interruptions ---------------------------------------------------------------------------
INTERRUPTED = """
import signal
import sys
from pathlib import Path
import numpy as np
from PIL import Image
from seen_pictures import SeenPictures
from sktransfer import PretrainedFeatureExtractor, embedding_store

signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup and "&" ignore it
folder, interrupt_at = Path(sys.argv[1]), int(sys.argv[2])
pictures = np.load(folder / "pictures.npy")
seen = SeenPictures(folder, interrupt_at=interrupt_at)
extractor = PretrainedFeatureExtractor(
    preprocessing=seen, memory=folder / "store", batch_size=4, n_jobs=1
)
extractor.fit_transform(pictures)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to oneself")
def test_ctrl_c_keeps_what_was_computed(many_pictures, tmp_path):
    np.save(tmp_path / "pictures.npy", many_pictures)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    run = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path), "30"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode in (-signal.SIGINT, 128 + signal.SIGINT, 1)
    assert "KeyboardInterrupt" in run.stderr
    seen = SeenPictures(tmp_path)
    n_seen = seen.n_seen
    n_kept = embedding_store(tmp_path / "store").info().n_rows
    assert 30 <= n_seen < len(many_pictures)
    assert n_kept >= n_seen - 3 * 4  # what was under way is lost: three batches

    # The same again, in this process: only the rest, and nobody waits for the dead one's locks.
    same = SeenPictures(tmp_path, interrupt_at=30)
    extractor = PretrainedFeatureExtractor(preprocessing=same, memory=tmp_path / "store")
    rows = extractor.fit_transform(many_pictures)
    assert seen.n_seen - n_seen == len(many_pictures) - n_kept
    expected = PretrainedFeatureExtractor(preprocessing=same, memory=False)
    np.testing.assert_allclose(
        rows, expected.fit_transform(many_pictures), rtol=1e-4, atol=1e-4 * np.abs(rows).max()
    )


class Raises(SeenPictures):
    """Raises at the picture of this number."""

    fingerprint = "raises"

    def __init__(self, folder, number, error):
        super().__init__(folder)
        self.number, self.error = number, error

    def __call__(self, picture):
        if self.n_seen >= self.number:
            raise self.error("enough")
        return super().__call__(picture)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_keeps_what_was_computed(many_pictures, error, tmp_path):
    options = {"memory": tmp_path, "batch_size": 4, "n_jobs": 1}
    failing = PretrainedFeatureExtractor(preprocessing=Raises(tmp_path, 30, error), **options)
    with pytest.raises(error, match="enough"):
        failing.fit_transform(many_pictures)
    n_kept = len(embedding_store(tmp_path))
    assert 30 - 3 * 4 <= n_kept < 30
    again = Raises(tmp_path, 1000, error)
    PretrainedFeatureExtractor(preprocessing=again, **options).fit_transform(many_pictures)
    assert again.n_seen - 30 == len(many_pictures) - n_kept


# -- foreign errors ---------------------------------------------------------------------------
class FailsAt:
    """Preprocessing that fails at the picture whose first pixel is ``number``."""

    fingerprint = "fails"

    def __init__(self, number, shape=None):
        self.number, self.shape = number, shape

    def __call__(self, picture):
        pixels = np.moveaxis(picture[:32, :32], -1, 0).astype(np.float32) / 255
        if not (picture == 127).all() and picture[0, 0, 0] == self.number:
            if self.shape is None:
                raise RuntimeError(f"picture {self.number} is not to my taste")
            return np.zeros(self.shape, np.float32)
        return pixels


def notes_of(caught):
    return "\n".join(getattr(caught.value, "__notes__", []))


def test_an_error_in_the_preprocessing_says_for_which_image(numbered):
    extractor = PretrainedFeatureExtractor(preprocessing=FailsAt(5), memory=False)
    with pytest.raises(RuntimeError, match="picture 5") as caught:
        extractor.fit(numbered).transform(numbered)
    assert "row 5" in notes_of(caught)


def test_images_that_come_out_in_two_shapes_are_an_error(numbered):
    # One that numpy would silently spread over the whole row of the batch, too.
    for shape in [(3, 30, 32), (3, 1, 1)]:
        extractor = PretrainedFeatureExtractor(preprocessing=FailsAt(5, shape), memory=False)
        with pytest.raises(ValueError, match=r"row 5[\s\S]*one shape"):
            extractor.fit(numbered).transform(numbered)


class Fussy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.features = torch.nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return refuse(self.features(x)).mean((2, 3))


def refuse(x):
    if x.shape[0] == 3:
        raise RuntimeError("three is an odd number")
    return x


torch.fx.wrap("refuse")


def test_an_error_in_the_network_says_where(many_pictures):
    extractor = PretrainedFeatureExtractor(
        Fussy(), preprocessing={"size": 32, "crop": 32}, batch_size=4, n_jobs=1, memory=False
    ).fit(many_pictures)
    with pytest.raises(RuntimeError, match="odd") as caught:
        extractor.transform(many_pictures[:11])
    notes = notes_of(caught)
    assert "Fussy" in notes
    assert "(3, 3, 32, 32)" in notes
    assert "row 8" in notes
