"""The nets: sizes against published counts, stems, seeds, and gradients down to the pixels."""

import functools
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from semkit.images.pixels import seeded
from semkit.nets import models


@functools.cache
def on_meta(name, size):
    """The net for 10 classes without memory for its weights: shapes and costs are those of the real one."""
    with torch.device("meta"):
        return models.MODELS[name](10, size).eval()


@functools.cache
def passed_through(name, size):
    """What one image costs in multiply-adds, where its last convolution leaves it, and the output's shape."""
    model, seen = on_meta(name, size), []
    last = [m for m in model.modules() if isinstance(m, nn.Conv2d)][-1]
    hook = last.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[2:])))
    with FlopCounterMode(display=False) as counter:
        output = model(torch.zeros(1, 3, size, size, device="meta"))
    hook.remove()
    return counter.get_total_flops() / 2, seen[0], output.shape


def weights(model):
    return sum(w.numel() for w in model.parameters())


def convolution(inside, outside, kernel, bias=False):
    return outside * (inside * kernel**2 + bias)


def resnet_basic(widths):
    """Weights of the lesson net: every convolution followed by a norm of two numbers a channel."""
    total, inside = convolution(3, widths[0], 3) + 2 * widths[0], widths[0]
    for width in widths:
        total += convolution(inside, width, 3) + convolution(width, width, 3) + 4 * width
        total += 0 if inside == width else convolution(inside, width, 1) + 2 * width
        inside = width
    return total + inside * 10 + 10


def vgg16(head):
    widths = [64, 64, 128, 128, 256, 256, 256, *[512] * 6]
    body = sum(convolution(i, o, 3, bias=True) + 2 * o for i, o in zip([3, *widths], widths, strict=False))
    return body + head


def other_head(published, features):
    """A published ImageNet count with 10 classes for 1,000."""
    return published - 990 * (features + 1)


# ResNets and WRN as reported for their CIFAR forms; the others from torchvision's published counts, or by hand.
COUNTS = {
    ("small", 32): resnet_basic((32, 64, 128)),
    ("tiny", 32): resnet_basic((24, 48, 96)),
    ("conv4", 32): convolution(3, 64, 3) + 3 * convolution(64, 64, 3) + 4 * 128 + 650,
    ("resnet18", 32): 11_173_962,
    ("resnet50", 32): 23_520_842,
    ("wrn34_10", 32): 46_160_474,
    ("vgg16_bn", 32): vgg16(512 * 10 + 10),
    ("densenet121", 32): other_head(7_978_856, 1024) - 64 * 3 * (7**2 - 3**2),
    ("mobilenet_v2", 32): other_head(3_504_872, 1280),
    ("efficientnet_v2_s", 32): other_head(21_458_488, 1280),
    ("resnet18", 224): other_head(11_689_512, 512),
    ("resnet18_stride1", 224): 11_173_962,
    ("resnet50", 224): other_head(25_557_032, 2048),
    ("wrn34_10", 224): 46_160_474,
    ("vgg16_bn", 224): other_head(138_365_992, 4096),
    ("densenet121", 224): other_head(7_978_856, 1024),
    ("mobilenet_v2", 224): other_head(3_504_872, 1280),
    ("efficientnet_v2_s", 384): other_head(21_458_488, 1280),
    ("deit_tiny", 224): other_head(5_717_416, 192),
    # 16-pixel patches become 4-pixel ones, 196 places become 64.
    ("deit_tiny", 32): other_head(5_717_416, 192) - 192 * 3 * (16**2 - 4**2) - 192 * (196 - 64),
}


DEEP = ("densenet121", "efficientnet_v2_s", "deit_tiny")


def told_apart(cases):
    """The cases, those of a deep net or of large images marked as `whole`, because they take longer."""
    return [pytest.param(*case, marks=[pytest.mark.whole] * (case[1] > 32 or case[0] in DEEP)) for case in cases]


@pytest.mark.parametrize(("name", "size"), told_apart(COUNTS), ids=str)
def test_weights_and_output_have_the_published_size(name, size):
    if name == "deit_tiny":
        pytest.importorskip("timm")
    assert weights(on_meta(name, size)) == COUNTS[name, size]
    assert passed_through(name, size)[2] == (1, 10)


# Published: the ResNets and WRN for CIFAR, torchvision's tables for the large sizes.
@pytest.mark.parametrize(
    ("name", "size", "published"),
    told_apart([
        ("resnet18", 32, 0.56),
        ("resnet50", 32, 1.30),
        ("wrn34_10", 32, 6.65),
        ("vgg16_bn", 32, 0.31),
        ("resnet18", 224, 1.81),
        ("resnet18_stride1", 224, 0.56 * 49),
        ("densenet121", 224, 2.83),
        ("mobilenet_v2", 224, 0.30),
        ("efficientnet_v2_s", 384, 8.37),
    ]),
)  # fmt: skip
def test_a_forward_pass_costs_what_is_published(name, size, published):
    assert passed_through(name, size)[0] / 1e9 == pytest.approx(published, rel=0.02)


# The library's nets with the size that torchvision made them for.
LIBRARY = {"resnet18": 224, "resnet50": 224, "densenet121": 224, "mobilenet_v2": 224, "efficientnet_v2_s": 384}
LEFT = [(name, 32, 4) for name in LIBRARY] + [(name, size, size // 32) for name, size in LIBRARY.items()]


@pytest.mark.parametrize(("name", "size", "left"), told_apart(LEFT))
def test_a_small_image_keeps_four_by_four_places_and_a_large_one_is_halved_five_times(name, size, left):
    assert passed_through(name, size)[1] == (left, left)


# -- values ------------------------------------------------------------------------------------------------------------

TIMM = pytest.param("deit_tiny", marks=pytest.mark.whole)  # its library takes a second to import
LIGHT = ["small", "tiny", "conv4", "resnet18", "mobilenet_v2", TIMM]


def opened(name, seed=0):
    if name == "deit_tiny":
        pytest.importorskip("timm")
    return models.build(name, 4, seed)


@pytest.mark.parametrize("name", LIGHT)
def test_eval_mode_repeats_itself_and_gradients_reach_every_pixel(name):
    model = opened(name).eval()
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    first = model(x)
    assert torch.equal(model(x), first) and first.isfinite().all()
    g = torch.autograd.grad(F.cross_entropy(first, torch.tensor([0, 1]), reduction="sum"), x)[0]
    assert g.isfinite().all() and (g != 0).double().mean() > 0.99


@pytest.mark.parametrize("name", LIGHT)
def test_train_mode_draws_no_random_numbers(name):
    model = opened(name).train()
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    assert torch.equal(model(x), model(x))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("name", "size"), [*LIBRARY.items(), ("vgg16_bn", 224), ("vgg16_bn", 32), ("wrn34_10", 32)])
def test_no_heavy_net_has_a_layer_that_draws(name, size):
    from torchvision.ops import StochasticDepth

    for module in on_meta(name, size).modules():
        assert not (isinstance(module, StochasticDepth | nn.Dropout) and module.p)


def test_images_are_centred_inside_the_model():
    model, seen = models.build("resnet18", 4), []
    model[1].conv1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model(x)
    assert torch.equal(seen[0], x - 0.5)


@pytest.mark.parametrize("name", [TIMM if name == "deit_tiny" else name for name in models.MODELS])
def test_every_net_starts_with_the_centring(name):
    if name == "deit_tiny":
        pytest.importorskip("timm")
    assert isinstance(on_meta(name, 32)[0], models.Centre)


class ByHand(nn.Module):
    """A pre-activation block as the paper's figure 1 draws it, over another block's weights."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        b = self.block
        active = torch.relu(b.norm1(x))
        middle = F.conv2d(active, b.conv1.weight, stride=b.conv1.stride, padding=1)
        out = F.conv2d(torch.relu(b.norm2(middle)), b.conv2.weight, padding=1)
        return out + (x if b.shortcut is None else F.conv2d(active, b.shortcut.weight, stride=b.conv1.stride))


def test_the_wide_net_is_put_together_as_published():
    model = models.wrn34_10(4, depth=16, widen=1).double().eval()
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    blocks = [m for m in model if isinstance(m, models.PreActivation)]
    shapes = [(b.conv1.in_channels, b.conv1.out_channels, b.conv1.stride[0]) for b in blocks]
    assert shapes == [(16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
    by_hand = nn.Sequential(*[ByHand(m) if m in blocks else m for m in model]).eval()
    torch.testing.assert_close(model(x), by_hand(x), rtol=0, atol=1e-12)
    full = [m for m in on_meta("wrn34_10", 32) if isinstance(m, models.PreActivation)]
    assert [b.conv2.out_channels for b in full] == 5 * [160] + 5 * [320] + 5 * [640]
    assert [b.conv1.stride[0] for b in full] == [1] * 5 + [2] + [1] * 4 + [2] + [1] * 4


# -- building ----------------------------------------------------------------------------------------------------------


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ["small", "resnet18", TIMM])
def test_a_seed_fixes_the_weights_and_leaves_the_global_generator_alone(name):
    before = torch.get_rng_state()
    a, b, c = opened(name, 3), opened(name, 3), opened(name, 4)
    assert same(a, b) and not same(a, c)
    assert torch.equal(torch.get_rng_state(), before)


def test_threads_that_build_at_the_same_time_get_their_own_weights():
    expected = [models.build("small", 4, seed) for seed in range(8)]
    got, gate = {}, threading.Barrier(8, timeout=20)

    def work(seed):
        gate.wait()
        for _ in range(5):
            got[seed] = models.build("small", 4, seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(got[seed], expected[seed]) for seed in range(8))


def test_a_net_can_be_built_where_the_global_generator_is_lent_already():
    with seeded(5):
        wanted = torch.rand(2)
    with seeded(5):
        first = torch.rand(1)
        assert same(models.build("small", 4, 3), models.build("small", 4, 3))
        assert torch.equal(torch.cat([first, torch.rand(1)]), wanted)


NEAREST = {"resnet81": "resnet18", "ResNet-18": "resnet18", "wrn-34-10": "wrn34_10", "vgg16": "vgg16_bn"}


@pytest.mark.parametrize(("typed", "meant"), NEAREST.items())
def test_an_unknown_name_suggests_the_nearest(typed, meant):
    with pytest.raises(ValueError, match=f"unknown model '{typed}'; did you mean {meant}"):
        models.build(typed, 10)


def test_a_name_like_no_other_lists_them_all():
    with pytest.raises(ValueError, match=r"known are small, tiny, conv4, resnet18.*deit_tiny"):
        models.build("transformer", 10)


@pytest.mark.parametrize(("classes", "size"), [(0, 32), (2.5, 32), (10, 0), (10, 31.5)])
def test_counts_that_are_none_are_refused(classes, size):
    with pytest.raises(ValueError, match="must be a whole number >= 1"):
        models.build("small", classes, size=size)


@pytest.mark.parametrize(("name", "size"), [("vgg16_bn", 28), ("deit_tiny", 30), ("deit_tiny", 100)])
def test_a_size_that_a_net_cannot_take_is_refused(name, size):
    with pytest.raises(ValueError, match=f"{name} needs images .* got {size}"):
        models.build(name, 10, size=size)


def test_without_timm_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # how Python marks a module that cannot be imported
    with pytest.raises(ValueError, match=r"needs timm: pip install semkit\[models\]"):
        models.build("deit_tiny", 10)


@pytest.mark.whole
def test_importing_the_models_imports_neither_library():
    code = "import sys, semkit.nets.models; print(sorted({'torchvision', 'timm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


LATER = [pytest.param(name, marks=pytest.mark.whole) for name in DEEP]
NETS = ("tiny", "tiny+injected", "resnet18", "vgg16_bn", "mobilenet_v2", *LATER)


@pytest.mark.parametrize("name", NETS)
def test_what_is_left_to_train_is_the_layer_that_answers(name):
    if name == "deit_tiny":
        pytest.importorskip("timm")
    model = models.freeze_but_last(models.build(name, 7)).eval()
    left = [weight for weight in model.parameters() if weight.requires_grad]
    assert [len(weight) for weight in left] == [7] * (3 if name.endswith(models.INJECTED) else 2)
    x = torch.rand(2, 3, 32, 32)
    assert model(x).std(0).max() > 0
    for weight in left:
        weight.data.zero_()
    assert not model(x).any()
