"""Weights: downloaded once, checked, shared by processes, read without running their code."""

import hashlib
import http.server
import io
import multiprocessing
import pickle
import re
import threading
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torchvision.models import ShuffleNet_V2_X0_5_Weights, get_model, shufflenet_v2_x0_5

from sktransfer import load_backbone


# -- published weights -----------------------------------------------------------------------
class Server(http.server.ThreadingHTTPServer):
    """Serves the same content under every name."""

    daemon_threads = True

    def __init__(self, content):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.n_requests = content, 0


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.n_requests += 1
        if self.server.content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        self.wfile.write(self.server.content)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    return shufflenet_v2_x0_5().eval()


@pytest.fixture(scope="module")
def published(network):
    """The content of a weights file, and the name that it is published under."""
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    content = buffer.getvalue()
    return content, f"shufflenet-{hashlib.sha256(content).hexdigest()[:8]}.pth"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty folder of torch's hub."""
    before = torch.hub.get_dir()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.hub.set_dir(tmp_path / "hub")
    yield tmp_path / "hub" / "checkpoints"
    torch.hub.set_dir(before)


@pytest.fixture
def server(published, hub, monkeypatch):
    """A server of the weights that torchvision's enum points at."""
    content, name = published
    with Server(content) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        server.url = f"http://127.0.0.1:{server.server_port}/{name}"
        monkeypatch.setattr(ShuffleNet_V2_X0_5_Weights.DEFAULT.value, "url", server.url)
        yield server
        server.shutdown()
        thread.join()


def test_downloads_once(network, published, server, hub):
    backbone = load_backbone("shufflenet_v2_x0_5")
    torch.testing.assert_close(backbone.network.module.state_dict(), network.state_dict())
    assert load_backbone("shufflenet_v2_x0_5").fingerprint == backbone.fingerprint
    assert server.n_requests == 1
    files = [path for path in hub.iterdir() if path.suffix != ".lock"]
    assert files == [hub / published[1]]
    assert files[0].read_bytes() == published[0]


@pytest.mark.parametrize("damage", [lambda c: c[:-1] + b"!", lambda c: c[: len(c) // 2]])
def test_a_damaged_download_is_not_kept(published, server, hub, damage):
    server.content = damage(published[0])
    message = r"weights of shufflenet.* are damaged \(invalid hash .*Nothing was kept: try again"
    with pytest.raises(ValueError, match=message):
        load_backbone("shufflenet_v2_x0_5")
    assert not [path for path in hub.iterdir() if path.suffix != ".lock"]


def test_missing_on_the_server(server):
    server.content = None
    with pytest.raises(OSError, match=r"were not downloaded .*404"):
        load_backbone("shufflenet_v2_x0_5")


def test_no_folder_for_downloads(hub):
    hub.parent.write_text("a file")
    with pytest.raises(OSError, match="were not downloaded"):
        load_backbone("resnet18")


def test_no_network(hub, monkeypatch):
    url = "http://127.0.0.1:9/shufflenet-f37072fd.pth"  # nobody listens there
    monkeypatch.setattr(ShuffleNet_V2_X0_5_Weights.DEFAULT.value, "url", url)
    with pytest.raises(OSError) as caught:
        load_backbone("shufflenet_v2_x0_5")
    text = str(caught.value)
    assert "The weights of shufflenet_v2_x0_5 are not on this machine" in text
    assert f"from: {url}" in text
    assert f"put them at: {hub / 'shufflenet-f37072fd.pth'}" in text
    assert "backbone='builtin' needs no network, and weights=PATH takes a local" in text


def _load_in_process(url, queue):
    ShuffleNet_V2_X0_5_Weights.DEFAULT.value.url = url
    queue.put(load_backbone("shufflenet_v2_x0_5").fingerprint)


def test_processes_that_ask_at_once_download_once(server):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [
        context.Process(target=_load_in_process, args=(server.url, queue)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    assert len({queue.get(timeout=120) for _ in processes}) == 1
    for process in processes:
        process.join()
    assert server.n_requests == 1


# -- local files -----------------------------------------------------------------------------
def saved(path, state):
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("name", ["w.pt", "w.PTH", "w.pth.tar", "w.safetensors"])
def test_local_file(network, tmp_path, name):
    path = saved(tmp_path / name, network.state_dict())
    for weights in (path, str(path)):
        backbone = load_backbone("shufflenet_v2_x0_5", weights=weights)
        torch.testing.assert_close(backbone.network.module.state_dict(), network.state_dict())


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


def test_what_does_not_fit_is_listed(network, tmp_path):
    state = network.state_dict()
    del state["conv1.0.weight"]
    state["stage2.0.branch1.0.weight"] = torch.zeros(3)
    state["layer9.weight"] = torch.zeros(3)
    path = saved(tmp_path / "x.pth", state)
    with pytest.raises(ValueError, match="Beyond the head") as caught:
        load_backbone("shufflenet_v2_x0_5", weights=path)
    shapes = "stage2.0.branch1.0.weight ((3,) in the file"
    for text in ("alone (1): conv1.0.weight", "alone (1): layer9.weight", shapes):
        assert text in str(caught.value)


def test_old_names_of_densenets(tmp_path):
    state = load_backbone("densenet121", weights=None).network.module.state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", k): v for k, v in state.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    backbone = load_backbone("densenet121", weights=saved(tmp_path / "w.pth", old))
    torch.testing.assert_close(backbone.network.module.state_dict(), state)


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_auxiliary_heads_are_left_out(tmp_path, name):
    module = get_model(name, weights=None, init_weights=False)
    path = saved(tmp_path / "w.pth", module.state_dict())
    backbone = load_backbone(name, weights=path)
    assert backbone.network.module.transform_input


def test_old_files_of_vision_transformers(tmp_path):
    """Their layers had other names; the size of the images shows in the position embedding."""
    state = get_model("vit_b_32", weights=None, image_size=96).state_dict()
    old = OrderedDict(
        (k.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."), v)
        for k, v in state.items()
    )
    assert "encoder.layers.encoder_layer_0.mlp.linear_1.weight" in old
    backbone = load_backbone("vit_b_32", weights=saved(tmp_path / "w.pth", old))
    torch.testing.assert_close(backbone.network.module.state_dict(), state)
    assert backbone.input_size == (3, 96, 96)


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
            load_backbone("shufflenet_v2_x0_5", weights=path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="cannot be read as a state dict"):
        load_backbone("shufflenet_v2_x0_5", weights=path)
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
        load_backbone("shufflenet_v2_x0_5", weights=path)


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
    with pytest.raises(FileNotFoundError, match=r"'w.pth' of shufflenet_v2_x0_5 is not in"):
        backbone.network.module  # noqa: B018


def test_real_weights(shared_data):
    folder = shared_data / "weights"
    for name in ("mobilenet_v2", "squeezenet1_1"):
        backbone = load_backbone(name, weights=folder / f"{name}_imagenet.safetensors")
        x = torch.zeros((1, 3, 224, 224), dtype=torch.uint8)
        assert backbone.inference_module()(x)[0].isfinite().all()
