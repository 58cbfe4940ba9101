"""Surrogates and learners by name; normalisation is inside the model, and the stem follows the image size.

Nets made for ImageNet halve an image two to four times before they look at it, which leaves nothing of 32 pixels, and
protection measured with them is another number (a learner's stem moves it from 20 to 50 %). So below LARGE pixels:

    resnet18, resnet50, densenet121   3x3 stride-1 first convolution, no max-pool
    mobilenet_v2, efficientnet_v2_s   stride 1 in the first convolution and in the first stage that halves
    vgg16_bn                          halves late by itself; global pooling and one linear layer as head, not three
    deit_tiny                         patches of 4 pixels, not 16
    wrn34_10, small, tiny             made for small images; the same net at every size
    resnet18_stride1                  resnet18's small stem at every size: what SEM's and REM's code runs on ImageNet,
                                      for about 15 times the cost of the original net

and from LARGE pixels on the original net. Dropout and stochastic depth are off: they draw from torch's global
generator, so a resumed run would differ from an uninterrupted one. No net comes with trained weights.

Every name may end in "+injected", "tiny+injected": the net with noise injected into its weights
(semkit.nets.injection).
"""

import difflib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from semkit.images.chance import seeded
from semkit.images.pixels import check_count
from semkit.nets.injection import with_noise_injection

INJECTED = "+injected"
LARGE = 64  # pixels, from which an image is large enough for the ImageNet stem


class Centre(nn.Module):
    """x - 0.5: images in [0,1] centred with their unit scale kept, so that a radius of r levels stays r/255."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - 0.5


class Pooled(nn.Module):
    """The mean over all pixels: [N,C,H,W] -> [N,C,1,1].

    The gradient of torch's own pooling lies in memory as [N,C,H,W], whatever the net's order is, and what stands before
    it then walks through two orders at once: a twelfth of tiny's input gradient.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1).flatten(1, 2).mean(1)[:, :, None, None]


class Residual(nn.Module):
    """relu(norm(conv(relu(norm(conv(x))))) + shortcut(x)), the shortcut a 1x1 convolution where the shape changes."""

    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        self.shortcut = nn.Identity()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


class PreActivation(nn.Module):
    """conv(act(conv(act(x)))) + x, act = relu(norm(.)); where the shape changes, + a 1x1 convolution of act(x).

    Source: Zagoruyko & Komodakis, BMVC 2016, after He et al., ECCV 2016.
    """

    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inside, outside, 1, stride, bias=False) if inside != outside else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        active = F.relu(self.norm1(x))
        inner = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return inner + (x if self.shortcut is None else self.shortcut(active))


def _kaiming(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def small(classes: int, size: int = 32, widths: tuple[int, ...] = (32, 64, 128)) -> nn.Module:
    """The lesson net: a stride-2 stem and one residual block per width."""
    layers = [Centre(), nn.Conv2d(3, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    for inside, outside in zip((widths[0], *widths), widths, strict=False):
        layers.append(Residual(inside, outside, 1 if inside == outside else 2))
    return nn.Sequential(*layers, Pooled(), nn.Flatten(), nn.Linear(widths[-1], classes))


def tiny(classes: int, size: int = 32) -> nn.Module:
    """The lesson net, three quarters as wide."""
    return small(classes, size, (24, 48, 96))


def wrn34_10(classes: int, size: int = 32, depth: int = 34, widen: int = 10) -> nn.Module:
    """The wide residual net: a 3x3 convolution, three stages of (depth - 4) / 6 pre-activation blocks, no dropout.

    Source: Zagoruyko & Komodakis, BMVC 2016.
    """
    inside, blocks = 16, []
    for stage, width in enumerate((16 * widen, 32 * widen, 64 * widen)):
        for block in range((depth - 4) // 6):
            blocks.append(PreActivation(inside, width, 2 if stage and not block else 1))
            inside = width
    stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
    head = [nn.BatchNorm2d(inside), nn.ReLU(), Pooled(), nn.Flatten(), nn.Linear(inside, classes)]
    return _kaiming(nn.Sequential(Centre(), stem, *blocks, *head))


def _stem(outside: int, mode: str) -> nn.Conv2d:
    """A 3x3 stride-1 first convolution, initialised as the library does the net's other ones."""
    conv = nn.Conv2d(3, outside, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode=mode, nonlinearity="relu")
    return conv


def _keep_size(*stages: nn.Module) -> None:
    for module in (m for stage in stages for m in stage.modules() if isinstance(m, nn.Conv2d)):
        module.stride = (1, 1)


def _resnet(name: str, classes: int, size: int) -> nn.Module:
    import torchvision

    model = getattr(torchvision.models, name)(weights=None, num_classes=classes)
    if size < LARGE:
        model.conv1, model.maxpool = _stem(64, "fan_out"), nn.Identity()
    model.avgpool = Pooled()
    return nn.Sequential(Centre(), model)


def resnet18(classes: int, size: int = 32) -> nn.Module:
    """He et al., CVPR 2016: the published surrogate and learner."""
    return _resnet("resnet18", classes, size)


def resnet18_stride1(classes: int, size: int = 32) -> nn.Module:
    """resnet18 with the small stem at every size, as in the released code of REM and SEM."""
    return _resnet("resnet18", classes, 32)


def resnet50(classes: int, size: int = 32) -> nn.Module:
    """He et al., CVPR 2016, in torchvision's form (stride on the 3x3 convolution)."""
    return _resnet("resnet50", classes, size)


def vgg16_bn(classes: int, size: int = 32) -> nn.Module:
    """Simonyan & Zisserman, ICLR 2015, with batch normalisation. Raises ValueError below 32 pixels."""
    if size < 32:
        raise ValueError(f"vgg16_bn needs images of 32 pixels or more, got {size}")
    import torchvision

    if size >= LARGE:
        return nn.Sequential(Centre(), torchvision.models.vgg16_bn(weights=None, num_classes=classes, dropout=0.0))
    vgg = torchvision.models.vgg
    features = _kaiming(vgg.make_layers(vgg.cfgs["D"], batch_norm=True))
    return nn.Sequential(Centre(), features, Pooled(), nn.Flatten(), nn.Linear(512, classes))


def densenet121(classes: int, size: int = 32) -> nn.Module:
    """Huang et al., CVPR 2017."""
    import torchvision

    model = torchvision.models.densenet121(weights=None, num_classes=classes)
    if size < LARGE:
        model.features.conv0, model.features.pool0 = _stem(64, "fan_in"), nn.Identity()
    return nn.Sequential(Centre(), model)


def mobilenet_v2(classes: int, size: int = 32) -> nn.Module:
    """Sandler et al., CVPR 2018."""
    import torchvision

    model = torchvision.models.mobilenet_v2(weights=None, num_classes=classes, dropout=0.0)
    if size < LARGE:
        _keep_size(model.features[0], model.features[2])
    return nn.Sequential(Centre(), model)


def efficientnet_v2_s(classes: int, size: int = 32) -> nn.Module:
    """Tan & Le, ICML 2021."""
    import torchvision

    off = {"dropout": 0.0, "stochastic_depth_prob": 0.0}
    model = torchvision.models.efficientnet_v2_s(weights=None, num_classes=classes, **off)
    if size < LARGE:
        _keep_size(model.features[0], model.features[2])
    return nn.Sequential(Centre(), model)


def deit_tiny(classes: int, size: int = 32) -> nn.Module:
    """Touvron et al., ICML 2021, without distillation; its position table fits images of `size` pixels only.

    Raises ValueError without timm, and for a size that is no multiple of the patch.
    """
    patch = 4 if size < LARGE else 16
    if size % patch:
        raise ValueError(f"deit_tiny needs images whose size is a multiple of {patch} pixels, got {size}")
    try:
        import timm
    except ImportError:
        raise ValueError("deit_tiny needs timm: pip install semkit[models]") from None
    form = {"img_size": size, "patch_size": patch}
    return nn.Sequential(Centre(), timm.create_model("deit_tiny_patch16_224", num_classes=classes, **form))


MODELS: dict[str, Callable[..., nn.Module]] = {
    f.__name__: f
    for f in (
        *(small, tiny, resnet18, resnet18_stride1, resnet50, vgg16_bn, densenet121),
        *(wrn34_10, mobilenet_v2, efficientnet_v2_s, deit_tiny),
    )
}


def freeze_but_last(model: nn.Module) -> nn.Module:
    """The net with no weight left to train but those of its last linear layer, the classifier; in place.

    engine.training_logits leaves frozen batch-norm in eval mode, so that its statistics stay too.
    """
    [*_, classifier] = (module for module in model.requires_grad_(False).modules() if isinstance(module, nn.Linear))
    classifier.requires_grad_(True)
    return model


def check_model(name: str) -> str:
    """`name` if MODELS has it, alone or with "+injected"; raises ValueError with the nearest name otherwise."""
    base = str(name).removesuffix(INJECTED)
    if base not in MODELS:
        near = difflib.get_close_matches(base.lower().replace("-", "_"), MODELS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(MODELS)}"
        raise ValueError(f"unknown model {name!r}: {hint}")
    return name


def build(name: str, classes: int, seed: int = 0, size: int = 32) -> nn.Module:
    """A fresh float32 net on the CPU: x [N,3,size,size] in [0,1] -> logits [N,classes].

    The same seed gives the same weights, and torch's global generator is left where it was. `size` chooses the stem
    (below LARGE, or the original) and deit_tiny's position table; the convolutional nets then take images of any size.
    Raises ValueError for unknown names, for classes < 1, and for sizes that a net cannot take.
    """
    make = MODELS[check_model(name).removesuffix(INJECTED)]
    check_count(classes, "classes", 1)
    check_count(size, "size", 1)
    with seeded(seed):
        model = make(classes, size)
    return with_noise_injection(model, seed) if name.endswith(INJECTED) else model
