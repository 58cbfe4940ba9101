"""Surrogates and learners by name; normalisation is inside the model."""

import torch
import torch.nn.functional as F
from torch import nn


class Centre(nn.Module):
    """x - 0.5: images in [0,1] centred with their unit scale kept, so that a radius of r levels stays r/255."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - 0.5


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


def small(classes: int, widths: tuple[int, ...] = (32, 64, 128)) -> nn.Module:
    """The lesson net: a stride-2 stem and one residual block per width."""
    layers = [Centre(), nn.Conv2d(3, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    for inside, outside in zip((widths[0], *widths), widths):
        layers.append(Residual(inside, outside, 1 if inside == outside else 2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))


MODELS = {"small": small, "tiny": lambda classes: small(classes, (24, 48, 96))}


def build(name: str, classes: int, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name](classes)
