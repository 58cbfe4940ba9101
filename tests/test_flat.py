"""The input gradient as a list of operations: the bits of autograd, for every net, before and after it is trained."""

import copy
import pickle
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from nets import batch, far_from_fresh, net
from torch import nn

from semkit import flat, models, rewriting
from semkit.engine import Engine, how_run, input_gradient, train_step
from semkit.rewriting import relu_, slope_

PRECISIONS = ["bfloat16", "float32", "float64"]


class TwoReaders(nn.Module):
    """Results that are looked at again after relu has seen them, whole or in part, and the images too."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(41, 4)

    def forward(self, x):
        y = self.norm(self.conv(x))
        positive = F.relu(y)
        halves = torch.tanh(y).chunk(2, 1)
        seen = [positive.permute(0, 2, 3, 1).mean((1, 2)), (positive * y - y).mean((2, 3))]
        parts = [F.relu(halves[0]), F.relu((x - 0.5).split(1, 1)[0]) * x[:, :1]]
        return self.head(torch.cat([*seen, *(part.mean((2, 3)) for part in parts)], 1))


def depthwise():
    """Convolutions in groups, dilated, with a bias, without padding."""
    layers = [nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(True), nn.Conv2d(16, 16, 3, 1, 1, groups=16)]
    layers += [nn.BatchNorm2d(16), nn.ReLU6(True), nn.Conv2d(16, 8, 3, 1, 2, dilation=2), nn.ReLU(), nn.Conv2d(8, 8, 2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


NETS = {
    "small": lambda: net(),
    "resnet18": lambda: models.build("resnet18", 4),
    "pre-activation": lambda: models.wrn34_10(4, depth=10, widen=1),
    "depthwise": depthwise,
    "two readers": TwoReaders,
}


@pytest.fixture(autouse=True)
def nothing_written(monkeypatch):
    monkeypatch.setattr(flat, "_lists", {})
    monkeypatch.setattr(flat, "_calls", Counter())


@pytest.fixture
def at_once(monkeypatch):
    """Lists are written at the first call."""
    monkeypatch.setattr(flat, "CALLS_BEFORE", 0)


def pair(build, precision="bfloat16"):
    """A net on an engine with lists, and the same one without."""
    engine = Engine("cpu", precision)
    mine, theirs = engine.prepare(far_from_fresh(build())), replace(engine, flat=False).prepare(far_from_fresh(build()))
    theirs.load_state_dict(mine.state_dict())
    return mine, theirs


def same(mine, theirs, x, y):
    return torch.equal(input_gradient(mine, x, y), input_gradient(theirs, x, y))


LARGE = {"resnet18": ["bfloat16"]}  # seconds for each


@pytest.mark.parametrize(
    ("name", "precision"), [(name, precision) for name in NETS for precision in LARGE.get(name, PRECISIONS)]
)
def test_a_list_gives_the_bits_of_autograd_before_and_after_training(name, precision, at_once):
    mine, theirs = pair(NETS[name], precision)
    x, y = batch(8, dtype=mine.engine.dtype, size=16)
    x = x.contiguous(memory_format=torch.channels_last)
    shares = torch.softmax(torch.arange(32, dtype=x.dtype).view(8, 4).sin(), 1)
    asked = [(x, y), (x, shares), (x[:3], y[:3])] if name == "small" else [(x, y)]  # every shape has its own list
    for _ in range(2):
        assert all(same(mine, theirs, *what) for what in asked)
        losses = [train_step(m, torch.optim.SGD(m.parameters(), 0.1), x, y) for m in (mine, theirs)]
        assert losses[0] == losses[1]
    assert mine.flat.why_not is None and len(mine.flat.written) == len(asked) and theirs.flat is None


def test_a_list_leaves_the_images_as_they_were(at_once):
    mine, _ = pair(TwoReaders)
    x, y = batch(8, size=16)
    before = x.clone()
    input_gradient(mine, x, y)
    assert mine.flat.written and torch.equal(x, before)


def test_a_list_follows_weights_that_are_loaded_and_a_copy_its_own(at_once):
    mine, theirs = pair(net)
    x, y = batch()
    assert same(mine, theirs, x, y)
    copied, before = copy.deepcopy(mine), input_gradient(mine, x, y)
    for m in (mine, theirs):
        m.load_state_dict(far_from_fresh(net(), seed=5).state_dict())
    assert same(mine, theirs, x, y) and not torch.equal(input_gradient(mine, x, y), before)
    assert torch.equal(input_gradient(copied, x, y), before)
    train_step(copied, torch.optim.SGD(copied.parameters(), 0.1), x, y)
    assert not torch.equal(input_gradient(copied, x, y), before) and same(mine, theirs, x, y)


def test_a_list_is_written_for_a_shape_that_came_often_and_used_from_then_on():
    mine, _ = pair(net)
    x, y = batch()
    for _ in range(flat.CALLS_BEFORE):
        input_gradient(mine, x, y)
        input_gradient(mine, x[:2], y[:2])
    assert not mine.flat.written
    input_gradient(mine, x, y)
    assert [shape[0] for shape in mine.flat.written] == [x.shape]
    [written] = mine.flat.written.values()
    written.run = lambda x, *_: torch.full_like(x, 7)
    assert (input_gradient(mine, x, y) == 7).all() and not (input_gradient(mine, x[:2], y[:2]) == 7).any()


def test_nets_that_are_built_alike_share_a_list_each_with_its_own_weights():
    (one, two), (x, y) = pair(net), batch()
    two.load_state_dict(far_from_fresh(net(), seed=5).state_dict())
    two = one.engine.prepare(two)
    for i in range(flat.CALLS_BEFORE):
        input_gradient((one, two)[i % 2], x, y)
    expected = [input_gradient(replace(m.engine, flat=False).prepare(copy.deepcopy(m)), x, y) for m in (one, two)]
    found = [input_gradient(m, x, y) for m in (one, two)]
    assert all(map(torch.equal, found, expected)) and not torch.equal(*found)
    assert len(one.flat.written) == len(two.flat.written) == len(flat._lists) == 1


def test_nets_that_are_built_otherwise_or_run_in_another_precision_do_not(at_once):
    x, y = batch()
    nets = [net(), models.small(4, widths=(8, 8)), nn.Sequential(nn.Flatten(), nn.Linear(192, 4))]
    for precision in ("bfloat16", "float32"):
        for model in nets:
            model = Engine("cpu", precision).prepare(model)
            input_gradient(model, x, y)
            assert model.flat.why_not is None and len(model.flat.written) == 1
    assert len(flat._lists) == 2 * len(nets)


class Scaled(nn.Module):
    """A tensor that is neither weight nor buffer."""

    def __init__(self, scale):
        super().__init__()
        self.scale, self.head = torch.tensor(scale), nn.Linear(192, 4)

    def forward(self, x):
        return self.head((x * self.scale).flatten(1))


def test_tensors_that_are_neither_weights_nor_buffers_are_a_nets_own_too(at_once):
    for scale in (2.0, 3.0):
        mine, theirs = pair(lambda scale=scale: Scaled(scale), "float32")
        assert same(mine, theirs, *batch()) and mine.flat.why_not is None
    assert len(flat._lists) == 1


@pytest.mark.parametrize(("activation", "why_not"), [
    (nn.ReLU, None), (nn.Tanh, "the list gave another gradient than autograd"),
])  # fmt: skip
def test_a_list_of_a_net_that_only_looks_the_same_is_not_used(activation, why_not, at_once):
    def built(activation):
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), activation(), nn.Linear(8, 4))

    one, _ = pair(lambda: built(nn.ReLU), "float32")
    input_gradient(one, *batch())
    mine, theirs = pair(lambda: built(activation), "float32")
    mine.folded.kind = one.folded.kind  # as if nothing told the two apart
    assert same(mine, theirs, *batch()) and mine.flat.why_not == why_not


def test_a_net_that_cannot_be_written_down_says_why_and_autograd_does_it(at_once, monkeypatch):
    mine, theirs = pair(net)
    x, y = batch()

    def refuses(function):
        raise NotImplementedError("no rule\nfor this operation")

    monkeypatch.setattr(flat, "make_fx", refuses)
    assert same(mine, theirs, x, y) and same(mine, theirs, x, y)
    assert mine.flat.why_not == "no rule for this operation" and not mine.flat.written


def test_a_list_that_gives_other_bits_is_not_used(at_once, monkeypatch):
    mine, theirs = pair(net)
    x, y = batch()
    monkeypatch.setattr(flat.Written, "__call__", lambda self, x, y: input_gradient(theirs, x, y) * (1 + 2**-20))
    assert same(mine, theirs, x, y) and mine.flat.why_not == "the list gave another gradient than autograd"


def test_a_list_that_holds_what_it_was_made_with_is_not_used(at_once, monkeypatch):
    mine, theirs = pair(net)
    x, y = batch()
    first = input_gradient(theirs, x, y)
    monkeypatch.setattr(flat.Written, "__call__", lambda self, x, y: first)
    assert same(mine, theirs, x, y) and mine.flat.why_not == "the list gave another gradient than autograd"


def test_a_net_has_so_many_lists_and_not_more(at_once):
    mine, _ = pair(net)
    x, y = batch(flat.MOST + 2)
    for n in range(1, flat.MOST + 3):
        input_gradient(mine, x[:n], y[:n])
    assert len(mine.flat.written) == flat.MOST and mine.flat.why_not is None


def test_a_net_with_a_list_can_be_pickled_and_the_one_that_comes_back_writes_its_own(at_once):
    mine, theirs = pair(net)
    input_gradient(mine, *batch())
    back = pickle.loads(pickle.dumps(mine))
    assert mine.flat.written and not back.flat.written
    assert same(back, theirs, *batch()) and len(back.flat.written) == 1


@pytest.mark.parametrize("engine", [dict(flat=False), dict(fold=False)])
def test_lists_are_of_folded_nets(engine):
    assert Engine("cpu", "float32", **engine).prepare(net()).flat is None


def no_compiler(x):
    raise OSError("no C++ compiler")


def test_a_net_that_torch_compiles_has_no_list_before_that_fails(at_once, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda graph: graph)
    mine, (x, y) = Engine("cpu", "float32", compile=True).prepare(net()), batch()
    input_gradient(mine, x, y)
    assert not mine.flat.written and ", compiled, not listed (compiled), " in how_run(mine)
    mine.folded.run = no_compiler
    with pytest.warns(UserWarning, match="the net runs uncompiled: no C.. compiler"):
        input_gradient(mine, x, y)
    input_gradient(mine, x, y)
    assert mine.flat.written and how_run(mine) == (
        "cpu, float32, channels_last, folded, not compiled (no C++ compiler), "
        "listed after 100 passes of a shape, samples batched up to 32 MiB a tensor"
    )


def test_injected_noise_is_not_written_down():
    assert Engine("cpu").prepare(models.build("tiny+injected", 4)).flat is None


def test_a_list_that_writes_over_what_is_still_looked_at_would_be_seen(at_once, monkeypatch):
    def always(graph):
        for node in graph.nodes:
            if node.target is torch.ops.aten.relu.default:
                node.target = relu_

    mine, _ = pair(TwoReaders)
    x, y = batch(8, size=16)
    monkeypatch.setattr(rewriting, "_write_over", always)
    input_gradient(mine, x, y)
    assert mine.flat.why_not == "the list gave another gradient than autograd"


def test_a_list_with_the_weights_of_before_would_be_seen(at_once):
    mine, theirs = pair(net)
    x, y = batch()
    assert same(mine, theirs, x, y)
    [written] = mine.flat.written.values()
    assert written.laid_out  # convolutions with weights laid out for oneDNN
    for m in (mine, theirs):
        train_step(m, torch.optim.SGD(m.parameters(), 0.1), x, y)
    mine.folded.refresh()
    written.version = mine.folded.version
    assert not same(mine, theirs, x, y)


# -- relu on integers --------------------------------------------------------------------------------------------------

EVERY = torch.arange(2**16).to(torch.uint16).view(torch.bfloat16)  # every bfloat16 number, infinities, NaNs


def test_relu_of_every_bfloat16_number_is_torchs():
    mine, theirs = relu_(EVERY.clone()), torch.relu(EVERY)
    assert torch.equal(mine.isnan(), theirs.isnan()) and mine.isnan().sum() == 254
    assert torch.equal(mine.nan_to_num(7), theirs.nan_to_num(7))
    clamped = EVERY.clone().view(torch.int16).clamp_min_(0).view(torch.bfloat16)
    assert not torch.equal(clamped.isnan(), theirs.isnan())  # the simpler way loses the NaNs that have a sign


def test_the_slope_of_relu_at_every_bfloat16_number_is_torchs():
    generator = torch.Generator().manual_seed(0)
    slopes, y = torch.randn(2**16, generator=generator).bfloat16(), torch.relu(EVERY.nan_to_num(1))
    theirs = torch.ops.aten.threshold_backward(slopes, y, 0)
    given = slopes.clone()
    mine = slope_(given, y)
    assert torch.equal(mine, theirs) and mine.data_ptr() == given.data_ptr() and (mine == 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_numbers_take_torchs_own_operations_in_place(dtype):
    x = torch.randn(100, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = relu_(x.clone())
    assert torch.equal(y, torch.relu(x)) and torch.equal(slope_(x.clone(), y), torch.where(y > 0, x, 0))
