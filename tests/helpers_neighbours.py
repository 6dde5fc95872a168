"""Nets of other projects, written from their definitions: float64, random numbers everywhere, their own names."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3
from torchvision.models.segmentation.fcn import FCN, FCNHead

MEAN_BGR = (104.00698793, 116.66876762, 122.67891434)
MEAN_RGB, STD_RGB = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = 5


def resnet(depths: tuple[int, ...] = (1, 1, 1, 1), **options) -> ResNet:
    """torchvision's ResNet with bottleneck blocks."""
    return ResNet(Bottleneck, list(depths), **options)


def random_image(height: int, width: int, count: int = 1) -> Tensor:
    """(count, 3, height, width) RGB in 0..255."""
    generator = torch.Generator().manual_seed(height)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator).double()


@torch.no_grad()
def trained(net: nn.Module, forward: Callable[[Tensor], object]) -> None:
    """Give ``net`` random weights in float64, and the batch statistics of random images, as training does."""
    net.double().train()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches
            nn.init.uniform_(module.weight, -0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
    forward(random_image(65, 57, count=3))
    net.eval()
    for tensor in net.state_dict().values():
        tensor.copy_(tensor.float())  # rounded as in a file


def normalised(rgb: Tensor) -> Tensor:
    """(N, 3, H, W) of 0..255 -> the input of torchvision's nets."""
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN_RGB, STD_RGB))
    return (rgb / 255 - mean) / std


def mean_subtracted(rgb: Tensor) -> Tensor:
    """(N, 3, H, W) of 0..255 -> the input of the nets here."""
    return (rgb.flip(1) - torch.tensor(MEAN_BGR, dtype=torch.float64)[:, None, None]).float()


def first_layer(conv: nn.Conv2d, rgb: Tensor, our_border: bool) -> Tensor:
    """``conv`` of the normalised image, padded with zeros, or with the colour that zeros mean in our input."""
    if not our_border:
        return conv(normalised(rgb))
    width = conv.padding[0]
    colour = torch.tensor(MEAN_BGR[::-1], dtype=torch.float64)[:, None, None]
    padded = F.pad(rgb.double() - colour, (width,) * 4) + colour
    return F.conv2d(normalised(padded), conv.weight, stride=conv.stride)


class SemsegPSPNet(nn.Module):
    """hszhao/semseg's PSPNet, from the paper and the names, widths and order in its file."""

    def __init__(self, depths: tuple[int, ...] = (1, 1, 1, 1)) -> None:
        super().__init__()
        self.layer0 = nn.Sequential()
        for given, channels, stride in ((3, 64, 2), (64, 64, 1), (64, 128, 1)):
            conv = nn.Conv2d(given, channels, 3, stride, 1, bias=False)
            self.layer0.extend([conv, nn.BatchNorm2d(channels), nn.ReLU()])
        self.layer0.append(nn.MaxPool2d(3, 2, 1))
        body = resnet(depths)
        body.layer1[0].conv1 = nn.Conv2d(128, 64, 1, bias=False)
        body.layer1[0].downsample[0] = nn.Conv2d(128, 256, 1, bias=False)
        self.layer1, self.layer2, self.layer3, self.layer4 = body.layer1, body.layer2, body.layer3, body.layer4
        for stage, dilation in ((self.layer3, 2), (self.layer4, 4)):
            for conv in (module for module in stage.modules() if isinstance(module, nn.Conv2d)):
                conv.stride = (1, 1)
                if conv.kernel_size == (3, 3):
                    conv.dilation = conv.padding = (dilation, dilation)
        self.ppm = nn.Module()
        self.ppm.features = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(n), nn.Conv2d(2048, 512, 1, bias=False), nn.BatchNorm2d(512), nn.ReLU())
            for n in (1, 2, 3, 6)
        )
        self.cls, self.aux = (
            nn.Sequential(
                nn.Conv2d(given, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Dropout2d(0.1),
                nn.Conv2d(width, CLASSES, 1),
            )
            for given, width in ((4096, 512), (1024, 256))
        )
        trained(self, self)

    def stem(self, rgb: Tensor, our_border: bool) -> Tensor:
        return self.layer0[1:](first_layer(self.layer0[0], rgb, our_border))

    def forward(self, rgb: Tensor, our_border: bool = False) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W) of 0..255 -> the logits of both heads at an eighth of the size."""
        third = self.layer3(self.layer2(self.layer1(self.stem(rgb, our_border))))
        x = self.layer4(third)
        pooled = [F.interpolate(part(x), x.shape[2:], mode="bilinear", align_corners=True) for part in self.ppm.features]
        return self.cls(torch.cat([x, *pooled], 1)), self.aux(third)


def conv_bn_relu(given: int, channels: int, size: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(given, channels, size, padding=size // 2, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]


def aspp(width: int = 8) -> nn.Module:
    """A narrow ASPP with torchvision's names."""
    module = nn.Module()
    module.convs = nn.ModuleList(nn.Sequential(*conv_bn_relu(2048, width)) for _ in range(4))
    module.convs.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_bn_relu(2048, width)))
    module.project = nn.Sequential(*conv_bn_relu(5 * width, width))
    return module


def over_torchvision(name: str) -> nn.Module:
    """A segmentation net over torchvision's ResNet at output stride 8, ``net.backbone``, with its original dilations."""
    backbone = resnet(replace_stride_with_dilation=[False, True, True])
    if name.startswith("torchvision"):
        layers = IntermediateLayerGetter(backbone, {"layer4": "out", "layer3": "aux"})
        of = {"torchvision DeepLabv3": (DeepLabV3, DeepLabHead), "torchvision FCN": (FCN, FCNHead)}
        kind, head = of[name]
        net = kind(layers, head(2048, CLASSES), FCNHead(1024, CLASSES))
    else:
        del backbone.fc
        net = nn.Module()
        net.backbone, end = backbone, [*conv_bn_relu(8, 8, 3), nn.Conv2d(8, CLASSES, 1)]
        if name == "VainF DeepLabv3":
            net.classifier = nn.Module()
            net.classifier.classifier = nn.Sequential(aspp(), *end)
        elif name == "VainF DeepLabv3+":
            net.classifier = nn.Module()
            net.classifier.project, net.classifier.aspp = nn.Sequential(*conv_bn_relu(256, 48)), aspp()
            net.classifier.classifier = nn.Sequential(*end)
        else:
            for block, dilation in (*((block, 2) for block in backbone.layer3), *zip(backbone.layer4, (4, 8, 16))):
                block.conv2.dilation = block.conv2.padding = (dilation, dilation)
            net.aspp, net.decoder = nn.Module(), nn.Module()
            for n in range(1, 5):
                branch = nn.Module()
                branch.atrous_conv, branch.bn = nn.Conv2d(2048, 8, 3, bias=False), nn.BatchNorm2d(8)
                setattr(net.aspp, f"aspp{n}", branch)
            net.aspp.global_avg_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_bn_relu(2048, 8))
            net.aspp.conv1, net.aspp.bn1 = nn.Conv2d(40, 8, 1, bias=False), nn.BatchNorm2d(8)
            net.decoder.conv1, net.decoder.bn1 = nn.Conv2d(256, 48, 1, bias=False), nn.BatchNorm2d(48)
            net.decoder.last_conv = nn.Sequential(nn.Conv2d(56, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    trained(net, lambda rgb: features(net.backbone, rgb))
    return net


def features(backbone: nn.Module, rgb: Tensor, our_border: bool = False) -> Tensor:
    """The output of stage 4."""
    x = F.relu(backbone.bn1(first_layer(backbone.conv1, rgb, our_border)))
    x = F.max_pool2d(x, 3, 2, 1)
    for stage in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4):
        x = stage(x)
    return x
