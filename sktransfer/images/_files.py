"""Read encoded images from local files, URLs and open files, at most 256 MB each."""

from __future__ import annotations

import base64
import binascii
import functools
import os
import re
import shutil
import stat
import tempfile
import threading
import weakref
from typing import TYPE_CHECKING
from urllib.parse import unquote, unquote_to_bytes

from sktransfer._progress import error_text
from sktransfer._threads import process_lock
from sktransfer.images._pixels import BadImage

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_MAX_BYTES = 256 * 10**6
_SILENT_SECONDS, _ALL_SECONDS = 30, 300  # of an HTTP response

# Also chained ones, "simplecache::s3://…"; "C:" is a drive.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+(::[A-Za-z0-9+.\-]+)*://")
# JPEG, PNG, GIF, WebP, TIFF, BMP, and JPEG 2000, AVIF and HEIC
BASE64 = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "SUkq", "TU0A", "Qk", "AAAA")

# Several rows may share an open file, a PIL image or a container of a user's class. These have a
# state (a position, a buffer), so that only one thread may read them at a time.
reader_lock = process_lock()


def is_url(text: str) -> bool:
    """Whether the text is a URL that is not of a local file."""
    return bool(_URL.match(text)) and not text.startswith(("file://", "local://"))


def local_path(text: str) -> str:
    """Return the local path that a string names, with ``~`` expanded, without ``file://``."""
    if text.startswith(("file://", "local://")):
        text = text.split("://", 1)[1].removeprefix("localhost")
        if "%" in text and not os.path.lexists(text):  # Path.as_uri() quotes
            text = unquote(text)
    return os.path.expanduser(text) if text.startswith("~") else text


def read_path(path: str) -> bytes:
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise BadImage(
                "it is a folder; give the paths of the files in it: "
                "sorted(glob.glob(folder + '/**/*.jpg', recursive=True))"
            )
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("it is not a regular file")
        _check_size(status.st_size)
        with open(path, "rb") as file:
            return file.read()
    except BadImage:
        raise
    except PermissionError as error:
        raise BadImage("there is no permission to read the file") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte, or a lone surrogate
        if path.startswith(BASE64) and len(path) > 80:
            reason = "it is base64 rather than a path; give base64.b64decode(text)"
        elif not isinstance(error, FileNotFoundError):
            reason = f"the file cannot be read: {error_text(error)}"
        else:
            where = f" in {os.getcwd()!r}, where relative paths start"
            reason = "there is no such file" + ("" if os.path.isabs(path) else where)
            if any(sign in path for sign in "*?["):
                reason += "; give the paths that match a pattern: sorted(glob.glob(pattern))"
        raise BadImage(reason) from error


def read_stream(stream) -> bytes:
    """Read an open file from its beginning and put it back where it was."""
    try:
        with reader_lock:
            position = stream.tell()
            stream.seek(0)
            data = stream.read(_MAX_BYTES + 1)
            stream.seek(position)
    except Exception as error:
        is_closed = getattr(stream, "closed", False)
        hint = "; read it before its with block ends, or give the path" if is_closed else ""
        raise BadImage(f"the open file cannot be read: {error_text(error)}{hint}") from error
    if not isinstance(data, bytes):
        raise BadImage("the file is open in text mode; open it in mode 'rb'")
    _check_size(len(data))
    return data


def _check_size(n_bytes: int) -> None:
    if n_bytes > _MAX_BYTES:
        raise BadImage(
            f"it is larger than {_MAX_BYTES // 10**6} MB, the most that is read of one image; "
            "give a smaller copy, or its pixels as an array"
        )


def read_data_url(url: str) -> bytes:
    header, comma, body = url.partition(",")
    if not comma:
        raise BadImage("the data URL has no comma before its data")
    if not header.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        text = unquote(body) if "%" in body else body
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadImage(f"the data URL does not decode as base64: {error}") from error


class Urls:
    """Reads URLs; an archive with several of the images is opened, and listed, once."""

    def __init__(self) -> None:
        self._archives: dict[tuple[str, ...], AbstractFileSystem] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return Urls, ()

    def read(self, url: str) -> bytes:
        # File systems raise errors of many libraries (aiohttp, botocore …), and ImportError if one
        # of these is missing.
        try:
            data = self._read(url)
        except BadImage:
            raise
        except FileNotFoundError as error:
            raise BadImage("there is nothing at this URL") from error
        except TimeoutError as error:
            times = f"for {_SILENT_SECONDS} s, or not all within {_ALL_SECONDS} s"
            raise BadImage(f"the server sent nothing {times}") from error
        except Exception as error:
            raise BadImage(f"the URL cannot be read: {error_text(error)}") from error
        _check_size(len(data))
        return data

    def _read(self, url: str) -> bytes:
        import fsspec
        from fsspec.utils import infer_compression

        links, at_most = url.split("::"), {"start": 0, "end": _MAX_BYTES + 1}
        k = next(k for k, link in enumerate(links) if "://" in link)
        if k == len(links) - 1:
            filesystem, path = fsspec.core.url_to_fs(url, **_options(links, is_image=True))
            # A range would need one more request over HTTP, whose responses are bounded below.
            return filesystem.cat_file(path, **({} if links[0].startswith("http") else at_most))
        # "zip://member::https://archive": the members share one position in the archive.
        archive = (*links[:k], links[k].partition("://")[0], *links[k + 1 :])
        with self._lock:
            if archive not in self._archives:
                options = _options(links, is_image=False)
                if links[0].startswith("tar://") and infer_compression(links[-1]):
                    self._archives[archive] = self._unpacked("::".join(links[1:]), options)
                else:
                    self._archives[archive], _ = fsspec.core.url_to_fs(url, **options)
            return self._archives[archive].cat_file(links[k], **at_most)

    def _unpacked(self, url: str, options: dict) -> AbstractFileSystem:
        # Seeking backwards in a compressed archive unpacks it from its beginning.
        import fsspec

        file = tempfile.NamedTemporaryFile(suffix=".tar")  # noqa: SIM115
        weakref.finalize(self, file.close)
        with fsspec.open(url, compression="infer", **options) as packed:
            shutil.copyfileobj(packed, file)
        file.seek(0)
        return fsspec.filesystem("tar", fo=file)


def _options(links: list[str], is_image: bool) -> dict[str, dict]:
    """Return the options of the file systems that a chained URL names."""
    import fsspec

    options = {}
    for protocol in {link.partition("://")[0] for link in links} & {"http", "https"}:
        fsspec.get_filesystem_class(protocol)  # says what to install
        import aiohttp

        silent = dict.fromkeys(("sock_connect", "sock_read"), _SILENT_SECONDS)
        client: dict[str, object] = {"timeout": aiohttp.ClientTimeout(_ALL_SECONDS, **silent)}
        if is_image:
            client["response_class"] = _bounded_response()
        for name in ("http", "https"):  # the user's configuration takes precedence
            client |= fsspec.config.conf.get(name, {}).get("client_kwargs", {})
        options[protocol] = {"client_kwargs": client}
    return options


@functools.cache
def _bounded_response() -> type:
    import aiohttp

    class BoundedResponse(aiohttp.ClientResponse):
        """A response of which at most the bytes of the largest accepted image are read."""

        async def start(self, connection):  # type: ignore[no-untyped-def]
            await super().start(connection)
            _check_size((self.method == "GET" and self.content_length) or 0)
            self.content = _BoundedContent(self.content)  # type: ignore[assignment]
            return self

    return BoundedResponse


class _BoundedContent:
    def __init__(self, content) -> None:
        self._content, self._n_read = content, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._content, name)

    async def read(self, n: int = -1) -> bytes:
        parts: list[bytes] = []
        while part := await self._content.read(2**20 if n < 0 else n):
            parts.append(part)
            self._n_read += len(part)
            _check_size(self._n_read)
            if n >= 0:
                break
        return b"".join(parts)
