"""The list of networks that have a name."""

import pytest

from sktransfer import list_backbones, load_backbone


def test_the_whole_list():
    table = list_backbones()
    assert len(table) == 81
    assert table[0].name == "builtin"
    row = table["resnet50"]
    assert (row.input_size, row.n_features, row.weights[0]) == (224, None, "IMAGENET1K_V2")
    assert row.parameters == pytest.approx(25.56, abs=0.01)
    assert row.multiply_adds == pytest.approx(4.09, abs=0.01)
    assert all(row.input_size and row.parameters and row.multiply_adds for row in table)
    with pytest.raises(KeyError, match="resnet51"):
        table["resnet51"]


def test_patterns():
    assert [row.name for row in list_backbones("vgg1?")] == ["vgg11", "vgg13", "vgg16", "vgg19"]
    assert [row.name for row in list_backbones("Inception*")] == ["inception_v3"]
    assert "wide_resnet50_2" in [row.name for row in list_backbones("RESNET")]
    assert list_backbones("nothing") == []
    with pytest.raises(TypeError, match="pattern=3 is not a string"):
        list_backbones(3)


def test_how_it_is_shown():
    table = list_backbones("resnet1?")
    assert repr(table).splitlines()[1].split() == [
        "resnet18", "224", "512", "11.7", "1.81", "IMAGENET1K_V1"
    ]  # fmt: skip
    assert "multiply-adds (G)" in repr(list_backbones()[:3])
    assert "<th" in table._repr_html_()
    assert "<td" in table._repr_html_()
    pytest.importorskip("pandas")
    frame = table.to_pandas()
    assert list(frame.columns)[:3] == ["name", "input_size", "n_features"]
    assert frame["n_features"].tolist() == [512]


@pytest.mark.parametrize("pattern", ["builtin", "squeezenet*", "mobilenet*", "regnet_?_400mf"])
def test_it_agrees_with_the_networks(pattern):
    for row in list_backbones(pattern):
        backbone = load_backbone(row.name, weights=None)
        assert (backbone.n_features, backbone.input_size[1]) == (row.n_features, row.input_size)
        n_parameters = sum(p.numel() for p in backbone.network.module.parameters())
        assert n_parameters / 1e6 == pytest.approx(row.parameters)


def test_timm():
    pytest.importorskip("timm")
    (row,) = list_backbones("timm:legacy_xception")
    assert (row.input_size, row.n_features, row.weights) == (299, 2048, ("DEFAULT",))
    assert row.parameters == pytest.approx(22.9, abs=0.1)
    assert len(list_backbones("timm:*")) > 500
    assert {"resnet18", "timm:resnet18"} <= {row.name for row in list_backbones(timm=True)}
