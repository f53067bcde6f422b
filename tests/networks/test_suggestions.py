"""Unknown names: the error names the nearest ones that are known."""

import numpy as np
import pytest

from sktransfer import (
    FineTuningClassifier,
    FineTuningRegressor,
    PretrainedFeatureExtractor,
    load_backbone,
)

OF_TORCHVISION = {
    "resnt50": "'resnet50'",
    "ResNet50": "'resnet50'",
    "EfficientNetB0": "'efficientnet_b0'",
    "convnext-tiny": "'convnext_tiny'",
    "InceptionV3": "'inception_v3'",
    "ViT-B/32": "'vit_b_32'",
    "built-in": "'builtin'",
}
OF_TIMM = {
    "clip": r"'timm:\w*clip\w*'.* list_backbones\('timm:\*clip\*'\) lists",
    "dinov2_vits14": r"'timm:vit_small_patch14_dinov2'.* list_backbones\('timm:\*dinov2\*'\) l",
    "facebook/dinov2-base": "'timm:vit_base_patch14_dinov2'",
    "google/vit-base-patch16-224": "'timm:vit_base_patch16_224'",
    "microsoft/resnet-50": "'timm:resnet50'",
    "swin_tiny_patch4_window7_224": "'timm:swin_tiny_patch4_window7_224'",
    "resnet26": "'timm:resnet26'",
    "timm:dinov2_vits14": "'timm:vit_small_patch14_dinov2'",
    "timm:google/vit-base-patch16-224": "'timm:vit_base_patch16_224'",
}


@pytest.mark.parametrize(("name", "nearest"), OF_TORCHVISION.items(), ids=OF_TORCHVISION)
def test_networks_of_torchvision(name, nearest):
    with pytest.raises(ValueError, match=f"is not known. Did you mean ('.*)?{nearest}"):
        load_backbone(name)


@pytest.mark.parametrize(("name", "nearest"), OF_TIMM.items(), ids=OF_TIMM)
def test_networks_of_timm(name, nearest):
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=f"Did you mean ('.*)?{nearest}"):
        load_backbone(name)


def test_a_name_that_is_near_to_nothing():
    with pytest.raises(ValueError, match=r"'xyzzy' is not known\. list_backbones\(\) lists"):
        load_backbone("xyzzy")


STRINGS = [
    (PretrainedFeatureExtractor, {"pooling": "mean"}, "avg"),
    (PretrainedFeatureExtractor, {"precision": "fp16"}, "float16"),
    (
        PretrainedFeatureExtractor,
        {"backbone": "resnet18", "weights": "IMAGENET1K_V3"},
        "IMAGENET1K_V1",
    ),
    (FineTuningClassifier, {"pooling": "average"}, "avg"),
    (FineTuningClassifier, {"optimizer": "admw"}, "adamw"),
    (FineTuningClassifier, {"augment": "lite"}, "light"),
    (FineTuningClassifier, {"augment": ["lite"]}, "light"),
    (FineTuningClassifier, {"unfreeze": "ALL"}, "all"),
    (FineTuningClassifier, {"unfreeze": {1: "al"}}, "all"),
    (FineTuningClassifier, {"class_weight": "balance"}, "balanced"),
    (FineTuningClassifier, {"head_init": "linear-probe"}, "linear_probe"),
    (FineTuningClassifier, {"precision": "bf16"}, "bfloat16"),
    (FineTuningClassifier, {"early_stopping": "Auto"}, "auto"),
    (FineTuningClassifier, {"layer": "stge4"}, "stage4"),
    (FineTuningClassifier, {"weights": "DEFUALT"}, "DEFAULT"),
    (FineTuningRegressor, {"loss": "hubber"}, "huber"),
]


@pytest.mark.parametrize(
    ("cls", "parameters", "nearest"), STRINGS, ids=lambda value: str(value)[-40:]
)
def test_parameters(cls, parameters, nearest):
    X = np.zeros((4, 8, 8, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=rf"Did you mean '{nearest}'"):
        cls(**parameters).fit(X, [0, 1, 0, 1])


def test_values_that_are_near_to_nothing():
    X = np.zeros((4, 8, 8, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"Got 'lion' instead\.$"):
        FineTuningClassifier(optimizer="lion").fit(X, [0, 1, 0, 1])


def test_load_backbone():
    with pytest.raises(ValueError, match=r"pooling='mean' is not accepted: .* Did you mean 'avg'"):
        load_backbone("builtin", pooling="mean")
