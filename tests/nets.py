"""A small net that answers as a trained one would, without training, and images for it."""

import torch
from torch import nn

from semkit.nets import models


def far_from_fresh(model, seed=4):
    """The model with norms that do something: their statistics are far from any batch's, eval from train mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values, low, high in ((module.running_mean, -0.3, 0.3), (module.running_var, 0.5, 2)):
                values.data.uniform_(low, high, generator=generator)
            for values, low, high in ((module.bias, -0.3, 0.3), (module.weight, 0.5, 2)):
                values.data.uniform_(low, high, generator=generator)
    return model


def net(dtype=torch.float32, opinion=1.0):
    """A lesson net of two stages for four classes; its logits are multiplied by `opinion`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = far_from_fresh(models.small(4, widths=(8, 16)))
    model[-1].weight.data *= opinion
    return model.to(dtype)


def batch(n=6, low=0.0, high=1.0, dtype=torch.float32, size=8, seed=2):
    """n random images with values from low to high, and their labels 0 to 3 in turn."""
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(n, 3, size, size, generator=generator, dtype=dtype), torch.arange(n) % 4
