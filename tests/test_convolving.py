"""Convolutions of folded nets: the sums of torch's own, wherever they are made and however they are rounded."""

import operator

import pytest
import torch
import torch.nn.functional as F
from nets import batch, far_from_fresh
from torch import nn

from semkit import models
from semkit.convolving import Convolution, from_quarters, has_own, quartered, turned, with_corners
from semkit.engine import Engine, input_gradient, predict
from semkit.folding import Folded

own = pytest.mark.skipif(not has_own(), reason="oneDNN has no bfloat16 on this processor")


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def in_rows(x):
    return x.contiguous(memory_format=torch.channels_last)


def torchs(x, weight, slope, **how):
    """The gradient at x of <slope, conv(x)>, by autograd."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(F.conv2d(x, weight, **how), x, slope)[0]


# -- gradients as convolutions, in float64 -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "padding"), [((3, 3), (1, 1)), ((1, 1), (0, 0)), ((5, 3), (2, 0)), ((2, 2), (0, 1))]
)
def test_the_gradient_of_stride_1_is_the_convolution_with_the_turned_weight(kernel, padding):
    x, weight = randn(2, 3, 7, 6), randn(5, 3, *kernel, seed=1)
    slope = randn(*F.conv2d(x, weight, padding=padding).shape, seed=2)
    back = [size - 1 - pad for size, pad in zip(kernel, padding, strict=True)]
    mine = F.conv2d(slope, turned(weight), padding=back)
    torch.testing.assert_close(mine, torchs(x, weight, slope, padding=padding), rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", [(8, 8), (2, 6)])
def test_the_gradient_of_stride_2_is_four_quarters(side):
    x, weight, slope = randn(3, 4, *side), randn(5, 4, 3, 3, seed=1), randn(3, 5, side[0] // 2, side[1] // 2, seed=2)
    theirs = torchs(x, weight, slope, padding=1, stride=2)
    torch.testing.assert_close(from_quarters(slope, quartered(weight)), theirs, rtol=0, atol=1e-12)
    twin = from_quarters(slope, quartered(weight.flip(2)))
    assert (twin - theirs).abs().max() > 0.1


def test_quarters_of_no_images_are_none():
    assert from_quarters(randn(0, 5, 4, 4), quartered(randn(5, 4, 3, 3))).shape == (0, 4, 8, 8)


@pytest.mark.parametrize(("stride", "side"), [(2, 8), (2, 7), (3, 8)])
def test_a_1x1_convolution_that_skips_pixels_adds_at_those_it_sees(stride, side):
    kept, weight = randn(2, 3, side, side), randn(4, 3, 1, 1, seed=1)
    slope = randn(*F.conv2d(kept, weight, stride=stride).shape, seed=2)
    before = kept.clone()
    expected = kept + torchs(kept, weight, slope, stride=stride)
    torch.testing.assert_close(with_corners(kept, slope, weight, stride), expected, rtol=0, atol=1e-12)
    assert torch.equal(kept, before)  # it may be someone else's too


# -- one convolution ---------------------------------------------------------------------------------------------------


def convolution(channels, out, kernel=3, stride=1, padding=1, dtype=torch.bfloat16, **more):
    conv = nn.Conv2d(channels, out, kernel, stride, padding, **more).to(memory_format=torch.channels_last)
    for i, values in enumerate((conv.weight, conv.bias)):
        values.data = randn(*values.shape, seed=i, dtype=dtype).contiguous() / channels**0.5
    mine = Convolution(conv, dtype, native=True)
    mine.write(conv.weight.data, conv.bias.data)
    return mine


@pytest.mark.parametrize("n", [32, 12, 7])
@pytest.mark.parametrize("channels, side, stride", [(256, 4, 1), (256, 2, 1), (256, 8, 1), (32, 4, 1), (256, 4, 2)])
def test_maps_side_by_side_are_convolved_as_each_alone(channels, side, stride, n):
    wide = convolution(channels, 8, stride=stride, dtype=torch.float64)
    x = randn(n, channels, side, side).requires_grad_()
    mine, theirs = wide(x), F.conv2d(x, wide.weight, wide.bias, stride, 1)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    slope = randn(*theirs.shape, seed=3)
    slopes = [torch.autograd.grad(y, x, slope)[0] for y in (mine, theirs)]
    torch.testing.assert_close(*slopes, rtol=0, atol=1e-12)


OWN = {
    "plain": dict(channels=24, out=16),
    "1x1": dict(channels=24, out=16, kernel=1, padding=0),
    "without padding": dict(channels=8, out=16, kernel=(3, 2), padding=0),
    "in quarters": dict(channels=24, out=16, stride=2),
    "of few channels": dict(channels=3, out=8, stride=2),
    "stride 2": dict(channels=64, out=16, stride=2),
    "1x1, stride 2": dict(channels=24, out=16, kernel=1, stride=2, padding=0),
    "side by side": dict(channels=256, out=8),
}
TORCHS = {
    "in groups": dict(channels=16, out=16, groups=16),
    "dilated": dict(channels=8, out=8, padding=2, dilation=2),
    "reflecting": dict(channels=8, out=8, padding_mode="reflect"),
    "padded by name": dict(channels=8, out=8, padding="same"),
    "uneven strides": dict(channels=8, out=8, stride=(2, 1)),
    "padded beyond its kernel": dict(channels=8, out=8, kernel=1),
}
SIDES = {"side by side": (4, 4), "in quarters, odd": (7, 8)}


@own
@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("name", [*OWN, "in quarters, odd", *TORCHS])
def test_a_convolution_its_sum_and_its_gradients_are_torchs(name, rows):
    conv = convolution(**(OWN | TORCHS)[name.removesuffix(", odd")])
    assert conv.native == conv.plain == (name not in TORCHS)
    layout = in_rows if rows else torch.Tensor.contiguous
    x = layout(randn(4, conv.in_channels, *SIDES.get(name, (8, 8)), dtype=torch.bfloat16)).requires_grad_()
    wide = nn.Conv2d.forward(convolution_in_double(conv), x.double())
    added = layout(randn(*wide.shape, seed=5, dtype=torch.bfloat16)).requires_grad_()
    kept_slope = layout(randn(*x.shape, seed=6, dtype=torch.bfloat16))
    slope = layout(randn(*wide.shape, seed=7, dtype=torch.bfloat16))
    y, kept = conv(x, added, keep=True)
    assert y.dtype == torch.bfloat16 and torch.equal(kept, x) and torch.equal(conv(x, added), y)
    once = conv.native and name != "side by side"  # half of the last bit, and as much again for sums of both signs
    torch.testing.assert_close(y.double(), wide + added.double(), rtol=2**-8, atol=2e-3 if once else 2**-4)
    torch.testing.assert_close(conv(x).double(), wide, rtol=2**-8, atol=2e-3)
    mine = torch.autograd.grad([y, kept], [x, added], [slope, kept_slope])
    exact = torch.autograd.grad(wide, x, slope.double())[0].double() + kept_slope.double()
    torch.testing.assert_close(mine[0].double(), exact, rtol=2**-7, atol=0.05)
    assert torch.equal(mine[1], slope)
    [alone] = torch.autograd.grad(conv(x), x, slope)
    torch.testing.assert_close(alone.double(), exact - kept_slope.double(), rtol=2**-7, atol=0.05)
    _, unread = conv(x, keep=True)
    assert torch.equal(torch.autograd.grad(unread, x, kept_slope)[0], kept_slope)


def convolution_in_double(conv):
    twin = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
        padding_mode=conv.padding_mode, dtype=torch.float64,
    )  # fmt: skip
    twin.load_state_dict({name: values.double() for name, values in conv.state_dict().items()})
    return twin


@own
def test_a_sum_is_rounded_once_where_torch_rounds_twice():
    conv = convolution(24, 16)
    x, added = (in_rows(randn(32, n, 8, 8, seed=n, dtype=torch.bfloat16)) for n in (24, 16))
    exact = convolution_in_double(conv)(x.double()) + added.double()
    once, twice = ((y.double() - exact).abs().mean() for y in (conv(x, added), conv(x) + added))
    assert once < 0.9 * twice


@own
@pytest.mark.parametrize("other", [(1, 16, 1, 1), (1, 16, 8, 8), (4, 1, 8, 8)])
def test_what_is_not_of_the_results_shape_or_dtype_is_added_as_torch_adds_it(other):
    conv, x = convolution(24, 16), in_rows(randn(4, 24, 8, 8, dtype=torch.bfloat16))
    for added in (randn(*other, dtype=torch.bfloat16), randn(4, 16, 8, 8, dtype=torch.float32)):
        assert torch.equal(conv(x, added), conv(x) + added)


@own
def test_a_convolution_keeps_what_is_not_a_number():
    conv, x = convolution(24, 16), in_rows(randn(4, 24, 8, 8, dtype=torch.bfloat16))
    added = torch.zeros(4, 16, 8, 8, dtype=torch.bfloat16)
    added[1, 2, 3, 4] = float("nan")
    assert conv(x, in_rows(added)).isnan().sum() == 1


def test_the_weight_of_the_gradient_follows_and_stays_the_tensor_it_was():
    conv = convolution(3, 8, stride=2)
    before = conv.back
    conv.write(conv.weight * 2, conv.bias)
    assert conv.back is before and torch.equal(conv.back, quartered(conv.weight).contiguous())


# -- sums and forks of nets --------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A convolution and its norm, and a way of going on from both x and y = norm(conv(x))."""

    def __init__(self, way, channels=8):
        super().__init__()
        self.way, self.convs = way, nn.ModuleList(nn.Conv2d(channels, channels, 3, 1, 1, bias=False) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(3))

    def forward(self, x):
        return self.way(x, *(lambda x, i=i: self.norms[i](self.convs[i](x)) for i in range(3)))


def _into_a_part(x, f, *_):
    y = f(x)
    y.narrow(1, 0, 4).add_(x.narrow(1, 0, 4))
    return y * x


def _over_x(x, f, *_):
    return f(x) + F.relu(x, inplace=True) + x


WAYS = {  # (sums that convolutions make, inputs that they hand on)
    "y + x": (lambda x, f, *_: f(x) + x, 1, 0),
    "x + y": (lambda x, f, *_: x + f(x), 1, 0),
    "y.add_(x)": (lambda x, f, *_: f(x).add_(x), 1, 0),
    "x.add_(y)": (lambda x, f, *_: (x * 1).add_(f(x)), 0, 0),
    "y + y": (lambda x, f, *_: operator.add(*2 * [f(x)]), 0, 0),
    "y, seen twice": (lambda x, f, g, _: (y := f(x)) + g(y), 1, 0),
    "a residual": (lambda x, f, g, _: g(torch.relu(f(x))) + x, 1, 1),
    "two of them": (lambda x, f, g, _: f(x) + g(x), 1, 1),
    "two and x": (lambda x, f, g, _: torch.relu(f(x)) * g(x) * x, 0, 2),
    "three and x": (lambda x, f, g, h: torch.relu(f(x)) * (g(x) + torch.tanh(h(x))) + x, 1, 2),
    "one written over": (_over_x, 0, 0),
    "a part written over": (_into_a_part, 0, 0),
    "a number": (lambda x, f, *_: f(x) + 2, 0, 0),
    "scaled": (lambda x, f, *_: torch.add(f(x), x, alpha=2), 0, 1),
    "a mean": (lambda x, f, *_: f(x) + x.mean((2, 3), keepdim=True), 1, 0),
}


def of_blocks(way):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        layers = [nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), Block(way), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1)]
        layers += [nn.BatchNorm2d(8), nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
        return far_from_fresh(nn.Sequential(*layers))


@own
@pytest.mark.parametrize("name", WAYS)
def test_sums_and_forks_change_no_result_whatever_a_net_does_with_them(name):
    way, sums, kept = WAYS[name]
    mine = Engine("cpu", "bfloat16", flat=False).prepare(of_blocks(way))
    exact = Engine("cpu", "float64", fold=False).prepare(of_blocks(way))
    nodes = [node for node in mine.folded.graph.graph.nodes if node.op == "call_module"]
    assert sum(len(node.args) == 2 for node in nodes) == sums
    assert sum("keep" in node.kwargs for node in nodes) == kept
    x, y = batch(32, size=8)
    before = x.clone()
    answers = [predict, lambda model, x: input_gradient(model, x, y)]
    for answer in answers[: 1 if name == "one written over" else 2]:  # which autograd refuses
        found, right = (answer(model, x.to(model.engine.dtype)).double() for model in (mine, exact))
        assert (found - right).norm() < 0.1 * right.norm()
    assert torch.equal(x, before)
    if name != "one written over":
        listed = Engine("cpu", "bfloat16").prepare(of_blocks(way))
        listed.eval().flat.write(x, y)
        assert listed.flat.why_not is None and torch.equal(input_gradient(listed, x, y), input_gradient(mine, x, y))


@pytest.mark.parametrize("how", [dict(precision="float32"), dict(precision="bfloat16", compile=True)])
def test_nets_in_other_precisions_and_those_that_torch_compiles_stay_as_they_were_written(how):
    model = Engine("cpu", **how).prepare(models.build("tiny", 4))
    nodes = model.folded.graph.graph.nodes
    assert not any("keep" in node.kwargs for node in nodes)
    assert sum(node.target is operator.add for node in nodes) == 3
    assert not any(fused.native for *_, fused in model.folded.pairs)


@own
@pytest.mark.parametrize(("name", "sums", "kept"), [("tiny", 3, 3), ("resnet18", 8, 8)])
def test_every_residual_sum_is_made_inside_a_convolution(name, sums, kept):
    graph = Folded(models.build(name, 4).eval(), dtype=torch.bfloat16).graph.graph
    assert not any(node.target is operator.add for node in graph.nodes)
    assert sum(node.op == "call_module" and len(node.args) == 2 for node in graph.nodes) == sums
    assert sum("keep" in node.kwargs for node in graph.nodes) == kept


@own
@pytest.mark.parametrize("name", ["tiny", "resnet18"])
def test_with_sums_inside_gradients_lie_no_further_from_exact_ones(name):
    def gradient(engine):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = far_from_fresh(models.build(name, 4))
        return input_gradient(engine.prepare(model), x.to(engine.dtype), y).double()

    x, y = batch(16, size=16)
    exact = gradient(Engine("cpu", "float32"))
    mine, theirs = (
        (gradient(Engine("cpu", "bfloat16", fold=fold)) - exact).norm() / exact.norm() for fold in (True, False)
    )
    assert mine < 1.1 * theirs
