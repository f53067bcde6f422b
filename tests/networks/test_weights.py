"""Weights: downloaded, resumed, checked, shared by processes, read without trust."""

import hashlib
import http.server
import multiprocessing
import pickle
import re
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torchvision.models import shufflenet_v2_x0_5

from sktransfer import load_backbone
from sktransfer.networks import _weights

CONTENT = bytes(range(256)) * 4000  # about a megabyte
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves one file with Range; may hang up half way, or answer with an error first."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.hang_ups = 0
        self.errors = 0
        self.has_ranges = True
        self.content = CONTENT
        self.requests = []

    def url(self, name=f"tiny-{DIGEST[:8]}.pth"):
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def handle_error(self, request, client_address):
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.requests.append(asked)
        if server.errors:
            server.errors -= 1
            self.send_error(503)
            return
        start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
        if start >= len(server.content) and server.has_ranges:
            self.send_error(416)
            return
        body = server.content[start:] if server.has_ranges else server.content
        self.send_response(206 if asked and server.has_ranges else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.hang_ups:
            server.hang_ups -= 1
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.connection.close()
            return
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty folder of torch's hub; waiting between tries takes no time."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(_weights, "_wait", lambda attempt: None)
    return tmp_path / "hub" / "checkpoints"


def test_downloads_once(server, hub):
    path = _weights.fetch(server.url())
    assert path == hub / f"tiny-{DIGEST[:8]}.pth"
    assert path.read_bytes() == CONTENT
    assert _weights.fetch(server.url()) == path
    assert server.requests == [None]
    assert not list(hub.glob("*.part"))


def test_goes_on_where_the_connection_ended(server, hub):
    server.hang_ups = 2
    assert _weights.fetch(server.url()).read_bytes() == CONTENT
    half, quarter = len(CONTENT) // 2, len(CONTENT) // 4
    assert server.requests == [None, f"bytes={half}-", f"bytes={half + quarter}-"]


def test_goes_on_where_a_killed_process_stopped(server, hub):
    hub.mkdir(parents=True)
    (hub / f"tiny-{DIGEST[:8]}.pth.part").write_bytes(CONTENT[:1000])
    assert _weights.fetch(server.url()).read_bytes() == CONTENT
    assert server.requests == ["bytes=1000-"]


@pytest.mark.parametrize("left", [CONTENT, CONTENT + b"x"], ids=["whole", "too long"])
def test_finishes_what_a_killed_process_had_downloaded(server, hub, left):
    hub.mkdir(parents=True)
    (hub / f"tiny-{DIGEST[:8]}.pth.part").write_bytes(left)
    assert _weights.fetch(server.url()).read_bytes() == CONTENT


def test_begins_again_where_the_server_knows_no_ranges(server, hub):
    server.hang_ups, server.has_ranges = 1, False
    assert _weights.fetch(server.url()).read_bytes() == CONTENT


def test_tries_again_after_a_busy_server(server, hub):
    server.errors = 2
    assert _weights.fetch(server.url()).read_bytes() == CONTENT
    server.errors = 99
    with pytest.raises(OSError, match="HTTP Error 503"):
        _weights.fetch(server.url("other-00000000.pth"))
    assert len(server.requests) < 12


def test_damaged_download_is_not_kept(server, hub):
    server.content = CONTENT[:-1] + b"!"
    message = f"SHA-256 begins with [0-9a-f]{{8}}, not {DIGEST[:8]}. Nothing was kept"
    with pytest.raises(ValueError, match=message):
        _weights.fetch(server.url(), name="tiny")
    assert not [path for path in hub.iterdir() if path.suffix != ".lock"]


def test_missing_on_the_server(server, hub, monkeypatch):
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.send_error(404))
    with pytest.raises(OSError, match=r"could not be downloaded .*404"):
        _weights.fetch(server.url())


def test_no_network(hub):
    url = "http://127.0.0.1:9/resnet18-f37072fd.pth"  # nobody listens there
    with pytest.raises(OSError) as caught:
        _weights.fetch(url, name="resnet18")
    text = str(caught.value)
    assert "The weights of resnet18 are not on this machine" in text
    assert url in text
    assert str(hub / "resnet18-f37072fd.pth") in text
    assert "backbone='builtin' needs no network, and weights=PATH takes a local" in text


def _fetch_in_process(url, queue):
    queue.put(_weights.fetch(url).read_bytes() == CONTENT)


def test_processes_that_ask_at_once_download_once(server, hub):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [
        context.Process(target=_fetch_in_process, args=(server.url(), queue)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    assert [queue.get(timeout=120) for _ in processes] == [True] * 2
    for process in processes:
        process.join()
    assert server.requests == [None]


def test_torchvisions_default_through_the_hub_folder(hub, monkeypatch):
    torch.manual_seed(0)
    state = shufflenet_v2_x0_5().state_dict()
    hub.mkdir(parents=True)
    path = hub / "shufflenetv2_x0.5-f707e7126e.pth"
    torch.save(state, path)
    with pytest.warns(UserWarning, match="not the published file"):
        backbone = load_backbone("shufflenet_v2_x0_5")
    torch.testing.assert_close(backbone.network.module.state_dict(), state)
    by_path = load_backbone("shufflenet_v2_x0_5", weights=path)
    assert by_path.fingerprint == backbone.fingerprint


# -- local files -----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    return shufflenet_v2_x0_5().eval()


def saved(path, state):
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.safetensors"])
def test_local_file(network, tmp_path, name):
    path = saved(tmp_path / name, network.state_dict())
    for weights in (path, str(path)):
        backbone = load_backbone("shufflenet_v2_x0_5", weights=weights)
        torch.testing.assert_close(backbone.network.module.state_dict(), network.state_dict())
    assert not backbone.key_report


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"model.{key}": value for key, value in state.items()}},
        lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
        lambda state: {k: v for k, v in state.items() if not k.startswith("fc.")},
        lambda state: {**state, "fc.weight": torch.zeros(7, 1024), "fc.bias": torch.zeros(7)},
        lambda state: {**state, "fc.1.weight": torch.zeros(7, 1024)},
    ],
    ids=[
        "state_dict",
        "model",
        "module",
        "compiled",
        "lightning",
        "counters",
        "headless",
        "width",
        "deeper",
    ],
)
def test_what_training_scripts_save(network, tmp_path, wrap):
    path = saved(tmp_path / "w.pth", wrap(network.state_dict()))
    backbone = load_backbone("shufflenet_v2_x0_5", weights=path)
    got, expected = backbone.network.module.state_dict(), network.state_dict()
    for key in expected:
        if not key.startswith("fc.") and "num_batches" not in key:
            assert torch.equal(got[key], expected[key]), key
    assert all(not tensor.is_meta for tensor in got.values())


def test_what_did_not_fit_is_reported(network, tmp_path):
    state = network.state_dict()
    state["fc.weight"], state["fc.bias"] = torch.zeros(7, 1024), torch.zeros(7)
    state["fc.extra"] = torch.zeros(1)
    backbone = load_backbone("shufflenet_v2_x0_5", weights=saved(tmp_path / "w.pth", state))
    report = backbone.key_report
    assert report.unexpected == ["fc.extra"]
    assert "fc.weight ((7, 1024) in the file, (1000, 1024))" in report.misshapen
    del state["conv1.0.weight"]
    state["stage2.0.branch1.0.weight"] = torch.zeros(3)
    state["layer9.weight"] = torch.zeros(3)
    path = saved(tmp_path / "x.pth", state)
    with pytest.raises(ValueError, match="beyond the head") as caught:
        load_backbone("shufflenet_v2_x0_5", weights=path)
    for text in ("alone (1): conv1.0.weight", "alone (1): layer9.weight", "stage2.0.branch1.0"):
        assert text in str(caught.value)


def test_half_precision_files_are_read_as_float32(network, tmp_path):
    half = {
        key: v.half() if v.is_floating_point() else v for key, v in network.state_dict().items()
    }
    backbone = load_backbone("shufflenet_v2_x0_5", weights=saved(tmp_path / "w.safetensors", half))
    assert {p.dtype for p in backbone.network.module.parameters()} == {torch.float32}


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


def test_a_pickle_is_never_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in ({"state_dict": Evil()}, nn.Linear(2, 2)):
        path = saved(tmp_path / "w.pth", content)
        with pytest.raises(ValueError, match="pickled Python objects are not opened"):
            _weights.read_state_dict(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="cannot be read as a state dict"):
        _weights.read_state_dict(path)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.pth", b"not a file of torch", "cannot be read as a state dict"),
        ("w.pth", b"", "cannot be read as a state dict"),
        ("w.safetensors", b"neither", "is not a safetensors file"),
        ("w.h5", b"", "a weights file ends in one of .pt, .pth"),
    ],
)
def test_files_that_are_none(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_backbone("shufflenet_v2_x0_5", weights=path)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"w\.pth' does not exist"):
        load_backbone("shufflenet_v2_x0_5", weights=tmp_path / "w.pth")
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(FileNotFoundError, match="is a folder"):
        load_backbone("shufflenet_v2_x0_5", weights=str(tmp_path / "folder.pth"))


def test_tensors_of_other_things(tmp_path):
    path = saved(tmp_path / "w.pth", {"losses": [1.0, 2.0]})
    with pytest.raises(ValueError, match=re.escape("holds the keys ['losses'], not tensors")):
        _weights.read_state_dict(path)


def test_a_file_that_changes_under_a_fitted_object(network, tmp_path):
    from sktransfer.networks._inference import clear_networks

    path = saved(tmp_path / "w.pth", network.state_dict())
    backbone = load_backbone("shufflenet_v2_x0_5", weights=path)
    pickled = pickle.dumps(backbone)
    assert len(pickled) < 5000
    state = network.state_dict()
    state["conv1.0.weight"] = state["conv1.0.weight"] + 1
    saved(path, state)
    clear_networks()
    for stale in (backbone, pickle.loads(pickled)):
        with pytest.raises(ValueError, match="has changed since this was fitted"):
            stale.network.module  # noqa: B018
    path.unlink()
    with pytest.raises(FileNotFoundError, match="is gone: put it back"):
        pickle.loads(pickled).network.module  # noqa: B018


def test_real_weights(shared_data):
    folder = shared_data / "weights"
    for name in ("mobilenet_v2", "squeezenet1_1"):
        backbone = load_backbone(name, weights=folder / f"{name}_imagenet.safetensors")
        x = torch.zeros((1, 3, 224, 224), dtype=torch.uint8)
        assert backbone.embed_batch(x)[0].isfinite().all()
        assert not backbone.key_report
