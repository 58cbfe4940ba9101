"""The engine: what it counts, where it runs, and that it leaves models and generators as it found them."""

import copy
import os
import pickle
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import batch, far_from_fresh, net
from scipy import stats
from torch import nn

from semkit.nets import models
from semkit.nets.engine import (
    THEIRS,
    Engine,
    count_passes,
    evaluating,
    input_gradient,
    logits,
    predict,
    train_step,
)
from semkit.nets.weights import Folded
from semkit.training.perturb import PGD

CPU = Engine("cpu", "float32")


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1)


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.BatchNorm1d(3)

    def forward(self, x):
        raise ArithmeticError("on purpose")


# -- passes ------------------------------------------------------------------------------------------------------------


def test_every_image_pass_is_counted_under_its_kind():
    model, (x, y) = net(), batch()
    with count_passes() as passes:
        predict(model, x)
        predict(model, x[:5])
        input_gradient(model, x[:2], y[:2])
        PGD(8, 3)(model, x, y)
        train_step(model, sgd(model), x, y)
    assert (passes.forward, passes.input_gradient, passes.training, passes.total) == (11, 2 + 3 * 6, 6, 26)
    predict(model, x)
    assert passes.forward == 11  # after its block a counter rests


def test_a_thread_counts_for_itself():
    model, (x, _) = net(), batch()
    seen = {}
    inside = threading.Barrier(2, timeout=20)

    def work():
        with count_passes() as passes:
            inside.wait()  # both threads are now in their blocks
            predict(model, x[:1])
            seen["worker"] = passes.forward

    thread = threading.Thread(target=work)
    with count_passes() as passes:
        thread.start()
        inside.wait()
        predict(model, x)
        thread.join()
    assert (seen["worker"], passes.forward) == (1, 6)


def test_a_counter_can_be_continued_and_survives_an_exception():
    model, (x, _) = net(), batch()
    with count_passes() as passes:
        predict(model, x)
    with pytest.raises(ArithmeticError), count_passes(passes):
        predict(model, x)
        predict(Broken(), x)
    predict(model, x)
    assert passes.forward == 6 + 6 + 6


# -- generators --------------------------------------------------------------------------------------------------------


def draws(*stream, seed=0, n=4):
    return torch.rand(n, generator=CPU.generator(seed, *stream), dtype=torch.float64)


def test_a_stream_depends_on_its_seed_and_names_alone():
    before = torch.get_rng_state()
    first = draws("step", 7)
    draws("order", 1)
    torch.rand(5)
    torch.set_rng_state(before)
    assert torch.equal(draws("step", 7), first)
    others = [draws("step", 8), draws("step", 7, seed=1), draws("step7"), draws("ste", "p7"), draws("step", "7")]
    assert not any(torch.equal(first, other) for other in others)
    assert torch.equal(torch.get_rng_state(), before)


def test_neighbouring_streams_are_independent():
    table = torch.stack([draws("step", i, seed=s, n=4) for s in range(4) for i in range(500)]).numpy()
    assert len(np.unique(table)) == table.size
    for column in table.T:
        assert stats.kstest(column, stats.uniform.cdf).pvalue > 1e-3
        assert abs(np.corrcoef(column[:-1], column[1:])[0, 1]) < 0.1
    assert abs(np.corrcoef(table[:500, 0], table[500:1000, 0])[0, 1]) < 0.2


# -- device, precision, layout -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float16", "half", "", "tf32"])
def test_an_unknown_precision_is_refused_with_the_known_ones(precision):
    with pytest.raises(ValueError, match="auto, float32, bfloat16 or float64"):
        Engine("cpu", precision)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_with_what_to_write():
    with pytest.raises(ValueError, match=r"no CUDA GPU.*cpu"):
        Engine("cuda")


def test_a_gpu_beyond_those_that_are_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="'cuda:9' asked for, but torch sees cuda:0 to cuda:1 only"):
        Engine("cuda:9", "float32")


def test_on_a_gpu_float32_is_float32_and_sums_are_the_same_at_every_run(monkeypatch):
    for flag in ("allow_tf32", "deterministic"):  # put back after the test
        monkeypatch.setattr(torch.backends.cudnn, flag, getattr(torch.backends.cudnn, flag))
    absent = SimpleNamespace(device="cuda:99", keep_memory=False, dtype=torch.float32, layout=torch.contiguous_format)
    with pytest.raises((AssertionError, RuntimeError)):  # no machine has it
        Engine.prepare(absent, net())
    assert not torch.backends.cudnn.allow_tf32 and torch.backends.cudnn.deterministic


def test_auto_takes_apples_gpu_where_torch_has_it_and_no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    engine = Engine()
    assert (engine.device, engine.precision, engine.layout) == ("mps", "float32", torch.contiguous_format)
    with pytest.raises(ValueError, match="float64 is not available on MPS: write float32, or device cpu"):
        Engine("mps", "float64")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is an MPS")
def test_apples_gpu_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="'mps' asked for, but torch sees no MPS GPU; write cpu or auto"):
        Engine("mps")


@pytest.mark.parametrize("device", ["gpu", "graphics card", "cpu:x"])
def test_an_unknown_device_is_a_value_error(device):
    with pytest.raises(ValueError):
        Engine(device)


def test_an_engine_settles_what_auto_means():
    engine = Engine()
    gpus = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    assert engine.device == next((name for name, there in gpus.items() if there), "cpu")
    assert engine.precision in ("float32", "bfloat16")
    assert Engine(engine.device, engine.precision) == engine


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("float64", torch.float64)])
def test_prepared_models_and_images_have_the_engines_dtype_and_layout(precision, dtype):
    engine = Engine("cpu", precision)
    model = engine.prepare(net())
    assert all(w.dtype == dtype for w in model.parameters())
    assert model[1].weight.is_contiguous(memory_format=torch.channels_last)
    levels = torch.arange(-128, 128).to(torch.int8).view(2, 2, 8, 8)
    x = engine.images(levels)
    assert x.dtype == dtype and x.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(x.numpy(), levels.numpy().astype(precision) / 255)


def test_bfloat16_stays_inside_the_net():
    x, y = batch()
    exact, rough = CPU.prepare(net()), Engine("cpu", "bfloat16").prepare(net())
    assert all(w.dtype == torch.float32 for w in rough.parameters())
    a, b = predict(exact, x), predict(rough, x)
    assert b.dtype == torch.float32 and not torch.equal(a, b)
    torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
    g, h = input_gradient(exact, x, y), input_gradient(rough, x, y)
    assert h.dtype == torch.float32 and F.cosine_similarity(g.flatten(), h.flatten(), 0) > 0.98


# -- folding -----------------------------------------------------------------------------------------------------------

DOUBLE = Engine("cpu", "float64")


def depthwise():
    """A biased and a depthwise convolution, as mobile nets have them."""
    first, second = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 1, 1, groups=6, bias=False)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)]
    return nn.Sequential(first, nn.BatchNorm2d(6), nn.ReLU6(True), second, nn.BatchNorm2d(6), nn.ReLU6(True), *head)


class Again(nn.Module):
    """A convolution that is called twice, before one norm and before another or the same."""

    def __init__(self, norms):
        super().__init__()
        self.first, self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.Linear(8, 4)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(norms))

    def forward(self, x):
        y = torch.relu(self.norms[0](self.conv(self.first(x))))
        return self.head(self.norms[-1](self.conv(y)).mean((2, 3)))


NETS = {
    "small": net,
    "one convolution and norm twice": lambda: Again(1),
    "one convolution, two norms": lambda: Again(2),
    "resnet18": lambda: models.build("resnet18", 4),
    "depthwise": depthwise,
    "pre-activation": lambda: models.wrn34_10(4, depth=10, widen=1),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.whole] * ("resnet" in name)) for name in NETS])
def test_a_prepared_net_answers_as_the_plain_one_before_and_after_training(name):
    model, twin = (engine.prepare(far_from_fresh(NETS[name]())) for engine in (DOUBLE, Engine("cpu", "float64", False)))
    twin.load_state_dict(model.state_dict())
    (x, y), rates = batch(3, dtype=torch.float64), (sgd(model), sgd(twin))
    for _ in range(2):
        torch.testing.assert_close(predict(model, x), twin.eval()(x), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(input_gradient(model, x, y), input_gradient(twin, x, y), rtol=1e-9, atol=1e-9)
        losses = [train_step(m, rate, x, y) for m, rate in zip((model, twin), rates, strict=True)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-9)
    assert list(model.state_dict()) == list(twin.state_dict())
    assert all(w.requires_grad for w in model.parameters())


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_all_that_a_folded_convolution_meets_lies_as_the_engine_has_it(layout, precision):
    model, found = Engine("cpu", precision, layout=layout).prepare(net()), []
    lies = lambda values: values.is_contiguous(memory_format=layout)  # noqa: E731
    for conv, _, fused in model.folded.pairs:
        assert fused.weight.stride() == conv.weight.stride()
        fused.register_forward_pre_hook(lambda _, given: found.append(lies(given[0])))
    x, y = batch()
    for images in (x.contiguous(), x.contiguous(memory_format=torch.channels_last)):
        input_gradient(model, images, y)
        predict(model, images)
    assert len(found) == 4 * len(model.folded.pairs) and all(found)


def plain(channels=8):
    """Convolutions of stride 1 one after another, for four classes."""
    layers = [nn.Conv2d(3, channels, 3, 1, 1), nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3)]
    layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4)]
    return far_from_fresh(nn.Sequential(*layers))


def test_weights_kept_in_bfloat16_are_what_autocast_makes_of_them_at_every_call():
    (x, y), rough = batch(), Engine("cpu", "bfloat16")
    model, twin = rough.prepare(plain()), rough.prepare(plain())
    twin.load_state_dict(model.state_dict())
    object.__setattr__(twin, "folded", Folded(twin.eval()))
    for _ in range(2):
        mine, theirs = input_gradient(model, x, y), input_gradient(twin, x, y)
        # Two kernels, which add in different orders: one value of a gradient in some hundred is rounded the other way.
        assert (mine != theirs).sum() <= 2 and torch.allclose(mine, theirs, rtol=2**-6)
        assert model.folded.pairs[0][2].weight.dtype != twin.folded.pairs[0][2].weight.dtype
        for m in (model, twin):
            train_step(m, sgd(m), x, y)


def test_a_prepared_net_follows_weights_that_are_loaded_and_copies_follow_their_own():
    model, (x, y) = DOUBLE.prepare(net()), batch(dtype=torch.float64)
    before, other = predict(model, x), far_from_fresh(net(torch.float64), seed=5).eval()
    copied = copy.deepcopy(model)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(predict(model, x), other(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(predict(copied, x), before, rtol=0, atol=1e-12)
    train_step(copied, sgd(copied), x, y)
    torch.testing.assert_close(predict(copied, x), copied.eval()(x), rtol=0, atol=1e-10)


def fused_sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1, fused=True)


def step_in_eval_mode(model, x, y):
    F.cross_entropy(model.eval()(x), y).backward()
    sgd(model).step()


@torch.no_grad()
def turn_a_weight(model, x, y):
    model[1].weight.copy_(model[1].weight.flip(0))


@pytest.mark.whole
def test_nets_are_prepared_in_several_threads_while_others_run():
    x, y = batch()
    ready, stop, errors = Engine("cpu", "float32").prepare(net()), threading.Event(), []
    expected = ready.folded.graph.code

    def trains():
        while not stop.is_set():
            train_step(ready, sgd(ready), x, y)

    def prepares():
        for _ in range(20):
            model = Engine("cpu", "float32").prepare(net())
            assert model.folded.graph.code == expected

    def noting(work):
        try:
            work()
        except BaseException as error:
            errors.append(error)

    before = nn.Module.__call__
    threads = [threading.Thread(target=noting, args=(work,)) for work in (trains, prepares, prepares)]
    for thread in threads:
        thread.start()
    for thread in threads[1:]:
        thread.join()
    stop.set()
    threads[0].join()
    assert not errors and nn.Module.__call__ is before


WRITES = {
    "a step": lambda model, x, y: train_step(model, sgd(model), x, y),
    "a fused step": lambda model, x, y: train_step(model, fused_sgd(model), x, y),
    "a step in eval mode": step_in_eval_mode,
    "a pass in train mode": lambda model, x, y: model.train()(x),
    "loaded weights": lambda model, x, y: model.load_state_dict(far_from_fresh(net(), seed=5).state_dict()),
    "a weight without gradients": turn_a_weight,
    "a write through .data": lambda model, x, y: model[1].weight.data.mul_(2),
    "statistics through .data": lambda model, x, y: model[2].running_var.data.mul_(2),
}


def follows(write):
    """Whether the prepared net answers as the plain one after `write`, which changes its answers."""
    model, (x, y) = DOUBLE.prepare(net()), batch(dtype=torch.float64)
    before = predict(model, x)
    write(model, x, y)
    plain = model.eval()(x)
    assert (plain - before).abs().max() > 1e-6
    return bool((predict(model, x) - plain).abs().max() < 1e-9)


@pytest.mark.parametrize("write", WRITES)
def test_a_prepared_net_follows_every_write(write):
    assert follows(WRITES[write])


COMPILING = replace(DOUBLE, compile=True)


@pytest.mark.whole
def test_a_compiled_net_answers_as_the_plain_one_and_follows_its_training(monkeypatch):
    # A backend of torch's own that generates no C++: what is tested is that the traced code sees new weights.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model, twin, (x, y) = COMPILING.prepare(net()), DOUBLE.prepare(net()), batch(dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(input_gradient(model, x, y), input_gradient(twin, x, y), rtol=1e-9, atol=1e-9)
        for m in (model, twin):
            train_step(m, sgd(m), x, y)
    assert model.folded.compiled and not twin.folded.compiled


def no_compiler(graph, inputs):
    raise FileNotFoundError("no C++ compiler")


@pytest.mark.whole
def test_where_compiling_fails_the_net_runs_uncompiled_and_says_why(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=no_compiler))
    model, twin, (x, _) = COMPILING.prepare(net()), DOUBLE.prepare(net()), batch(dtype=torch.float64)
    with pytest.warns(UserWarning, match="runs uncompiled: .*no C.. compiler"):
        assert torch.equal(predict(model, x), predict(twin, x))
    assert torch.equal(predict(model, x), predict(twin, x)) and not model.folded.compiled


def test_compiling_needs_folding():
    with pytest.raises(ValueError, match="compile needs fold"):
        Engine("cpu", fold=False, compile=True)


# -- the four uses of a net --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("use", [predict, lambda m, x: input_gradient(m, x, torch.zeros(len(x), dtype=torch.long))])
def test_the_mode_comes_back_even_from_an_exception(use, training):
    broken, model = Broken().train(training), net().train(training)
    with pytest.raises(ArithmeticError, match="on purpose"):
        use(broken, torch.zeros(2, 3))
    use(model, batch()[0])
    for m in (broken, model):
        assert all(part.training is training for part in m.modules())


def test_evaluating_is_eval_mode_inside():
    model = net().train()
    with evaluating(model) as inside:
        assert inside is model and not any(part.training for part in model.modules())
    assert all(part.training for part in model.modules())


def test_predict_is_the_eval_mode_forward_without_a_graph():
    model, (x, _) = net().train(), batch()
    expected = copy.deepcopy(model).eval()(x)
    got = predict(model, x)
    assert torch.equal(got, expected) and not got.requires_grad
    assert not torch.allclose(logits(model, x), expected)  # train mode would have been another answer


def test_the_input_gradient_agrees_with_differences_and_is_each_images_own():
    model, (x, y) = net(torch.float64).train(), batch(3, dtype=torch.float64)
    got = input_gradient(model, x, y)
    step = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def losses(t):
        return F.cross_entropy(predict(model, x + t * step), y, reduction="none")

    slope = (losses(1e-6) - losses(-1e-6)) / 2e-6
    torch.testing.assert_close((got * step).flatten(1).sum(1), slope, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(input_gradient(model, x[1:2], y[1:2]), got[1:2], rtol=0, atol=1e-14)
    assert all(w.grad is None and w.requires_grad for w in model.parameters()) and not x.requires_grad


def test_a_train_step_is_one_step_down_the_mean_loss_in_train_mode():
    model, (x, y) = net(torch.float64).eval(), batch(dtype=torch.float64)
    twin = copy.deepcopy(model).train()
    loss = F.cross_entropy(twin(x), y)
    loss.backward()
    model[-1].weight.grad = torch.ones_like(model[-1].weight)  # a leftover that must not count
    assert train_step(model, sgd(model), x, y) == pytest.approx(loss.item(), abs=1e-14)
    for w, v in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(w, v - 0.1 * v.grad, rtol=0, atol=1e-14)
    assert model.training and torch.equal(model[2].running_mean, twin[2].running_mean)


# -- freed memory ------------------------------------------------------------------------------------------------------


# A small net's pass, 20 times: eight activations, all of them freed.
FAULTS = """
import ctypes, pickle, resource
import torch
from semkit import Engine
from semkit.nets.engine import keep_freed
{first}
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def held():
    blocks = [libc.malloc(6_000_000) for _ in range(8)]
    for block in blocks:
        ctypes.memset(ctypes.c_void_p(block), 1, 6_000_000)
    for block in blocks:
        libc.free(block)
held(), held()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    held()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, keep_freed.cache_info().currsize and keep_freed())
"""


def faults(first, **environment):
    """(page faults, whether freed memory is kept) of a process of its own."""
    env = {name: value for name, value in os.environ.items() if name not in THEIRS} | environment
    asked = [sys.executable, "-c", FAULTS.format(first=first)]
    count, kept = subprocess.run(asked, env=env, capture_output=True, text=True, check=True).stdout.split()
    return int(count), kept == "True"


@pytest.mark.whole
@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="only glibc is asked")
def test_a_prepared_net_keeps_what_is_freed_and_without_one_it_comes_back_page_by_page():
    by_message = f"pickle.loads({pickle.dumps(Engine('cpu'))!r}).prepare(torch.nn.Linear(1, 1))"
    kept, yes = faults(by_message)
    given_back, no = faults("Engine('cpu')")
    _, left_alone = faults(by_message, MALLOC_MMAP_THRESHOLD_="100000")
    assert yes and not no and not left_alone
    assert kept < 200 < 100_000 < given_back  # 20 * 8 blocks are 234,000 pages
