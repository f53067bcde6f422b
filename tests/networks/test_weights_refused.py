"""Weights files and modules whose tensors are not plain numbers, all there and finite."""

import io
import re
import zipfile

import pytest
import safetensors.torch
import torch
from tiny_networks import Tiny
from torch import nn

from sktransfer import load_backbone

pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse CSR tensor", "ignore:The PyTorch API of nested"
)
KEY = "stage1.0.weight"
SHAPE = (4, 3, 3, 3)


def state(tensor=None, key=KEY):
    torch.manual_seed(0)
    own = Tiny().state_dict()
    return own if tensor is None else {**own, key: tensor}


def part_of_another(tensor):
    return torch.cat([tensor.flatten(), torch.zeros(999)])[: tensor.numel()].view(tensor.shape)


ODD = {
    "meta": (lambda w: w.to("meta"), "holds no values (it is on the meta device)"),
    "meta, in the head": (lambda w: {**state(), "fc.bias": w.to("meta")}, "holds no values"),
    "expanded": (lambda w: torch.zeros(1).expand(SHAPE), f"has the shape {SHAPE}, for which the"),
    "overlapping": (lambda w: torch.zeros(60).as_strided(SHAPE, (1, 2, 3, 4)), "has the shape"),
    "views of few": (
        lambda w: {**state(), **{f"x{i}": part[i:] for part in [w.flatten()] for i in range(9)}},
        "'x1' has the shape (107,), for which the values are missing",
    ),
    "unknown and huge": (lambda w: {**state(), "x": torch.zeros(1).expand(10**11)}, "'x' has the"),
    "sparse": (lambda w: w.to_sparse(), "is torch.sparse_coo, not dense"),
    "sparse rows": (lambda w: torch.eye(3).to_sparse_csr(), "is torch.sparse_csr, not dense"),
    "nested": (lambda w: torch.nested.nested_tensor([w[0], w[1]]), "is nested, not dense"),
    "complex": (lambda w: w.to(torch.complex64), "is of type torch.complex64"),
    "8 bits": (lambda w: w.to(torch.float8_e4m3fn), "is of type torch.float8_e4m3fn"),
    "numbers as names": (lambda w: {**state(), 0: w}, "0 has a name that is not a string"),
    "nested names": (lambda w: {"state_dict": {1: w}}, "1 has a name that is not a string"),
    "int8": (lambda w: (w * 9).to(torch.int8), f"{KEY} ({SHAPE} int8 in the file, {SHAPE})"),
    "bool": (lambda w: w > 0, f"{KEY} ({SHAPE} bool in the file, {SHAPE})"),
    "0-d": (lambda w: w.sum(), f"{KEY} (() in the file, {SHAPE})"),
}


@pytest.mark.parametrize(("change", "message"), ODD.values(), ids=ODD)
@pytest.mark.parametrize("backbone", [Tiny, Tiny()], ids=["built", "module"])
def test_a_file_without_plain_numbers(tmp_path, change, message, backbone):
    changed = change(state()[KEY])
    path = tmp_path / "weights.pth"
    torch.save(changed if isinstance(changed, dict) else state(changed), path)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}[\s\S]*{re.escape(message)}"):
        load_backbone(backbone, weights=path)


@pytest.mark.parametrize("kind", ["8 bits", "int8", "bool"])
def test_the_same_in_safetensors(tmp_path, kind):
    change, message = ODD[kind]
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(state(change(state()[KEY])), path)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_backbone(Tiny(), weights=path)


def test_a_compressed_file_is_not_unpacked(tmp_path):
    """A small file may hold any number of zeros."""
    plain, path = io.BytesIO(), tmp_path / "weights.pt"
    torch.save({**state(), "x": torch.zeros(10**6)}, plain)
    with (
        zipfile.ZipFile(plain) as source,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry.filename))
    with pytest.raises(ValueError, match=r"weights.pt is compressed, and holds 4,\d+,\d+ bytes"):
        load_backbone(Tiny(), weights=path)


PLAIN = {
    "parameters": lambda s: {key: nn.Parameter(t, requires_grad=False) for key, t in s.items()},
    "views": lambda s: {key: part_of_another(tensor) for key, tensor in s.items()},
    "transposed": lambda s: {**s, KEY: s[KEY].transpose(0, 1).contiguous().transpose(0, 1)},
    "float64": lambda s: {key: t.double() if t.is_floating_point() else t for key, t in s.items()},
    "negated": lambda s: {**s, KEY: torch._neg_view(-s[KEY])},
    "all of them half": lambda s: {key: tensor.half() for key, tensor in s.items()},
}


@pytest.mark.parametrize("change", PLAIN.values(), ids=PLAIN)
def test_what_is_plain_is_accepted(tmp_path, change):
    path = tmp_path / "weights.pth"
    torch.save(change(state()), path)
    module = Tiny()
    module.load_state_dict(state())
    x = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    rows = load_backbone(Tiny(), weights=path).inference_module()(x)[0]
    expected = load_backbone(module).inference_module()(x)[0]
    torch.testing.assert_close(rows, expected, rtol=0.01, atol=0.01)


# -- numbers that are none --------------------------------------------------------------------
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("key", [KEY, "stage2.1.running_var", "fc.bias"])
def test_weights_that_are_not_finite_are_warned_of(tmp_path, value, key):
    path = tmp_path / "weights.pth"
    broken = state()[key].clone()
    broken.view(-1)[0] = value
    torch.save(state(broken, key), path)
    if key == "fc.bias" or (key != KEY and value == -torch.inf):
        load_backbone(Tiny(), weights=path)  # the head is not used, and a buffer may be a mask
        return
    message = rf"weights.pth: 1 tensors hold NaN or infinity, the first of them '{key}', so embed"
    with pytest.warns(UserWarning, match=message):
        load_backbone(Tiny(), weights=path)
    module = Tiny()
    module.load_state_dict(state(broken, key))
    with pytest.warns(UserWarning, match="^Tiny: 1 tensors hold NaN or infinity"):
        load_backbone(module)


# -- modules ----------------------------------------------------------------------------------
MODULES = {
    "a buffer on meta": (torch.zeros(3, device="meta"), "holds no values in 'extra' yet"),
    "complex": (
        nn.Parameter(torch.zeros(3, dtype=torch.complex64)),
        "'extra' is of type torch.",
    ),
    "sparse": (nn.Parameter(torch.eye(3).to_sparse()), "'extra' is torch.sparse_coo, not dense"),
}


@pytest.mark.parametrize(("tensor", "message"), MODULES.values(), ids=MODULES)
def test_a_module_without_plain_numbers(tensor, message):
    module = Tiny()
    if isinstance(tensor, nn.Parameter):
        module.extra = tensor
    else:
        module.register_buffer("extra", tensor)
    with pytest.raises(ValueError, match=message):
        load_backbone(module)
