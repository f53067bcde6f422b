"""Four small images, as an array, in a folder, and on a web server."""

import functools
import http.server
import threading

import numpy as np
import pytest
from image_forms import H, N, W
from PIL import Image


@pytest.fixture(scope="module")
def stack():
    return np.random.default_rng(0).integers(0, 256, (N, H, W, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(stack, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures with space")
    for i, picture in enumerate(stack):
        Image.fromarray(picture).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def server(folder):
    """The address of a local HTTP server of the folder; `hits` counts its requests."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            hits.append(self.command)

    hits = []
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        httpd.hits = hits
        httpd.url = f"http://127.0.0.1:{httpd.server_address[1]}"
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield httpd
        httpd.shutdown()
        thread.join()
