"""The exercise of lesson 7: what grey-scale keeps of a noise."""

from collections.abc import Callable

import torch

from semkit.lessons.answers import check_tensor, checker, reject

RED, GREEN, BLUE = 0.299, 0.587, 0.114  # of luma


@checker(
    "Take the three channels apart: red, green, blue = noise.unbind(1), each [N,H,W].",
    "Luma is .299 red + .587 green + .114 blue: the eye sees green best.",
    "All three channels get the same luma: luma[:, None].expand_as(noise).",
)
def check_luma(luma: Callable) -> str:
    """Whether luma(noise) sets all channels to .299 R + .587 G + .114 B, for noise float [N,3,H,W] in levels."""
    noise = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([RED, GREEN, BLUE]).view(1, 3, 1, 1)
    wanted = (weights * noise).sum(1, keepdim=True).expand_as(noise)
    mine = luma(given := noise.clone())
    check_tensor(mine, noise)
    assert torch.equal(given, noise), "it changes the noise in place: make a new tensor"
    assert not torch.allclose(mine, noise), "it returns the noise as it is"
    assert (mine - mine[:, :1]).abs().max() < 1e-5, "the channels differ: grey has R = G = B"
    reject(mine, {
        "this is the plain mean: luma weighs green most and blue least": noise.mean(1, keepdim=True),
        "red and blue are exchanged: the channels are R, G, B": (weights.flip(1) * noise).sum(1, keepdim=True),
    })  # fmt: skip
    assert torch.allclose(mine, wanted, atol=1e-4), "all channels must be .299 R + .587 G + .114 B"
    return "this is all that a grey-scale image keeps of a noise"
