"""Surrogates and learners by name, built and kept as files; normalisation is inside the net.

ImageNet nets halve an image two to four times in their stem, which leaves little of 32 pixels, and the stem of a
learner alone moves protection from 20 to 50 %. So below LARGE pixels the stem is another one:

    resnet18, resnet50, densenet121   3x3 stride-1 first convolution, no max-pool
    mobilenet_v2, efficientnet_v2_s   stride 1 in the first convolution and in the first stage that halves
    vgg16_bn                          the usual features; global pooling and one linear layer as head, not three
    deit_tiny                         patches of 4 pixels, not 16
    wrn34_10, small, tiny, conv4      made for small images; the same net at every size
    resnet18_stride1                  resnet18's small stem at every size: what SEM's and REM's code runs on ImageNet,
                                      for about 15 times the cost of the original net

From LARGE pixels on they are the original nets. Dropout and stochastic depth are off, because they draw from torch's
global generator: a resumed run would differ from an uninterrupted one. No net is pretrained. deit_tiny needs timm and
takes images of one size only; vgg16_bn needs 32 pixels.

Sources: resnet, He et al., CVPR 2016; wrn34_10, Zagoruyko & Komodakis, BMVC 2016; vgg16_bn, Simonyan & Zisserman, ICLR
2015; densenet121, Huang et al., CVPR 2017; mobilenet_v2, Sandler et al., CVPR 2018; efficientnet_v2_s, Tan & Le, ICML
2021; deit_tiny, Touvron et al., ICML 2021; conv4, Vinyals et al., NeurIPS 2016.

A name may end in "+injected", as "tiny+injected": the net with noise injected into its weights (nets.weights).
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from semkit.images.files import one_line, read_tensors, shown, write_tensors
from semkit.images.imageset import ImageSet
from semkit.images.pixels import check_count, check_name, seeded
from semkit.nets.engine import Engine
from semkit.nets.weights import with_noise_injection

INJECTED = "+injected"
LARGE = 64  # pixels, from which an image is large enough for the ImageNet stem


class Centre(nn.Module):
    """x - 0.5: centres images in [0,1] and keeps their scale, so that a radius of r levels stays r/255."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - 0.5


class Pooled(nn.Module):
    """Global average pooling: [N,C,H,W] -> [N,C,1,1].

    Torch's own pooling returns its gradient in contiguous layout, also in a channels_last net, which costs a twelfth
    of tiny's input gradient.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1).flatten(1, 2).mean(1)[:, :, None, None]


class Residual(nn.Module):
    """Residual block: relu(norm(conv(relu(norm(conv(x))))) + shortcut(x)); shortcut: a 1x1 convolution if the shape
    changes.
    """

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
    """Pre-activation residual block: conv(act(conv(act(x)))) + x, act = relu(norm(.)).

    Where the shape changes, a 1x1 convolution of act(x) takes the place of x.
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


def conv4(classes: int, size: int = 32) -> nn.Module:
    """The plain lesson net, without shortcuts: four times 3x3 convolution of 64 filters, norm, relu, 2x2 max-pool."""
    layers = [Centre()]
    for inside in (3, 64, 64, 64):
        layers += [nn.Conv2d(inside, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    return nn.Sequential(*layers, Pooled(), nn.Flatten(), nn.Linear(64, classes))


def wrn34_10(classes: int, size: int = 32, depth: int = 34, widen: int = 10) -> nn.Module:
    """The wide residual net: a 3x3 convolution, three stages of (depth - 4) / 6 pre-activation blocks, no dropout."""
    inside, blocks = 16, []
    for stage, width in enumerate((16 * widen, 32 * widen, 64 * widen)):
        for block in range((depth - 4) // 6):
            blocks.append(PreActivation(inside, width, 2 if stage and not block else 1))
            inside = width
    stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
    head = [nn.BatchNorm2d(inside), nn.ReLU(), Pooled(), nn.Flatten(), nn.Linear(inside, classes)]
    return _kaiming(nn.Sequential(Centre(), stem, *blocks, *head))


def _stem(outside: int, mode: str) -> nn.Conv2d:
    """A 3x3 stride-1 first convolution, initialised as torchvision initialises the net's others."""
    conv = nn.Conv2d(3, outside, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode=mode, nonlinearity="relu")
    return conv


def _torchvision(name: str, classes: int, **options) -> nn.Module:
    import torchvision  # slow, and the lesson nets do without

    return getattr(torchvision.models, name)(weights=None, num_classes=classes, **options)


def resnet(name: str, classes: int, size: int) -> nn.Module:
    """A residual net of torchvision with the small stem below LARGE pixels."""
    model = _torchvision(name, classes)
    if size < LARGE:
        model.conv1, model.maxpool = _stem(64, "fan_out"), nn.Identity()
    model.avgpool = Pooled()
    return nn.Sequential(Centre(), model)


def vgg16_bn(classes: int, size: int) -> nn.Module:
    """VGG with batch-norm. Raises ValueError below 32 pixels."""
    if size < 32:
        raise ValueError(f"vgg16_bn needs images of 32 pixels or more, got {size}")
    if size >= LARGE:
        return nn.Sequential(Centre(), _torchvision("vgg16_bn", classes, dropout=0.0))
    from torchvision.models import vgg

    features = _kaiming(vgg.make_layers(vgg.cfgs["D"], batch_norm=True))
    return nn.Sequential(Centre(), features, Pooled(), nn.Flatten(), nn.Linear(512, classes))


def densenet121(classes: int, size: int) -> nn.Module:
    """The densely connected net with the small stem below LARGE pixels."""
    model = _torchvision("densenet121", classes)
    if size < LARGE:
        model.features.conv0, model.features.pool0 = _stem(64, "fan_in"), nn.Identity()
    return nn.Sequential(Centre(), model)


def inverted(name: str, classes: int, size: int, **options) -> nn.Module:
    """A net of inverted residuals of torchvision; below LARGE pixels the first two halvings are left out."""
    model = _torchvision(name, classes, **options)
    stages = (model.features[0], model.features[2]) if size < LARGE else ()
    for module in (m for stage in stages for m in stage.modules() if isinstance(m, nn.Conv2d)):
        module.stride = (1, 1)
    return nn.Sequential(Centre(), model)


def deit_tiny(classes: int, size: int) -> nn.Module:
    """The small vision transformer, without distillation, for images of `size` pixels only.

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


MODELS: dict[str, Callable[[int, int], nn.Module]] = {  # name -> make(classes, size)
    "small": small,
    "tiny": partial(small, widths=(24, 48, 96)),
    "conv4": conv4,
    "resnet18": partial(resnet, "resnet18"),
    "resnet18_stride1": lambda classes, size: resnet("resnet18", classes, 32),
    "resnet50": partial(resnet, "resnet50"),
    "vgg16_bn": vgg16_bn,
    "densenet121": densenet121,
    "wrn34_10": wrn34_10,
    "mobilenet_v2": partial(inverted, "mobilenet_v2", dropout=0.0),
    "efficientnet_v2_s": partial(inverted, "efficientnet_v2_s", dropout=0.0, stochastic_depth_prob=0.0),
    "deit_tiny": deit_tiny,
}


def freeze_but_last(model: nn.Module) -> nn.Module:
    """Freeze all weights but those of the last linear layer, the classifier; in place, returns the model.

    Frozen batch-norm keeps its statistics too (engine.training_logits).
    """
    [*_, classifier] = (module for module in model.requires_grad_(False).modules() if isinstance(module, nn.Linear))
    classifier.requires_grad_(True)
    return model


def check_model(name: str) -> str:
    """`name` if it is in MODELS, alone or with "+injected"; raises ValueError with the nearest name otherwise."""
    check_name(str(name).removesuffix(INJECTED), tuple(MODELS), "model")
    return name


def build(name: str, classes: int, seed: int = 0, size: int = 32) -> nn.Module:
    """A fresh float32 net on the CPU: x [N,3,size,size] in [0,1] -> logits [N,classes].

    The seed decides the weights; torch's global generator is not moved. `size` chooses the stem: below LARGE, or the
    original. Convolutional nets then take images of any size, deit_tiny of this one.
    Raises ValueError for an unknown name, for classes < 1, and for a size that the net cannot take.

    >>> build("tiny", 10)(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    make = MODELS[check_model(name).removesuffix(INJECTED)]
    check_count(classes, "classes", 1)
    check_count(size, "size", 1)
    with seeded(seed):
        model = make(classes, size)
    return with_noise_injection(model, seed) if name.endswith(INJECTED) else model


def size_seen(recipe, images: ImageSet) -> int:
    """The side in pixels of what recipe.net gets: of the images after recipe.augment."""
    return recipe.augment.output_size(images.images.shape[-1])


def fresh(recipe, images: ImageSet, seed: int = 0) -> nn.Module:
    """A fresh recipe.net for these images: their number of classes, their size after recipe.augment."""
    return build(recipe.net, len(images.classes), seed, size_seen(recipe, images))


def save_net(model: nn.Module, path: str | Path, *, net: str, classes: Sequence[str], size: int) -> None:
    """Write the state dict of build(net, len(classes), size=size) as safetensors, which load_net reads."""
    write_tensors(path, model.state_dict(), {"net": net, "classes": list(classes), "size": size})


def check_net(path: str | Path) -> str:
    """`path` as text if there is a file; raises ValueError otherwise."""
    if not Path(path).is_file():
        raise ValueError(f"{shown(path)}: no such net; semkit learn IMAGES --save {shown(path)} makes one")
    return str(path)


def digest(path: str | Path) -> str:
    """The first 16 hex digits of the sha256 of a net's file; raises ValueError if there is none."""
    return hashlib.sha256(Path(check_net(path)).read_bytes()).hexdigest()[:16]


def load_net(path: str | Path, engine: Engine) -> nn.Module:
    """The net that save_net wrote, on the engine, in eval mode and frozen; raises ValueError for anything else."""
    check_net(path)
    try:
        weights, record = read_tensors(path, ("net", "classes", "size"))
        model = build(record["net"], len(record["classes"]), size=record["size"]).to(engine.dtype)
        model.load_state_dict(weights)
        if not all(values.isfinite().all() for values in weights.values()):
            raise ValueError("it has weights that are no finite numbers; train it anew")
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{shown(path)} is no net that semkit can read: {one_line(error)}") from error
    return engine.prepare(model).eval().requires_grad_(False)
