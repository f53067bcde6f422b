"""What can be named, which layer, how pooled, how told apart, and how it travels."""

import copy
import gc
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import ResNet18_Weights
from two_stages import PIXELS, SMALL, Tiny, close, embed, normalised, tiny

from sktransfer import load_backbone
from sktransfer.networks._inference import MAX_NETWORKS, _networks, clear_networks

pytestmark = pytest.mark.usefixtures("one_thread")


# -- errors ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"backbone": "resnet5"},
            "'resnet5' is not known. Did you mean 'resnet50'.*list_backbones",
        ),
        ({"backbone": "nothing-like-it"}, "is not known. list_backbones"),
        ({"pooling": "mean"}, r"pooling='mean' is not accepted: one of \['auto', 'avg'"),
        ({"layer": "stage9"}, r"Did you mean 'stage\d'.* Its stages are \['stem', 'stage1'"),
        ({"layer": []}, r"layer=\[\] names no layer"),
        (
            {"pooling": "cls"},
            "asks for the class token, but layer 'embedding' of builtin gives a map",
        ),
        (
            {"layer": "stage2", "pooling": "cls"},
            "layer 'stage2' of builtin gives a map with height",
        ),
        ({"weights": "V9"}, r"among the weights of the built-in backbone: \['DEFAULT', 'V1'\]"),
        (
            {"backbone": "resnet50", "weights": ResNet18_Weights.DEFAULT},
            "weights=ResNet18_Weights.IMAGENET1K_V1 is not among the published weights of resnet50",
        ),
        (
            {"backbone": "resnet50", "weights": "IMAGENET1K_V3"},
            r"published weights of resnet50: \['DEFAULT', 'IMAGENET1K_V1', 'IMAGENET1K_V2'",
        ),
        (
            {"backbone": "vit_b_16", "weights": None, "preprocessing": {"size": 96, "crop": 96}},
            "vit_b_16 does not accept images of 3×96×96 .*Wrong image height! Expected 224",
        ),
        ({"backbone": "timm:xception4"}, "Did you mean 'timm:xception41'"),
    ],
)
def test_errors(kwargs, message):
    if str(kwargs.get("backbone")).startswith("timm"):
        pytest.importorskip("timm")
    with pytest.raises(ValueError, match=message):
        load_backbone(**kwargs)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (3, "backbone=3 is a int: a name"),
        (lambda: 3, "returned int: a callable backbone takes no argument"),
    ],
)
def test_wrong_types(backbone, message):
    with pytest.raises(TypeError, match=message):
        load_backbone(backbone)
    for layer in (3, [3]):
        with pytest.raises(TypeError, match="layer 3 is not a name"):
            load_backbone("builtin", layer=layer)


def test_own_module_that_does_not_take_images():
    with pytest.raises(ValueError, match="Linear does not accept images of 3×224×224"):
        load_backbone(nn.Linear(3, 3))


# -- random weights --------------------------------------------------------------------------
def test_random_weights_are_the_same_every_time_and_leave_the_seed_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = embed(load_backbone("builtin", weights=None))
    clear_networks()
    second = embed(load_backbone("builtin", weights=None))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first, second)
    assert not torch.allclose(first, embed(load_backbone("builtin")))


def test_a_callable_that_draws_random_weights_leaves_the_seed_alone():
    before = torch.get_rng_state()
    load_backbone(Tiny, preprocessing=SMALL)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_own_module_from_scratch():
    module = tiny()
    fresh = load_backbone(module, weights=None, preprocessing=SMALL)
    again = load_backbone(module, weights=None, preprocessing=SMALL)
    assert fresh.fingerprint == again.fingerprint
    assert fresh.fingerprint != load_backbone(module, preprocessing=SMALL).fingerprint
    assert (fresh.network.module.features[1].running_mean == 0).all()
    module.extra = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="Tiny does not say how to initialise 'extra'"):
        load_backbone(module, weights=None, preprocessing=SMALL)


# -- own modules -----------------------------------------------------------------------------
def test_an_own_module_is_copied_and_left_alone():
    module = tiny().train()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    backbone = load_backbone(module, preprocessing=SMALL)
    first = embed(backbone)
    assert all(part.training for part in module.modules())
    assert all(p.requires_grad for p in module.parameters())
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    with torch.no_grad():
        module.features[0].weight.add_(1)
    assert torch.equal(embed(backbone), first)
    assert load_backbone(module, preprocessing=SMALL).fingerprint != backbone.fingerprint


def test_wrapped_callable_and_grey_modules():
    expected = load_backbone(tiny(), preprocessing=SMALL).fingerprint
    for same in (nn.DataParallel(tiny()), tiny, lambda: tiny()):
        assert load_backbone(same, preprocessing=SMALL).fingerprint == expected
    grey = load_backbone(tiny(n_channels=1), preprocessing=SMALL)
    assert grey.input_size == (1, 64, 64)
    assert grey.preprocessing.resize_crop(np.zeros((80, 90, 3), np.uint8)).shape == (64, 64, 1)
    assert embed(grey, PIXELS[:, :1]).shape == (3, 10)


def test_weights_file_for_an_own_module(tmp_path):
    path = tmp_path / "tiny.pt"
    torch.save(tiny().state_dict(), path)
    backbone = load_backbone(Tiny(), weights=path, preprocessing=SMALL)
    assert backbone.fingerprint == load_backbone(tiny(), preprocessing=SMALL).fingerprint


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_weights_file_for_an_own_module_around_another(prefix, tmp_path):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tiny()

        def forward(self, x):
            return self.model(x)

    given, path = Around(), tmp_path / "around.pt"
    torch.save({f"{prefix}{key}": value for key, value in given.state_dict().items()}, path)
    backbone = load_backbone(Around(), weights=path, preprocessing=SMALL)
    torch.testing.assert_close(backbone.network.module.state_dict(), given.state_dict())


# -- fingerprints ----------------------------------------------------------------------------
def test_fingerprints_tell_everything_apart():
    other = tiny()
    other.features[1].running_mean[0] += 1e-3
    variants = [
        load_backbone(tiny(), preprocessing=SMALL),
        load_backbone(other, preprocessing=SMALL),
        load_backbone(tiny(scale=2.0), preprocessing=SMALL),
        load_backbone(tiny(), preprocessing={"size": 72, "crop": 64}),
        load_backbone(tiny(), preprocessing={**SMALL, "mean": (0.5, 0.5, 0.5)}),
        load_backbone(tiny(), preprocessing={**SMALL, "fast_decode": False}),
        load_backbone(tiny(), preprocessing={**SMALL, "interpolation": "bicubic"}),
        load_backbone(tiny(), preprocessing=SMALL, pooling="max"),
        load_backbone(tiny(), preprocessing=SMALL, layer="features.2"),
        load_backbone(tiny(), preprocessing=SMALL, layer=["features.2", "features.5"]),
        load_backbone(tiny(), preprocessing=SMALL, layer=["features.5", "features.2"]),
        load_backbone("builtin"),
        load_backbone("builtin", weights=None),
        load_backbone("resnet18", weights=None),
    ]
    assert len({backbone.fingerprint for backbone in variants}) == len(variants)
    assert variants[0].fingerprint == load_backbone(tiny(), preprocessing=SMALL).fingerprint
    named = load_backbone("builtin", weights="V1", layer=None)
    assert named.fingerprint == load_backbone("builtin").fingerprint


# -- travelling ------------------------------------------------------------------------------
FRESH = """
import pickle, sys, torch
backbone = pickle.load(open(sys.argv[1], "rb"))
pixels = torch.load(sys.argv[2], weights_only=True)
from sktransfer import load_backbone
assert load_backbone("builtin", layer=["stage1", None]).fingerprint == backbone.fingerprint
torch.save(torch.cat(backbone.inference_module()(pixels), 1), sys.argv[3])
"""


def test_pickles_into_a_fresh_process_without_weights(tmp_path):
    backbone = load_backbone("builtin", layer=["stage1", None])
    paths = [tmp_path / name for name in ("backbone.pkl", "pixels.pt", "rows.pt")]
    pickled = pickle.dumps(backbone)
    assert len(pickled) < 3000
    paths[0].write_bytes(pickled)
    torch.save(PIXELS, paths[1])
    subprocess.run([sys.executable, "-c", FRESH, *map(str, paths)], check=True)
    close(torch.load(paths[2], weights_only=True), embed(backbone))


def test_own_modules_pickle_and_copy_whole():
    backbone = load_backbone(tiny(), layer=["features.2", None], preprocessing=SMALL)
    expected = embed(backbone)
    pickled = pickle.dumps(backbone)
    for other in (copy.deepcopy(backbone), pickle.loads(pickled)):
        assert other.fingerprint == backbone.fingerprint
        assert other.network is backbone.network
        assert torch.equal(embed(other), expected)
    clear_networks()
    del backbone, other
    gc.collect()
    close(embed(pickle.loads(pickled)), expected)


# -- one network per process -----------------------------------------------------------------
def test_clones_share_one_network(monkeypatch):
    from sktransfer.networks import _weights

    clear_networks()
    n_read = []
    read = _weights.read_state_dict
    monkeypatch.setattr(
        _weights, "read_state_dict", lambda *args: n_read.append(args) or read(*args)
    )
    found = []

    def work():
        backbone = load_backbone("builtin", layer="stage3")
        found.append((backbone.network, embed(backbone)))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(network) for network, _ in found}) == 1
    assert all(torch.equal(found[0][1], rows) for _, rows in found)
    assert len(n_read) == 1
    load_backbone("builtin").network.module  # noqa: B018
    assert len(n_read) == 1


def test_no_more_than_a_few_networks_are_kept():
    backbones = [
        load_backbone(tiny(scale=float(k)), preprocessing=SMALL) for k in range(MAX_NETWORKS + 2)
    ]
    first = embed(backbones[0])
    assert len(_networks) == MAX_NETWORKS
    for backbone in backbones[1:]:
        embed(backbone)
    assert torch.equal(embed(backbones[0]), first)  # made again


# -- the inference copy ----------------------------------------------------------------------
def test_folding_leaves_the_network_as_it_was():
    backbone = load_backbone(tiny(), preprocessing=SMALL)
    module = backbone.network.module
    before = {key: value.clone() for key, value in module.state_dict().items()}
    inference = backbone.inference_module()
    assert not any(isinstance(part, nn.BatchNorm2d) for part in inference.modules())
    assert any(isinstance(part, nn.BatchNorm2d) for part in module.modules())
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert inference is backbone.inference_module("cpu", "float32")
    assert not any(p.requires_grad for p in inference.parameters())


def test_a_convolution_that_feeds_more_than_its_norm_is_not_folded():
    class Forked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.twice = nn.Conv2d(4, 4, 1)
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            x = self.conv(x)
            x = x + self.norm(x)
            x = self.norm(self.twice(x)) + self.norm(self.twice(x + 1))
            return self.fc(x.mean((2, 3)))

    module = Forked().eval()
    nn.init.uniform_(module.norm.running_mean)
    nn.init.uniform_(module.norm.running_var, 0.5, 2)
    backbone = load_backbone(module, preprocessing=SMALL)
    caught = []
    module.fc.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        module(normalised())
    close(embed(backbone), caught[0])


def test_embeddings_do_not_depend_on_the_batch_or_layout():
    backbone = load_backbone("builtin")
    rows = embed(backbone)
    close(torch.cat([embed(backbone, PIXELS[i : i + 1]) for i in range(3)]), rows)
    close(embed(backbone, PIXELS.contiguous(memory_format=torch.channels_last)), rows)
    half = embed(backbone, precision="bfloat16")
    assert half.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(half, rows).min() > 0.999


def test_copied_stages_are_independent_and_trainable():
    backbone = load_backbone("builtin")
    rows = embed(backbone)
    module, stages = backbone.copy_network()
    module.requires_grad_(True)
    assert stages.names == backbone.stage_names
    stages.run(normalised()).sum().backward()
    with torch.no_grad():
        for stage in stages:
            for p in stage.module.parameters():
                assert p.grad is not None
                p.add_(1)
    assert torch.equal(embed(backbone), rows)
    assert not any(p.requires_grad for s in backbone.stages for p in s.module.parameters())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda():
    for kwargs in ({"backbone": "builtin"}, {"backbone": tiny(), "preprocessing": SMALL}):
        backbone = load_backbone(**kwargs)
        on_cpu = embed(backbone)
        for precision, least in (("float32", 0.99999), ("float16", 0.999), ("bfloat16", 0.999)):
            rows = embed(backbone, PIXELS.cuda(), precision=precision).cpu()
            assert nn.functional.cosine_similarity(rows, on_cpu).min() > least
    on_cuda = load_backbone(tiny().cuda(), preprocessing=SMALL)
    assert on_cuda.fingerprint == load_backbone(tiny(), preprocessing=SMALL).fingerprint
    assert {p.device.type for p in on_cuda.network.module.parameters()} == {"cpu"}
