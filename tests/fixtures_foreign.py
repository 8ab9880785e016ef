"""Small networks of others, with random weights: torch's, timm's, Hugging Face's, and some in torchvision's form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import fixtures_supernet
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supernets.timm_models import declare_torchvision_operators


class BasicBlock(nn.Module):
    """As torchvision's: one ReLU that is used twice, an addition in place."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """As torchvision's, grouped where asked for."""

    def __init__(self, inputs: int, inner: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        outputs = 4 * inner
        self.conv1, self.bn1 = nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False, groups=groups)
        self.bn2, self.bn3 = nn.BatchNorm2d(inner), nn.BatchNorm2d(outputs)
        self.conv3, self.relu = nn.Conv2d(inner, outputs, 1, bias=False), nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + identity)


class ResNet(nn.Module):
    """As torchvision's, of two stages."""

    def __init__(self, *layers: nn.Module, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1, self.maxpool = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.MaxPool2d(2)
        self.layer1, self.layer2 = layers
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.layer2(self.layer1(x))), 1))


def basic() -> nn.Module:
    one = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8), BasicBlock(8, 8))
    return ResNet(one, nn.Sequential(BasicBlock(8, 16, 2), BasicBlock(16, 16)), channels=16)


def bottleneck(groups: int = 1) -> nn.Module:
    one = nn.Sequential(Bottleneck(8, 4, 1, groups), Bottleneck(16, 4, 1, groups))
    return ResNet(one, nn.Sequential(Bottleneck(16, 8, 2, groups), Bottleneck(32, 8, 1, groups)), channels=32)


class Encoder(nn.Module):
    """torch.nn.TransformerEncoder between an embedding and a classifier; takes token ids and a mask of padding."""

    def __init__(self, norm_first: bool = False, batch_first: bool = True, **more: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=batch_first, norm_first=norm_first, **more)
        self.embedding, self.batch_first = nn.Embedding(30, 16), batch_first
        self.encoder = nn.TransformerEncoder(layer, 4, nn.LayerNorm(16), enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, ids: Tensor, padding: Tensor | None = None) -> Tensor:
        x = self.embedding(ids)
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.encoder(x, src_key_padding_mask=padding)
        return self.head(x[:, 0] if self.batch_first else x[0])


def timm_resnet(block: str) -> nn.Module:
    declare_torchvision_operators()
    timm = pytest.importorskip("timm")
    kind = getattr(timm.models.resnet, block)
    return timm.models.resnet.ResNet(kind, [2, 2, 1, 1], num_classes=5, stem_width=8, channels=(8, 8, 16, 16))


def timm_vit() -> nn.Module:
    declare_torchvision_operators()
    timm = pytest.importorskip("timm")
    return timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=4, num_heads=4, num_classes=5, qk_norm=True, init_values=0.5
    )


def torchvision_vit() -> nn.Module:
    declare_torchvision_operators()
    models = pytest.importorskip("torchvision.models")
    return models.VisionTransformer(16, 4, 4, 4, 16, 24, num_classes=5)


class Classifier(nn.Module):
    """Hugging Face's BERT, giving its logits."""

    def __init__(self) -> None:
        super().__init__()
        declare_torchvision_operators()
        transformers = pytest.importorskip("transformers")
        config = transformers.BertConfig(
            vocab_size=30, hidden_size=16, num_hidden_layers=4, num_attention_heads=4, intermediate_size=24,
            max_position_embeddings=16, num_labels=5,
        )  # fmt: skip
        self.model = transformers.BertForSequenceClassification(config)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.model(ids, mask).logits


@dataclass(frozen=True, slots=True)
class Foreign:
    """A network that was not written for this, at a size that tests can afford."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]

    def network(self) -> nn.Module:
        """In double precision, with random norms."""
        torch.manual_seed(0)
        network = fixtures_supernet.randomise(self.make()).double().eval().requires_grad_(False)
        norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:  # with other statistics nothing of the input would be left at the end
            norm.train()
            norm.momentum = 1.0
        if norms:
            network(torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(2)).double())
        for norm in norms:
            norm.eval()
        generator = torch.Generator().manual_seed(1)
        for module in network.modules():
            if isinstance(module, nn.LayerNorm) or hasattr(module, "gamma"):
                for value in module._parameters.values():
                    if value is not None:
                        value.add_(0.3 * torch.randn(value.shape, generator=generator))
            elif isinstance(module, nn.Linear):  # of the usual beginnings nothing of the input would be left
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * module.in_features**-0.5)
        return network


def _images() -> tuple[Tensor, ...]:
    return (torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double(),)


def _texts(padding: bool = False) -> tuple[Tensor, ...]:
    ids = torch.randint(0, 30, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(7) < torch.tensor([7, 5, 3])[:, None]
    return ids, ~mask if padding else mask.long()


FOREIGN = {
    "basic": Foreign(basic, _images),
    "bottleneck": Foreign(bottleneck, _images),
    "timm basic": Foreign(lambda: timm_resnet("BasicBlock"), _images),
    "timm bottleneck": Foreign(lambda: timm_resnet("Bottleneck"), _images),
    "timm vit": Foreign(timm_vit, _images),
    "torchvision vit": Foreign(torchvision_vit, _images),
    "torch encoder": Foreign(Encoder, lambda: _texts(padding=True)),
    "torch encoder, norm first": Foreign(lambda: Encoder(norm_first=True), lambda: _texts(padding=True)),
    "torch encoder, batch second": Foreign(lambda: Encoder(batch_first=False), lambda: _texts(padding=True)),
    "hugging face": Foreign(Classifier, _texts),
}
