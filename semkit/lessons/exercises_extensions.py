"""Checkers of the exercises in the notebooks that go beyond SEM, 10 and on; made as those in `exercises` are."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import ndtr

from semkit.lessons.exercises import checker
from semkit.lessons.latent import accuracy, latent_model, rule
from semkit.protections.cuda import blur, class_filters
from semkit.training.bullettrain import groups, spread, threshold


@checker
def check_robust_accuracy(robust_accuracy: Callable) -> None:
    """Tells whether robust_accuracy(theta, W, mu, epsilon) is that of sign(theta'x) on the mixture x = W z.

        Phi((theta'W mu - epsilon |theta|) / |W'theta|),   z ~ N(y mu, I), x moved by a length of epsilon

    theta [d], W [d,k], mu [k]. Raises AssertionError if not.
    """
    made = latent_model(12, 4, norm=1.5, seed=1)
    W, mu, theta = made.W, made.mu, 3 * rule(made, 5.0)
    mine = {epsilon: robust_accuracy(theta.copy(), W.copy(), mu.copy(), epsilon) for epsilon in (0, 0.8, 9)}
    wanted = {epsilon: accuracy(made, theta, epsilon) for epsilon in mine}
    assert all(np.ndim(value) == 0 and value is not None for value in mine.values()), "return one number"
    noise, length = np.linalg.norm(W.T @ theta), np.linalg.norm(theta)
    score = theta @ W @ mu

    def is_mine(epsilon: float, share: float) -> bool:
        return abs(mine[epsilon] - ndtr(share)) < 1e-6

    assert not is_mine(0, score / length), "theta'x varies by |W'theta| about its mean, not by |theta|"
    assert not is_mine(0, score / noise**2), "divide by the standard deviation |W'theta|, not by the variance"
    assert abs(mine[0] - wanted[0]) < 1e-6, f"without attack it is Phi(theta'W mu / |W'theta|) = {wanted[0]:.3f}"
    assert mine[0.8] < mine[0] - 1e-9, "an attack lowers the accuracy: it takes from the score"
    assert not is_mine(0.8, (score - 0.8) / noise), "a move of length epsilon changes theta'x by epsilon times |theta|"
    assert not is_mine(0.8, score / noise - 0.8), "the attack's reach is divided by |W'theta| as the score is"
    assert not is_mine(0.8, (score - 0.8 * np.abs(theta).sum()) / noise), "|theta| is the l2 length, not the l1 one"
    assert abs(mine[0.8] - wanted[0.8]) < 1e-6, f"with epsilon 0.8 it is {wanted[0.8]:.3f}, not {mine[0.8]:.3f}"
    assert abs(mine[9] - wanted[9]) < 1e-6, "a long attack turns nearly every answer round: below 1/2 is no mistake"
    print("right: what the factors add up to, less what the attack reaches, both in units of the spread")


@checker
def check_kinds(kinds: Callable) -> None:
    """Tells whether kinds(p, y, average) sorts as BulletTrain does: 0 outlier, 1 boundary, 2 robust, for each image.

        v = std of p over the classes, negative where the likeliest class is not y
        0 where v < 0, 2 where v > max(0, quantile of v at 1 - average), 1 elsewhere

    p [N,classes], y [N] -> [N] whole numbers. Raises AssertionError if not.
    """
    generator = torch.Generator().manual_seed(3)
    p, y = torch.randn(200, 5, generator=generator).mul(2).softmax(1), torch.arange(200) % 5
    p = (p + 1.5 * torch.nn.functional.one_hot(y, 5) * torch.rand(200, 1, generator=generator)).softmax(1)
    v = spread(p, y)
    for average in (0.2, 0.0, 0.99):
        wanted = torch.empty(200, dtype=torch.int64)
        for kind, index in enumerate(groups(v, threshold(v, average))):
            wanted[index] = kind
        mine = torch.as_tensor(kinds(p.clone(), y.clone(), average))
        assert mine.shape == y.shape, f"one kind for each of the {len(y)} images, not {list(mine.shape)}"
        assert set(mine.tolist()) <= {0, 1, 2}, "a kind is 0 (outlier), 1 (boundary) or 2 (robust)"
        assert (mine[v < 0] == 0).all(), "an image whose likeliest class is not its label is an outlier, however sure"
        assert (mine[v >= 0] != 0).all(), "an image that is labelled rightly is no outlier"
        found = (mine == 2).float().mean().item()
        told = f"with an average of {average:g}, {found:.0%} of the images are robust"
        assert torch.equal(mine, wanted), f"{told}: those above the quantile of v at 1 - average, v of all images"
    print("right: steps go to the images that are right, but not by far")


@checker
def check_straight_through(straight_through: Callable) -> None:
    """Tells whether straight_through(g, x) has the value of g(x), and the gradient of the identity.

    g takes and gives a tensor [N,C,H,W]; it may have a gradient of its own, or none. Raises AssertionError if not.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.rand(2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    for g in (lambda x: (4 * x).round() / 4, lambda x: x**2):
        start = x.clone().requires_grad_()
        value = straight_through(g, start)
        assert isinstance(value, torch.Tensor) and value.shape == x.shape, "return a tensor of x's shape"
        assert torch.allclose(value.detach(), g(x)), "forwards it is g(x): an attack must meet the image that f meets"
        assert torch.equal(start.detach(), x), "x was changed in place: add to a copy"
        assert value.requires_grad, "no gradient flows to x: detach the difference g(x) - x, not everything"
        (gradient,) = torch.autograd.grad((weight * value).sum(), start, allow_unused=True)
        assert gradient is not None and gradient.any(), "no gradient flows to x: detach the difference, not everything"
        assert torch.allclose(gradient, weight), "backwards it is the identity: g's own gradient must not come in"
    print("right: forwards g, backwards the identity, and the obfuscated gradient is no longer in the way")


@checker
def check_masks(masks: Callable) -> None:
    """Tells whether masks(weights, share) prunes the share of all weights together that is smallest in size.

    weights: a list of tensors; the answer is a list of tensors of their shapes, 0 where a weight goes and 1 where it
    stays, with exactly round(share * number of weights) zeros. Raises AssertionError if not.
    """
    generator = torch.Generator().manual_seed(0)
    weights = [scale * torch.randn(shape, generator=generator) for shape, scale in (((4, 3, 3, 3), 1), ((10, 6), 0.2))]
    weights[1][:, :2] = 0.25  # many of one size: a threshold alone takes all of them or none
    total = sum(w.numel() for w in weights)
    for share in (0.0, 0.5, 0.85):
        mine = masks([w.clone() for w in weights], share)
        is_list = isinstance(mine, list | tuple) and all(isinstance(m, torch.Tensor) for m in mine)
        assert is_list and len(mine) == len(weights), "return a list, one mask for each tensor of weights"
        shapes = [list(m.shape) for m in mine], [list(w.shape) for w in weights]
        assert shapes[0] == shapes[1], f"a mask has the shape of its weights, {shapes[1]}, not {shapes[0]}"
        assert all(((m == 0) | (m == 1)).all() for m in mine), "a mask is 0 or 1, not the weights that are kept"
        _check_pruned(weights, [m.bool() for m in mine], share, total)
    print("right: one threshold for the whole net, so layers lose what they can spare")


def _check_pruned(weights: list, kept: list, share: float, total: int) -> None:
    """Raises AssertionError unless `kept` are all but the smallest weights, exactly as many as the share says."""
    gone, wanted = sum(int((~k).sum()) for k in kept), round(share * total)
    assert gone != total - wanted or 2 * wanted == total, "1 is for weights that stay, 0 for those that go"
    each = [round(share * w.numel()) for w in weights]
    same = share and [int((~k).sum()) for k in kept] == each
    assert not same, "each tensor has lost the same share: compare the weights of all tensors with each other"
    stays = torch.cat([w[k] for w, k in zip(weights, kept, strict=True)])
    goes = torch.cat([w[~k] for w, k in zip(weights, kept, strict=True)])
    if gone and stays.numel():
        assert goes.max() > stays.min() or goes.min() >= 0, "size is |w|: a weight of -0.9 is a large one"
        assert goes.abs().max() <= stays.abs().min(), "a smaller weight stays while a larger one goes"
    assert gone == wanted, f"with share {share} exactly {wanted} of {total} go, not {gone}: weights of one size count"


@checker
def check_filtered(filtered: Callable) -> None:
    """Tells whether filtered(image, kernel) is the image as class-wise convolution protects it.

        round(255 conv / max conv),   conv[c, i, j] = sum over a, b of kernel[a, b] image[c, i + 1 - a, j + 1 - b]

    image uint8 [3,H,W], 0 outside; kernel [3,3] floats; uint8 [3,H,W] comes back. Raises AssertionError if not.
    """
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(20, 230, (3, 7, 9), generator=generator, dtype=torch.uint8)
    kernel, before = class_filters("an exercise", 1)[0], image.clone()
    mine = filtered(image, kernel)
    assert isinstance(mine, torch.Tensor), f"return a tensor, not {type(mine).__name__}"
    assert torch.equal(image, before), "the image was changed in place: work on a copy"
    assert mine.shape == image.shape, f"the shape must stay {list(image.shape)}, this is {list(mine.shape)}"
    assert mine.dtype == torch.uint8, f"images are uint8, this is {mine.dtype}"
    x = image[None].double()

    def is_mine(conv: torch.Tensor, most: torch.Tensor | None = None) -> bool:
        exact = 255 * conv / (conv.amax() if most is None else most)
        return bool((mine - exact[0]).abs().max() < 0.501)

    def by(kernel: torch.Tensor, x: torch.Tensor = x) -> torch.Tensor:
        return blur(x, kernel[None])

    conv, mirrored = by(kernel), F.pad(x, (1, 1, 1, 1), mode="reflect")
    assert not is_mine(by(kernel.flip(0, 1))), "the kernel is not turned round: this is a cross-correlation"
    assert not is_mine(by(kernel.T)), "rows and columns of the kernel are exchanged"
    assert not is_mine(by(kernel, mirrored)[..., 1:-1, 1:-1]), "outside the image are zeros, not its mirror image"
    assert not is_mine(conv, conv.amax((2, 3), keepdim=True)), "one maximum for the image, not one a channel"
    assert not is_mine(conv, kernel.sum() * 255), "divide by the largest value that occurs, not by the largest possible"
    assert mine.max() == 255, f"the largest value is {int(mine.max())}: divide by the maximum, then multiply by 255"
    exact = 255 * conv[0] / conv.amax()
    assert not torch.equal(mine, exact.to(torch.uint8)), "values are cut off: round before they become uint8"
    assert is_mine(conv), f"values are off by up to {float((mine - exact).abs().max()):.3g} levels"
    print("right: this is what `semkit protect --method cuda` writes, with a kernel of the key's for every class")
