"""The unit (1/255), the box [0, 1], the norm balls, seeded draws, and the checks of what a person types."""

import contextlib
import difflib
import math
import threading
from collections.abc import Callable, Iterator

import torch

LEVEL = 1 / 255  # one 8-bit pixel level on the [0, 1] scale
NORMS = ("linf", "l2", "l1")
MOST_LEVELS = 1e12  # more than the l1 distance of any two images; float32 holds it with room to spare
_lending = threading.RLock()  # all threads share torch's global generator
# The usual radii, as people type them who think in fractions of 1: 8/255 as 0.03, 0.031, 0.0314 and so on.
_TYPED = {round(levels / 255, digits) for levels in (1, 2, 4, 8, 16) for digits in range(2, 7)} - {0}


def _is_fraction(value: float) -> bool:
    """Whether value is n/255, n up to 32 in whole tenths, and not a short decimal such as 0.02 by chance."""
    tenths = round(2550 * min(value, 1.0))
    return 0 < tenths <= 320 and abs(2550 * value - tenths) < 1e-6 and round(value, 3) != value


def _number(value: object, name: str, kind: str = "number") -> float:
    """`value` as a float, inf if it is too large for one; raises ValueError if it is no number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a {kind}, got {value!r:.40}") from None
    except OverflowError:
        return math.inf


def check_radius(value: float, name: str = "radius") -> float:
    """`value` as a float if it is a radius in pixel levels, 0 to 1e12.

    Small radii are allowed (0.064). Refused are n/255, and the usual radii in decimals: 0.031 for 8/255.
    Raises ValueError with what to write instead.

    >>> check_radius(8)
    8.0
    """
    value = _number(value, name, "number of pixel levels")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be a finite number of pixel levels >= 0, got {value:g}")
    if value > MOST_LEVELS:
        raise ValueError(f"{name} must be at most {MOST_LEVELS:g} pixel levels, got {value:g}")
    if value in _TYPED or _is_fraction(value):
        raise ValueError(f"{name}={value:g} looks like a fraction of 1; write pixel levels: 8, not 8/255")
    return value


def check_step_size(value: float, name: str = "step_size") -> float:
    """`value` as a float if it is a step in pixel levels: finite, above 0, and not a fraction such as 1.6/255.

    Raises ValueError with what to write instead.
    """
    value = _number(value, name, "number of pixel levels")
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} must be a finite number of pixel levels > 0, got {value:g}")
    if _is_fraction(value):
        raise ValueError(f"{name}={value:g} looks like a fraction of 1; write pixel levels: 1.6, not 1.6/255")
    return value


def check_count(value: int, name: str, least: int = 0, most: int | None = None) -> int:
    """`value` as an int if it is a whole number from `least` to `most`; raises ValueError otherwise.

    >>> check_count(12.0, "steps")
    12
    """
    try:
        whole = None if isinstance(value, bool | str) else int(value)
    except (TypeError, ValueError, OverflowError):
        whole = None
    if whole is None or whole != value or whole < least:
        raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")
    if most is not None and whole > most:
        raise ValueError(f"{name} must be at most {most}, got {value!r:.40}")
    return whole


def parse_count(text: str, name: str, least: int = 0, most: int | None = None) -> int:
    """The whole number from `least` to `most` that a text writes in digits; raises ValueError otherwise."""
    digits = text.removeprefix("-").isdecimal() and len(text) <= 30
    return check_count(int(text) if digits else text, name, least, most)


def check_share(value: float, name: str) -> float:
    """`value` as a float if it is a share, 0 to 1; raises ValueError otherwise."""
    if not 0 <= (share := _number(value, name)) <= 1:
        raise ValueError(f"{name} is a share, 0 to 1, got {value!r}")
    return share


def check_fraction(value: float, name: str = "fraction") -> float:
    """`value` as a float if it is above 0 and at most 1; raises ValueError otherwise."""
    if not 0 < (share := _number(value, name)) <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {value!r}")
    return share


def check_nonnegative(value: float, name: str) -> float:
    """`value` as a float if it is finite and >= 0; raises ValueError otherwise."""
    if not 0 <= (number := _number(value, name)) < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
    return number


def check_seed(seed: int) -> int:
    """`seed` as an int if it is one that torch takes, 0 to 2**63 - 1; raises ValueError otherwise."""
    return check_count(seed, "seed", 0, 2**63 - 1)


def check_tensor(value: torch.Tensor, name: str) -> torch.Tensor:
    """`value` if it is a torch tensor; raises ValueError otherwise."""
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} must be a torch tensor, got {type(value).__name__}")
    return value


def check_name(name: str, known: tuple[str, ...], what: str) -> str:
    """`name` if it is in `known`; raises ValueError with the nearest known name otherwise."""
    if name in known:
        return name
    raise ValueError(f"unknown {what} {name!r}; {hint_at(name, known)}")


def hint_at(name: str, known: tuple[str, ...]) -> str:
    """What may have been meant by an unknown name: the nearest known one, else all of them."""
    near = difflib.get_close_matches(str(name).lower(), known, 1)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"


def one_of(*known: str) -> Callable[[str, str], str]:
    """A check for `settle`: the field must be one of these names."""
    return lambda value, name: check_name(value, known, name)


def settle(recipe, **checks: Callable[[object, str], object]) -> None:
    """Set fields of a frozen dataclass, in its __post_init__, to what check(value, name) returns for each."""
    for name, check in checks.items():
        object.__setattr__(recipe, name, check(getattr(recipe, name), name))


def drawn_seed(generator: torch.Generator | None = None) -> int:
    """A seed drawn from `generator`, or from torch's global generator."""
    return int(torch.randint(2**62, (), generator=generator, device=generator.device if generator else None))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside the block, torch's global generator on the CPU starts from `seed`; afterwards it is where it was.

    For library code that takes no generator. One thread at a time; blocks may be nested.
    """
    with _lending, torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed the GPUs' generators too and leave them so.
        torch.default_generator.manual_seed(check_seed(seed))
        yield


def box(x: torch.Tensor) -> torch.Tensor:
    """Clip x to [0, 1]; the gradient is 1 inside and at the ends, 0 outside.

    Not clamp, because its gradient at the ends differs between versions of torch. With 0 there, noise that starts from
    zero would never leave a black or white value.

    >>> x = torch.tensor([-0.5, 0.0, 0.5, 1.0, 1.5], requires_grad=True)
    >>> torch.autograd.grad(box(x).sum(), x)[0].tolist()
    [0.0, 1.0, 1.0, 1.0, 0.0]
    """
    clipped = x.detach().clamp(0, 1)
    return torch.where(x == clipped, x, clipped) if x.requires_grad else clipped


def to_float(images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 images, or int8 noise in levels, as floats: images / 255."""
    return images.to(dtype) / 255


def to_levels(noise: torch.Tensor) -> torch.Tensor:
    """Noise as int8 levels of the same shape: clip(round(255 * noise), -128, 127).

    >>> to_levels(torch.tensor([8 / 255, -1.0]))
    tensor([   8, -128], dtype=torch.int8)
    """
    return (noise * 255).round().clamp(-128, 127).to(torch.int8)


def through_levels(x: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Apply change(levels) to x in [0, 1] as uint8 levels on the CPU; the result is like x and has no gradient."""
    levels = (255 * x.detach()).round().clamp(0, 255).to("cpu", torch.uint8)
    return torch.empty_like(x).copy_(to_float(change(levels), x.dtype))


def add_noise(images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """clip(images + noise, 0, 255): uint8 images [N,C,H,W] and int8 noise in levels -> protected uint8 images.

    >>> add_noise(torch.tensor([250, 7], dtype=torch.uint8), torch.tensor([8, -8], dtype=torch.int8)).tolist()
    [255, 0]
    """
    return (images.to(torch.int16) + noise.to(torch.int16)).clamp(0, 255).to(torch.uint8)


def _column(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def to_draw(like: torch.Tensor) -> torch.Tensor:
    """An empty tensor shaped `like`, for draws; in channels_last memory if it holds images [N,C,H,W].

    Values are drawn in the order of memory, so with one layout the same seed gives the same image.
    """
    layout = torch.channels_last if like.dim() == 4 else torch.preserve_format
    return torch.empty_like(like, memory_format=layout)


def uniform(like: torch.Tensor, radius: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Independent draws from U(-radius, radius), shaped `like`; radius on the scale of `like`.

    >>> uniform(torch.zeros(2, 3, 4, 4), 4 / 255).abs().max() <= 4 / 255
    tensor(True)
    """
    return to_draw(like).uniform_(-radius, radius, generator=generator)


def random_point(
    like: torch.Tensor, radius: float, norm: str, generator: torch.Generator | None = None
) -> torch.Tensor:
    """A uniform draw from each sample's ball {d : |d|_norm <= radius}, shaped `like`.

    l2: Gaussian direction times radius * u^(1/n). l1: signed exponentials on the simplex times radius * u^(1/n).
    """
    if norm == "linf":
        return uniform(like, radius, generator)
    n = like[0].numel()
    length = torch.empty(len(like), dtype=like.dtype, device=like.device).uniform_(0, 1, generator=generator) ** (1 / n)
    if norm == "l2":
        d = to_draw(like).normal_(generator=generator)
        return d * _column(radius * length / d.flatten(1).norm(dim=1), d)
    d = to_draw(like).exponential_(generator=generator)
    sign = to_draw(like).uniform_(-1, 1, generator=generator).sign()
    return sign * d * _column(radius * length / d.flatten(1).sum(1), d)


def ascent_direction(gradient: torch.Tensor, norm: str, l1_share: float = 0.01) -> torch.Tensor:
    """Steepest ascent of unit length in the given norm, per sample [N,...].

    linf: sign(g). l2: g / |g|_2. l1: sign(g) in equal shares on the `l1_share` largest |g| of a sample; one coordinate
    would be steepest, but takes hundreds of steps (Tramer & Boneh, NeurIPS 2019). 0 where the gradient is zero.

    >>> ascent_direction(torch.tensor([[3.0, -4.0]]), "l2")
    tensor([[ 0.6000, -0.8000]])
    """
    if norm == "linf":
        return gradient.sign()
    if norm == "l2":
        # Scaled first: the squares of a confident net's gradient (1e-26) are zero in float32.
        tiny = torch.finfo(gradient.dtype).tiny
        gradient = gradient / _column(gradient.flatten(1).abs().amax(1).clamp_min(tiny), gradient)
        return gradient / _column(gradient.flatten(1).norm(dim=1).clamp_min(tiny), gradient)
    flat = gradient.flatten(1)
    k = max(1, int(l1_share * flat.shape[1]))
    top = flat.abs().topk(k, dim=1).indices
    return torch.zeros_like(flat).scatter_(1, top, flat.gather(1, top).sign() / k).view_as(gradient)


def project(delta: torch.Tensor, radius: float, norm: str) -> torch.Tensor:
    """Project delta [N,...] onto each sample's ball {d : |d|_norm <= radius}; nearest in l2.

    l1: soft threshold at the level where the sizes sum to radius (Duchi et al., ICML 2008).
    """
    if norm == "linf":
        return delta.clamp(-radius, radius)
    if norm == "l2":
        length = delta.flatten(1).norm(dim=1).clamp_min(torch.finfo(delta.dtype).tiny)
        return delta * _column((radius / length).clamp_max(1), delta)
    flat = delta.flatten(1).abs()
    ordered = flat.sort(dim=1, descending=True).values
    count = torch.arange(1, flat.shape[1] + 1, device=flat.device, dtype=flat.dtype)
    excess = (ordered.cumsum(1) - radius) / count
    last = (ordered > excess).sum(1, keepdim=True).clamp_min(1) - 1
    threshold = excess.gather(1, last).clamp_min(0)
    return (delta.sign() * (flat - threshold).clamp_min(0).view_as(delta)).view_as(delta)
