"""The service of examples/serve: a real server process and real uploads."""

import io
import os
import runpy
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sktransfer import load

requests = pytest.importorskip("requests")
pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
pytest.importorskip("python_multipart")
pytest.importorskip("skops")

FOLDER = Path(__file__).parents[1] / "examples" / "serve"
MAX_BYTES = 200_000


def encoded(picture, format="png"):
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format)
    return stream.getvalue()


@pytest.fixture(scope="module")
def model_file(pictures, tmp_path_factory):
    """What train.py writes for a folder of images in three classes."""
    if not FOLDER.exists():
        pytest.skip("the examples are not here")
    folder = tmp_path_factory.mktemp("serve")
    for i, picture in enumerate(pictures):
        path = folder / "images" / "abc"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture))
    path = folder / "model.sktransfer"
    runpy.run_path(str(FOLDER / "train.py"))["train"](folder / "images", path)
    return path


@pytest.fixture(scope="module")
def server(model_file):
    """The address of a server process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "app:app", "--app-dir", FOLDER, "--port", str(port)]
    settings = {"MODEL": str(model_file), "MAX_BYTES": str(MAX_BYTES), "OMP_NUM_THREADS": "1"}
    log = model_file.with_name("log")
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env=os.environ | settings, stdout=stream, stderr=stream)
    try:
        yield wait_for(f"http://127.0.0.1:{port}", process, log)
    finally:
        process.terminate()
        process.wait()


def wait_for(address, process, log, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            assert requests.get(f"{address}/health", timeout=5).json() == {"status": "ok"}
            return address
        except requests.ConnectionError:
            time.sleep(0.1)
    pytest.fail(f"The server did not start: {log.read_text()}")


def post(server, content, **options):
    return requests.post(f"{server}/predict", files={"image": content}, timeout=60, **options)


@pytest.mark.parametrize("format", ["png", "jpeg"])
def test_labels_and_probabilities(server, model_file, pictures, format):
    content = encoded(pictures[0], format)
    answer = post(server, content)
    assert answer.status_code == 200
    (expected,) = load(model_file).predict_proba([content])
    probabilities = answer.json()["probabilities"]
    assert list(probabilities) == ["a", "b", "c"]
    np.testing.assert_allclose(list(probabilities.values()), expected, atol=1e-6)
    assert answer.json()["label"] == "abc"[expected.argmax()]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no image", "does not know its file format"),
        (b"", "it is empty"),
        (b"/etc/passwd", "does not know its file format"),
        ("half", "the image file cannot be"),
    ],
    ids=["text", "empty", "path", "half"],
)
def test_what_is_no_image_is_refused(server, pictures, content, message):
    if content == "half":
        content = encoded(pictures[0], "jpeg")[:500]
    answer = post(server, content)
    assert answer.status_code == 422
    assert message in answer.json()["detail"]


def test_a_request_without_a_file_is_refused(server):
    assert requests.post(f"{server}/predict", timeout=60).status_code == 422


def test_a_large_upload_is_refused(server):
    answer = post(server, b"x" * (2 * MAX_BYTES))
    assert answer.status_code == 413
    assert answer.json() == {"detail": f"The upload has more than {MAX_BYTES} bytes."}


def test_an_upload_of_unknown_length_is_refused_where_it_becomes_too_large(server):
    """The body comes in chunks, without a Content-Length."""
    body = requests.Request("POST", server, files={"image": b"x" * (2 * MAX_BYTES)}).prepare()
    chunks = (body.body[k : k + 10_000] for k in range(0, len(body.body), 10_000))
    headers = {"Content-Type": body.headers["Content-Type"]}
    answer = requests.post(f"{server}/predict", data=chunks, headers=headers, timeout=60)
    assert "Content-Length" not in answer.request.headers
    assert answer.status_code == 413


def test_eight_clients_at_once(server, model_file, pictures):
    contents = [encoded(picture) for picture in pictures] * 2
    expected = load(model_file).predict_proba(contents)
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda content: post(server, content), contents))
    assert {answer.status_code for answer in answers} == {200}
    got = [list(answer.json()["probabilities"].values()) for answer in answers]
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert requests.get(f"{server}/health", timeout=60).status_code == 200
