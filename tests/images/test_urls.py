"""URLs: servers that never end, fall silent or lie give a bad image; archives are listed once."""

import contextlib
import gzip
import http.server
import io
import tarfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

import fsspec
import numpy as np
import pytest
from image_forms import BadImage, as_images, pixels
from PIL import Image

FILES = "sktransfer.images._files"
N_THREADS = 4

# Older versions of fsspec leave the files of their cache open.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def png(value):
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), (value, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by the path's last name."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        self.server.requests.append(self.path)

    def do_HEAD(self):
        self.headers_of(Content_Length=len(self.server.archive), Accept_Ranges="bytes")

    def do_GET(self):
        with contextlib.suppress(ConnectionError):  # the client has heard enough
            getattr(self, PurePosixPath(self.path).name.partition(".")[0])()
        self.close_connection = True

    def headers_of(self, status=200, **headers):
        self.send_response(status)
        self.send_header("Connection", "close")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def send(self, data):
        self.wfile.write(data)
        self.wfile.flush()

    def endless(self):
        self.headers_of()
        while True:
            self.send(bytes(2**16))

    def chunks(self):
        self.headers_of(Transfer_Encoding="chunked")
        while True:
            self.send(b"10000\r\n" + bytes(2**16) + b"\r\n")

    def bomb(self):
        self.headers_of(Content_Encoding="gzip")
        self.send(gzip.compress(bytes(10**7)))

    def huge(self):
        self.headers_of(Content_Length=10**11)
        self.server.release.wait(10)

    def silent(self):
        self.server.release.wait(10)

    def stops(self):
        self.headers_of(Content_Length=100)
        self.send(png(7)[:50])
        self.server.release.wait(10)

    def longer(self):
        self.headers_of(Content_Length=10**4)
        self.send(png(7))

    def shorter(self):
        self.headers_of(Content_Length=40)
        self.send(png(7))

    def loop(self):
        self.headers_of(302, Location=self.path, Content_Length=0)

    def nothing(self):
        self.headers_of(404, Content_Length=0)

    def failing(self):
        self.headers_of(500, Content_Length=0)

    def trickle(self):
        self.headers_of(Content_Length=len(png(7)))
        for k in range(0, len(png(7)), 20):
            self.send(png(7)[k : k + 20])
            self.server.release.wait(0.05)

    def archive(self):
        """A file of which parts may be asked for."""
        data = self.server.archive
        start, stop = 0, len(data)
        if "Range" in self.headers:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            start, stop = int(first), int(last or stop - 1) + 1
        part = data[start:stop]
        content_range = f"bytes {start}-{start + len(part) - 1}/{len(data)}"
        status = 206 if "Range" in self.headers else 200
        self.headers_of(status, Content_Length=len(part), Content_Range=content_range)
        self.send(part)

    def unsized(self):
        self.headers_of()
        self.send(png(7))


@pytest.fixture
def server(monkeypatch):
    """The address of a server, with small bounds: 1 MB, and 0.3 s of silence."""
    monkeypatch.setattr(f"{FILES}._MAX_BYTES", 10**6)
    monkeypatch.setattr(f"{FILES}._SILENT_SECONDS", 0.3)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.requests, httpd.release, httpd.archive = [], threading.Event(), b""
        httpd.daemon_threads = True
        httpd.url = f"http://127.0.0.1:{httpd.server_address[1]}"
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield httpd
        httpd.release.set()
        httpd.shutdown()
        thread.join()


@pytest.mark.parametrize("cache", ["", "simplecache::"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("endless", "it is larger than 1 MB, the most that is read of one image"),
        ("chunks", "it is larger than 1 MB"),
        ("bomb", "it is larger than 1 MB"),
        ("huge", "it is larger than 1 MB"),
        ("silent", r"the server sent nothing for 0.3 s|nothing at this URL"),
        ("stops", "the server sent nothing for 0.3 s, or not all within 300 s"),
        ("longer", "the URL cannot be read: .*not enough data|payload"),
        ("shorter", "the image file cannot be|file format|nothing at this|URL cannot be read"),
        ("loop", "the URL cannot be read: TooManyRedirects|nothing at this URL"),
        ("nothing", "there is nothing at this URL"),
        ("failing", "the URL cannot be read: .*500|nothing at this URL"),
    ],
)
def test_bad_servers(server, name, reason, cache):
    images = as_images([f"{cache}{server.url}/{name}.png"])
    with pytest.raises(BadImage, match=f"(?i){reason}"):
        pixels(images, 0)


@pytest.mark.parametrize("cache", ["", "simplecache::"])
@pytest.mark.parametrize("name", ["trickle", "unsized"])
def test_slow_and_sloppy_servers(server, name, cache):
    images = as_images([f"{cache}{server.url}/{name}.png"])
    np.testing.assert_array_equal(pixels(images, 0)[0, 0], [7, 0, 0])


def test_the_users_own_time_out_comes_first(server, monkeypatch):
    import aiohttp

    own = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=0.05)}}
    monkeypatch.setitem(fsspec.config.conf, "http", own)
    with pytest.raises(BadImage, match="the server sent nothing"):
        pixels(as_images([f"{server.url}/trickle.png"]), 0)


# -- archives --------------------------------------------------------------------------------
N_MEMBERS = 40


def packed(kind):
    """An archive of images whose red value is their number."""
    stream = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            for i in range(N_MEMBERS):
                archive.writestr(f"photos/{i}.png", png(i))
            archive.writestr("bomb.png", bytes(10**7))
    else:
        with tarfile.open(fileobj=stream, mode=f"w:{kind[4:]}") as archive:
            for i in range(N_MEMBERS):
                member = tarfile.TarInfo(f"photos/{i}.png")
                member.size = len(png(i))
                archive.addfile(member, io.BytesIO(png(i)))
    return stream.getvalue()


@pytest.fixture
def opened(monkeypatch):
    """The classes of archives that were listed."""
    opened = []
    for kind in ("zip", "tar"):
        cls = fsspec.get_filesystem_class(kind)

        def init(self, *args, init=cls.__init__, **kwargs):
            opened.append(type(self))
            init(self, *args, **kwargs)

        monkeypatch.setattr(cls, "__init__", init)
    return opened


def read_in_threads(X):
    images = as_images(X)
    with ThreadPoolExecutor(N_THREADS) as pool:
        rows = list(pool.map(lambda i: pixels(images, i), range(len(images))))
    return [int(row[0, 0, 0]) for row in rows]


@pytest.mark.parametrize("place", ["local", "http", "cached"])
@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.xz"])
def test_an_archive_is_listed_once(kind, place, server, opened, tmp_path):
    server.archive = packed(kind)
    path = tmp_path / f"archive.{kind}"
    path.write_bytes(server.archive)
    cache = "simplecache::" if place == "cached" else ""
    rest = path.as_posix() if place == "local" else f"{cache}{server.url}/archive.{kind}"
    X = [f"{kind[:3]}://photos/{i}.png::{rest}" for i in range(N_MEMBERS)]
    assert read_in_threads(X) == list(range(N_MEMBERS))
    assert len(opened) == 1
    missing = as_images([X[0].replace("0.png", "none.png")])
    with pytest.raises(BadImage, match=r"there is nothing at this URL|KeyError"):
        pixels(missing, 0)


def test_an_archive_may_change_between_two_calls(tmp_path):
    path = tmp_path / "archive.zip"
    path.write_bytes(packed("zip"))
    X = [f"zip://photos/{i}.png::{path}" for i in (3, 4)]
    assert read_in_threads(X) == [3, 4]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("photos/3.png", png(30))
        archive.writestr("photos/4.png", png(40))
    assert read_in_threads(X) == [30, 40]


def test_a_member_that_unpacks_to_too_much(server, tmp_path):
    path = tmp_path / "archive.zip"
    path.write_bytes(packed("zip"))
    with pytest.raises(BadImage, match="larger than 1 MB"):
        pixels(as_images([f"zip://bomb.png::{path}"]), 0)


def test_paths_within_a_zip_file(tmp_path):
    path = tmp_path / "archive.zip"
    path.write_bytes(packed("zip"))
    with zipfile.ZipFile(path) as archive:
        X = [zipfile.Path(archive, f"photos/{i}.png") for i in range(N_MEMBERS)]
        assert read_in_threads(X) == list(range(N_MEMBERS))
        images = as_images([zipfile.Path(archive, "photos/none.png")])
        with pytest.raises(BadImage, match=r"reading it raises FileNotFoundError: .*none\.png"):
            pixels(images, 0)
        with pytest.raises(TypeError, match=r"single cell .*0\.png.*\[X\]"):
            as_images(X[0])
