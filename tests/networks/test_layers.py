"""Layers and poolings of a backbone, against the network run by hand."""

import pytest
import torch
from torch import nn
from two_stages import PIXELS, SMALL, Tiny, Tokens, close, embed, normalised, tiny

from sktransfer import load_backbone

pytestmark = pytest.mark.usefixtures("one_thread")


# -- layers and pooling ----------------------------------------------------------------------
def maps(module):
    with torch.no_grad():
        return {
            "features.2": module.features[:3](normalised()),
            "features.5": module.features(normalised()),
        }


@pytest.mark.parametrize("layer", ["features.2", "features.5", "features.3", "features"])
@pytest.mark.parametrize(
    ("pooling", "pool"),
    [
        ("auto", lambda x: x.mean((2, 3))),
        ("avg", lambda x: x.mean((2, 3))),
        ("max", lambda x: x.amax((2, 3))),
        ("avgmax", lambda x: torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)),
        ("gem", lambda x: x.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3)),
        ("flatten", lambda x: x.flatten(1)),
    ],
)
def test_layer_and_pooling(layer, pooling, pool):
    module = tiny()
    with torch.no_grad():
        upto = {"features.2": 3, "features.3": 4, "features.5": 6, "features": 6}[layer]
        expected = pool(module.features[:upto](normalised()))
    backbone = load_backbone(module, layer=layer, pooling=pooling, preprocessing=SMALL)
    assert backbone.feature_groups == [(layer, expected.shape[1])]
    close(embed(backbone), expected)


@pytest.mark.parametrize("pooling", ["max", "avgmax", "gem", "flatten"])
def test_other_poolings_of_the_embedding_act_on_the_last_map(pooling):
    got = load_backbone(tiny(), pooling=pooling, preprocessing=SMALL)
    expected = load_backbone(tiny(), layer="features.5", pooling=pooling, preprocessing=SMALL)
    close(embed(got), embed(expected))
    assert got.n_features == expected.n_features


def test_several_layers_are_joined_in_order_from_one_pass():
    module = tiny()
    layers = ["features.5", None, "features.2"]
    backbone = load_backbone(module, layer=layers, preprocessing=SMALL)
    assert backbone.feature_groups == [("features.5", 10), ("embedding", 10), ("features.2", 6)]
    assert backbone.n_features == 26
    alone = [embed(load_backbone(module, layer=k, preprocessing=SMALL)) for k in layers]
    close(embed(backbone), torch.cat(alone, 1))
    for k, layer in enumerate(layers):
        one = load_backbone(module, layer=layer, preprocessing=SMALL)
        assert one.fingerprint == backbone.group_fingerprints[k]
    convs = [m for m in backbone.inference_module().modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 2


@pytest.mark.parametrize(
    ("network", "inner"),
    [
        (tiny, []),
        ("builtin", ["stage1", "stage2", "stage3"]),
        ("mobilenet_v2", [f"features.{k}" for k in (1, 3, 6, 10, 13, 16)]),
        ("vgg11", ["features.5", "features.10", "features.15", "features.20", "classifier.1"]),
        ("squeezenet1_1", ["features.5", "features.8"]),
        ("timm:resnet10t", ["layer1", "layer2", "layer3"]),
    ],
)
def test_all_layers_are_the_stages_and_the_embedding(network, inner):
    network = network() if callable(network) else network
    weights = "DEFAULT" if network == "builtin" or isinstance(network, nn.Module) else None
    got = load_backbone(network, weights=weights, layer="all")
    assert [label for label, _ in got.feature_groups] == [*inner, "embedding"]
    joined = load_backbone(network, weights=weights, layer=[*inner, None])
    assert got.group_fingerprints == joined.group_fingerprints


def test_all_layers_in_a_list():
    backbone = load_backbone("builtin", layer=["stem", "all"])
    assert [width for _, width in backbone.feature_groups] == [32, 48, 96, 192, 1408]


class InPlace(nn.Module):
    """Writes over what it has just computed."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 5, 1)
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(5, 2)

    def forward(self, x):
        x = self.relu(self.conv1(x))
        y = self.conv2(x)
        y += x
        return self.fc(self.relu(y).mean((2, 3)))


def test_a_layer_that_is_written_over_is_pooled_before():
    module = InPlace().eval()
    layers = ["conv1", "conv2", "add", None]
    backbone = load_backbone(module, layer=layers, preprocessing=SMALL)
    alone = [embed(load_backbone(module, layer=k, preprocessing=SMALL)) for k in layers]
    with torch.no_grad():
        first = module.conv1(normalised())
        second = module.conv2(first.relu())
    close(alone[0], first.mean((2, 3)))
    close(alone[1], second.mean((2, 3)))
    close(alone[2], (second + first.relu()).mean((2, 3)))
    close(embed(backbone), torch.cat(alone, 1))


class Statements(InPlace):
    """Writes over values without using what the operation returns."""

    def forward(self, x):
        x = self.conv1(x)
        self.relu(x)
        y = self.conv2(x)
        y.mul_(2)
        return self.fc(y.mean((2, 3)))


class Aliases(InPlace):
    """Writes over a value through a view of it."""

    def forward(self, x):
        x = self.conv1(x)
        x[:, :2].mul_(3)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("kind", [InPlace, Statements, Aliases])
def test_networks_that_write_over_their_values(kind):
    module = kind().eval()
    caught = []
    hook = module.fc.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        module(normalised())
    hook.remove()
    close(embed(load_backbone(module, preprocessing=SMALL)), caught[0])


def test_what_lies_behind_the_layer_is_not_computed():
    backbone = load_backbone("builtin", layer="stage1")
    small = sum(p.numel() for p in backbone.inference_module().parameters())
    whole = sum(p.numel() for p in backbone.network.module.parameters())
    assert small < 50_000 < whole


def test_tokens():
    module = Tokens().eval()
    with torch.no_grad():
        tokens = module.blocks[0](module.embed(normalised()).flatten(2).transpose(1, 2))
    backbone = load_backbone(module, layer="blocks.0", preprocessing=SMALL)
    close(embed(backbone), tokens.mean(1))
    flat = load_backbone(module, layer="blocks.0", pooling="flatten", preprocessing=SMALL)
    assert flat.n_features == 16 * 8
    with pytest.raises(ValueError, match="a sequence of tokens, and the network classifies"):
        load_backbone(module, layer="blocks.0", pooling="cls", preprocessing=SMALL)


def test_class_token():
    backbone = load_backbone("vit_b_32", weights=None, layer="encoder_layer_3")
    vit = backbone.network.module
    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        x = vit._process_input(normalised(pixels))
        x = torch.cat([vit.class_token.expand(2, -1, -1), x], 1) + vit.encoder.pos_embedding
        tokens = vit.encoder.layers[:4](x)
    torch.testing.assert_close(embed(backbone, pixels), tokens[:, 0], rtol=1e-4, atol=1e-5)
    by_name = load_backbone("vit_b_32", weights=None, layer="encoder_layer_3", pooling="cls")
    assert by_name.fingerprint == backbone.fingerprint
    average = load_backbone("vit_b_32", weights=None, layer="encoder_layer_3", pooling="avg")
    expected = tokens[:, 1:].mean(1)  # the class token is no place
    torch.testing.assert_close(embed(average, pixels), expected, rtol=1e-4, atol=1e-5)


def test_channels_last_maps():
    preprocessing = {"size": 96, "crop": 96}
    backbone = load_backbone(
        "swin_t", weights=None, layer=["features.1", "features.7"], preprocessing=preprocessing
    )
    assert backbone.feature_groups == [("features.1", 96), ("features.7", 768)]
    pixels = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    with torch.no_grad():
        features = backbone.network.module.features
        expected = [features[:k](normalised(pixels)).mean((1, 2)) for k in (2, 8)]
    close(embed(backbone, pixels), torch.cat(expected, 1))


class RowsFirst(nn.Module):
    """Keeps channels last, with as many channels as there are rows."""

    def __init__(self):
        super().__init__()
        self.conv, self.mix, self.fc = nn.Conv2d(3, 24, 1), nn.Linear(24, 24), nn.Linear(24, 2)

    def forward(self, x):
        x = self.mix(self.conv(x).permute(0, 2, 3, 1))
        return self.fc(x.mean((1, 2)))


def test_layout_of_a_map_with_as_many_channels_as_rows():
    pixels, size = PIXELS[:, :, :24, :24], {"size": 24, "crop": 24}
    module = RowsFirst().eval()
    with torch.no_grad():
        first = module.conv(normalised(pixels))
        last = module.mix(first.permute(0, 2, 3, 1))
    assert first.shape[1:] == last.shape[1:] == (24, 24, 24)
    close(
        embed(load_backbone(module, layer="conv", preprocessing=size), pixels), first.mean((2, 3))
    )
    close(embed(load_backbone(module, layer="mix", preprocessing=size), pixels), last.mean((1, 2)))


def test_networks_that_cannot_be_traced():
    class Branching(Tiny):
        def forward(self, x):
            x = self.features(x)
            return self.fc(torch.relu(x).mean((2, 3)) if x.sum() > 0 else x.mean((2, 3)))

    module = Branching().eval()
    backbone = load_backbone(module, layer=["features.2", None], preprocessing=SMALL)
    assert backbone.feature_groups == [("features.2", 6), ("embedding", 10)]
    with torch.no_grad():
        first = module.features[:3](normalised())
        last = torch.relu(module.features(normalised())).mean((2, 3))
    close(embed(backbone), torch.cat([first.mean((2, 3)), last], 1))
    with pytest.raises(ValueError, match="layer='nothing' is not in Branching"):
        load_backbone(module, layer="nothing", preprocessing=SMALL)
