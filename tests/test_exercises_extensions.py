"""The checkers of the notebooks from 10 on; each helper function is a solution, or one part of it replaced."""

import numpy as np
import torch
import torch.nn.functional as F
from checks import both_tests
from scipy.special import ndtr

from semkit.lessons import defences, latent, mixtures, pruning, savings


def robust_accuracy_with(
    noise=lambda theta, W: np.linalg.norm(W.T @ theta), reach=lambda theta: np.linalg.norm(theta), end=ndtr
):
    """The solution, or a twin of it with one part replaced."""
    return lambda theta, W, mu, epsilon: end((theta @ W @ mu - epsilon * reach(theta)) / noise(theta, W))


right_robust_accuracy = robust_accuracy_with()
BROKEN_ROBUST_ACCURACY = {
    "one number": lambda *asked: None,
    "not by .theta": robust_accuracy_with(noise=lambda theta, W: np.linalg.norm(theta)),
    "not by the variance": robust_accuracy_with(noise=lambda theta, W: ((W.T @ theta) ** 2).sum()),
    "without attack it is": robust_accuracy_with(end=lambda share: share),
    "takes from the score": robust_accuracy_with(reach=lambda theta: -np.linalg.norm(theta)),
    "times .theta": robust_accuracy_with(reach=lambda theta: 1),
    "as the score is": lambda theta, W, mu, epsilon: ndtr(theta @ W @ mu / np.linalg.norm(W.T @ theta) - epsilon),
    "not the l1": robust_accuracy_with(reach=lambda theta: np.abs(theta).sum()),
    "with epsilon 0.8": robust_accuracy_with(reach=lambda theta: np.abs(theta).max()),
    "below 1/2": robust_accuracy_with(end=lambda share: max(0.5, ndtr(share))),
}


def kinds_with(
    sign=lambda p, y: torch.where(p.argmax(1) == y, 1.0, -1.0), of=lambda v: v, at=lambda average: 1 - average, axis=1
):
    """The solution, or a twin of it with one part replaced."""

    def kinds(p, y, average):
        v = sign(p, y) * p.std(axis, correction=0)
        return torch.where(v < 0, 0, torch.where(v > of(v).quantile(at(average)).clamp(min=0), 2, 1))

    return kinds


right_kinds = kinds_with()
BROKEN_KINDS = {
    "one kind for each": lambda p, y, average: right_kinds(p, y, average)[:, None],
    "a kind is 0": lambda p, y, average: right_kinds(p, y, average) + 1,
    "is an outlier, however sure": kinds_with(sign=lambda p, y: 1.0),
    "is no outlier": kinds_with(sign=lambda p, y: torch.where(p[torch.arange(len(y)), y] > 0.5, 1.0, -1.0)),
    "of the images are robust": kinds_with(at=lambda average: average),
    "v of all images": kinds_with(of=lambda v: v[v >= 0]),
}


def right_straight_through(g, x):
    return x + (g(x) - x).detach()


def changes_x(g, x):
    value = right_straight_through(g, x)
    with torch.no_grad():
        x += 1
    return value


BROKEN_STRAIGHT_THROUGH = {
    "a tensor of x's shape": lambda g, x: g(x).sum(),
    "forwards it is g": lambda g, x: x + 0 * g(x).detach(),
    "changed in place": changes_x,
    "detach the difference g": lambda g, x: g(x).detach(),
    "detach the difference, not": lambda g, x: g(x),
    "g's own gradient": lambda g, x: right_straight_through(g, x) + g(x) - g(x).detach(),
}


def masks_with(size=torch.abs, count=round, mask=lambda gone: 1 - gone.float()):
    """The solution, or a twin of it with one part replaced."""

    def masks(weights, share):
        sizes = torch.cat([size(w).flatten() for w in weights])
        gone = torch.zeros(len(sizes))
        gone[sizes.argsort(stable=True)[: count(share * len(sizes))]] = 1
        parts = gone.split([w.numel() for w in weights])
        return [mask(part).view_as(w) for part, w in zip(parts, weights, strict=True)]

    return masks


right_masks = masks_with()


def by_threshold(weights, share):
    threshold = torch.cat([w.abs().flatten() for w in weights]).quantile(share)
    return [(w.abs() > threshold).float() for w in weights]


BROKEN_MASKS = {
    "return a list": lambda weights, share: right_masks(weights, share)[0],
    "shape of its weights": lambda weights, share: [m.flatten() for m in right_masks(weights, share)],
    "not the weights": lambda weights, share: [
        w * m for w, m in zip(weights, right_masks(weights, share), strict=True)
    ],
    "1 is for weights that stay": masks_with(mask=lambda gone: gone),
    "the same share": lambda weights, share: [right_masks([w], share)[0] for w in weights],
    "size is .w.": masks_with(size=lambda w: w),
    "a smaller weight stays": masks_with(size=lambda w: -w.abs()),
    "with share 0.0 exactly 0": by_threshold,
    "with share 0.85 exactly": masks_with(count=lambda n: round(n) + (n > 100)),
}


def filtered_with(kernel=lambda k: k, x=lambda x: x, most=lambda conv: conv.amax(), end=lambda y: y.round().byte()):
    """The solution, or a twin of it with one part replaced."""

    def filtered(image, given):
        conv = torch.zeros(image.shape, dtype=torch.float64)
        padded, turned = F.pad(x(image).double(), (1, 1, 1, 1)), kernel(given).flip(0, 1)
        for a in range(3):
            for b in range(3):
                conv += turned[a, b] * padded[:, a : a + image.shape[1], b : b + image.shape[2]]
        return end(255 * conv / most(conv))

    return filtered


def mirrored(image, kernel):
    padded = F.pad(image[None].double(), (1, 1, 1, 1), mode="reflect")
    conv = F.conv2d(padded.transpose(0, 1), kernel.flip(0, 1)[None, None])[:, 0]
    return (255 * conv / conv.amax()).round().byte()


def filtered_in_place(image, kernel):
    image.copy_(filtered_with()(image, kernel))
    return image


right_filtered = filtered_with()
BROKEN_FILTERED = {
    "a tensor": lambda image, kernel: None,
    "in place": filtered_in_place,
    "the shape": lambda image, kernel: right_filtered(image, kernel)[None],
    "images are uint8": filtered_with(end=lambda y: y.round()),
    "cross-correlation": filtered_with(kernel=lambda k: k.flip(0, 1)),
    "rows and columns": filtered_with(kernel=lambda k: k.T),
    "mirror image": mirrored,
    "one a channel": filtered_with(most=lambda conv: conv.amax((1, 2), keepdim=True)),
    "largest possible": lambda image, kernel: filtered_with(most=lambda conv: 255 * kernel.sum())(image, kernel),
    "the largest value is": filtered_with(most=lambda conv: 2 * conv.amax()),
    "cut off": filtered_with(end=lambda y: y.byte()),
    "off by up to": filtered_with(x=lambda x: x.roll(1, 2)),
}

CASES = [
    (latent.check_robust_accuracy, right_robust_accuracy, BROKEN_ROBUST_ACCURACY),
    (savings.check_kinds, right_kinds, BROKEN_KINDS),
    (defences.check_straight_through, right_straight_through, BROKEN_STRAIGHT_THROUGH),
    (pruning.check_masks, right_masks, BROKEN_MASKS),
    (mixtures.check_filtered, right_filtered, BROKEN_FILTERED),
]

test_a_checker_passes_the_solution, test_a_checker_says_what_is_wrong = both_tests(CASES)
