"""Where and how nets are run: device, precision, memory layout, fast paths, seeds and the count of passes."""

import contextlib
import contextvars
import ctypes
import functools
import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from semkit.images.pixels import check_seed, to_float
from semkit.nets.weights import Folded, alphas

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LARGEST_KEPT = 2**25  # bytes of a block that glibc keeps when it is freed, the most that it allows
THEIRS = "GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_"
# Limit for the largest tensor, in bytes, of a pass with several samples: on a CPU the largest block that is kept when
# freed, so that there are no page faults; on a GPU (not measured) ResNet-18's for 4,096 images of 32 pixels.
TENSOR = {"cpu": LARGEST_KEPT, "cuda": 2**29, "mps": 2**29}
OFF, NOT_HERE = "switched off", "not on this system"
FAST_PATHS = {  # name -> the engine's fields that switch it off
    "channels_last": {"layout": torch.contiguous_format}, "folding": {"fold": False},
    "batching": {"batch_samples": False}, "memory": {"keep_memory": False},
}  # fmt: skip


@dataclass
class Passes:
    """Image passes so far: one pass is one image forward and backward (`forward`: forward only)."""

    input_gradient: int = 0
    training: int = 0
    forward: int = 0

    @property
    def total(self) -> int:
        return self.input_gradient + self.training


_passes: contextvars.ContextVar[Passes | None] = contextvars.ContextVar("passes", default=None)


@contextlib.contextmanager
def within(variable: contextvars.ContextVar, value):
    """Set a context variable inside the with-block, for this thread; yields the value."""
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)


def count_passes(passes: Passes | None = None):
    """Count this thread's passes inside a with-block, in a new Passes or the one given.

    >>> with count_passes() as passes: _ = predict(nn.Flatten(), torch.zeros(5, 3))
    >>> passes.forward
    5
    """
    return within(_passes, passes or Passes())


def _count(kind: str, n: int) -> None:
    if (passes := _passes.get()) is not None:
        setattr(passes, kind, getattr(passes, kind) + n)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether this device multiplies bfloat16 matrices in hardware; on a CPU, only where torch uses AVX-512."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps" or "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False
    found = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 and older have none: float32 then
    return bool(found.get("amx_bf16") or found.get("avx512_bf16"))


@functools.cache
def keep_freed() -> bool:
    """Ask glibc to keep freed memory for the rest of the process; False without glibc, or if THEIRS are set.

    Every pass of a net frees its activations. By default glibc returns them to the system, and the next pass takes them
    back page by page: thousands of page faults, a sixth of a small net's time or more. The peak hardly changes.
    """
    if any(name in os.environ for name in THEIRS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def _found_device(device: str) -> str:
    """`device`; for "auto" a CUDA GPU if torch has one, else Apple's MPS, else the CPU.

    Raises ValueError for an unknown device and for one that is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(kind for kind, found in there.items() if found)
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError):
        kind = None
    if kind not in there:
        raise ValueError(f"device must be auto, cpu, mps, cuda or cuda:N, got {device!r}")
    if not there[kind]:
        raise ValueError(f"device {device!r} asked for, but torch sees no {kind.upper()} GPU; write cpu or auto")
    if kind == "cuda" and (torch.device(device).index or 0) >= (found := torch.cuda.device_count()):
        raise ValueError(f"device {device!r} asked for, but torch sees cuda:0 to cuda:{found - 1} only")
    return device


@dataclass(frozen=True)
class Engine:
    """Where and how nets are run. `Engine()` takes a GPU if there is one (CUDA, then MPS), and bfloat16 where fast.

    Four switches change the speed but not the result, except for rounding. fold: in eval mode, batch-norm is part of
    the convolution before it. batch_samples: several EOT samples go through a net in one pass, with the same draws.
    keep_memory: the process keeps freed memory (keep_freed). compile: torch.compile runs the folded net.
    On CUDA float32 is no TF32, and runs are deterministic. Raises ValueError for a device or precision not there.

    >>> Engine("cpu", "float32").dtype
    torch.float32
    """

    device: str = "auto"
    precision: str = "auto"
    fold: bool = True
    batch_samples: bool = True
    keep_memory: bool = True
    compile: bool = False
    layout: torch.memory_format = field(default=torch.channels_last, repr=False)

    def __post_init__(self):
        device, precision = _found_device(self.device), self.precision
        if precision == "auto":
            precision = "bfloat16" if has_fast_bf16(torch.device(device)) else "float32"
        if self.compile and not self.fold:
            raise ValueError("compile needs fold: what is compiled is the folded net")
        if precision not in ("float32", "bfloat16", "float64"):
            raise ValueError(f"precision must be auto, float32, bfloat16 or float64, got {precision!r}")
        if torch.device(device).type == "mps":
            if precision == "float64":
                raise ValueError("float64 is not available on MPS: write float32, or device cpu")
            # torch's batch-norm on MPS had wrong gradients in channels_last until 2026 (PyTorch issue 175189).
            object.__setattr__(self, "layout", torch.contiguous_format)
        vars(self).update(device=device, precision=precision)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of images, noise and weights; bfloat16 is for the inside of nets only."""
        return torch.float64 if self.precision == "float64" else torch.float32

    def settings(self) -> dict:
        """Every setting that can change a result: part of cache keys and reports."""
        return {
            "device": torch.device(self.device).type, "precision": self.precision,
            "channels_last": self.layout == torch.channels_last, "folded": self.fold,
            "samples_batched": self.batch_samples, "compiled": self.compile,
        }  # fmt: skip

    def generator(self, seed: int, *stream) -> torch.Generator:
        """A generator that depends on `seed` and `stream` alone, so that any step can be replayed."""
        digest = hashlib.sha256(repr((check_seed(seed), *stream)).encode()).digest()
        return torch.Generator(self.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def prepare(self, model: nn.Module) -> nn.Module:
        """Move the model to this engine's device, dtype and memory layout, in place; returns it."""
        # Settings of the whole process: here and not in __post_init__, because another one may unpickle the engine.
        if self.keep_memory:
            keep_freed()
        if torch.device(self.device).type == "cuda":
            torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
        model.to(self.device, self.dtype, memory_format=self.layout)
        model.engine, model.widest = self, {}
        inside = torch.bfloat16 if self.precision == "bfloat16" else None
        with evaluating(model):
            folded = Folded(model, self.compile, inside) if self.fold else None
        # No sub-module: its weights are the model's own, and must not be saved or trained twice.
        object.__setattr__(model, "folded", folded)
        return model

    def images(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images (or int8 noise) as floats of this engine, divided by 255."""
        return to_float(images.to(self.device, non_blocking=True), self.dtype).contiguous(memory_format=self.layout)

    def autocast(self):
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.precision == "bfloat16")


def engine_of(model: nn.Module) -> Engine:
    """The engine that prepared the model; for another net one of its weights' device and dtype, float32 or float64."""
    engine, weight = getattr(model, "engine", None), next(model.parameters(), torch.empty(0))
    dtypes = (engine.dtype,) if engine else (torch.float32, torch.float64)
    if weight.dtype not in dtypes:
        raise ValueError(f"the net's weights are {weight.dtype}: write net.to({dtypes[0]}) first")
    return engine or Engine(str(weight.device), str(weight.dtype).removeprefix("torch."))


def how_run(model: nn.Module) -> str:
    """One line for reports: how a prepared model is run, and why a fast path is not taken."""
    engine, folded = model.engine, model.folded
    largest = TENSOR[torch.device(engine.device).type] / 2**20
    why_not = {
        "channels_last": None if engine.layout == torch.channels_last else OFF,
        "folded": folded.why_not if folded else OFF,
        **({"compiled": folded.not_compiled} if engine.compile else {}),
        f"samples batched up to {largest:g} MiB a tensor": None if engine.batch_samples else OFF,
        "freed memory kept": None if engine.keep_memory and keep_freed() else NOT_HERE if engine.keep_memory else OFF,
    }
    ways = [f"not {way} ({why})" if why else way for way, why in why_not.items()]
    return ", ".join((engine.device, engine.precision, *ways))


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """Eval mode inside the with-block; afterwards every module is in the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield model
    finally:
        for module in training:
            module.training = True


def batches_per_pass(model: nn.Module, x: torch.Tensor) -> int:
    """How many batches like x [N,C,H,W] (EOT samples, for example) fit into one forward pass of this net.

    1 for a net without an engine, an engine that does not batch, and injected noise, which is drawn once per pass.
    """
    engine = getattr(model, "engine", None)
    if not (engine and engine.batch_samples and hasattr(model, "widest")) or alphas(model):
        return 1
    return max(1, (TENSOR[torch.device(engine.device).type] - 1) // (len(x) * _widest(model, x[:1])))


def _widest(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes of the largest output of a module of the net for x; measured once per shape."""
    if x.shape not in model.widest:
        sizes = [x.nbytes]
        hooks = [
            module.register_forward_hook(lambda _, given, made: sizes.append(getattr(made, "nbytes", 0)))
            for module in model.modules()
        ]
        try:
            with torch.no_grad(), evaluating(model), model.engine.autocast():
                model(_in_layout(model, x))
        finally:
            for hook in hooks:
                hook.remove()
        model.widest[x.shape] = max(sizes)
    return model.widest[x.shape]


def _in_layout(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """x in the engine's memory layout: augmentations return channels_last."""
    engine = getattr(model, "engine", None)
    return x.contiguous(memory_format=engine.layout) if engine else x


def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """model(x) in the model's mode and precision, as floats of x's dtype."""
    engine, folded = getattr(model, "engine", None), None if model.training else getattr(model, "folded", None)
    with engine.autocast() if engine else contextlib.nullcontext():
        out = (folded or model)(_in_layout(model, x))
    return out.to(x.dtype)


@torch.no_grad()
def predict(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Eval-mode logits [N,classes] without a graph.

    >>> predict(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), torch.zeros(5, 3, 2, 2)).shape
    torch.Size([5, 2])
    """
    _count("forward", len(x))
    with evaluating(model):
        return logits(model, x)


def input_gradient(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """d/dx of the summed cross-entropy of model(x) against y, in eval mode; weights get no gradient.

    y: labels [N], or class probabilities [N,classes]: the gradient is then that of KL(y || softmax(model(x))).
    """
    _count("input_gradient", len(x))
    with evaluating(model), torch.enable_grad():
        x = _in_layout(model, x).detach().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(logits(model, x), y, reduction="sum"), x)[0]


def training_logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Train-mode logits [N,classes] with their graph on the weights, for one backward pass.

    Batch-norm uses the batch's statistics and updates its running ones. Modules whose own weights are all frozen stay
    in eval mode. Counts one training pass per image.
    """
    _count("training", len(x))
    for module in model.train().modules():
        own = list(module.parameters(recurse=False))
        module.training = not own or any(weight.requires_grad for weight in own)
    return logits(model, x)


def step_down(optimizer: torch.optim.Optimizer, loss_of: Callable[[], torch.Tensor]) -> float:
    """One step of `optimizer` on loss_of(), a scalar; returns the loss before it. Raises ValueError for nan or inf."""
    optimizer.zero_grad(set_to_none=True)
    loss = loss_of()
    loss.backward()
    optimizer.step()
    if not math.isfinite(value := loss.item()):
        raise ValueError(f"the training diverged, its loss is {value}: take a lower learning rate, SGD(lr=...)")
    return value


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> float:
    """One step of `optimizer` on the mean train-mode cross-entropy; returns the loss before the step."""
    return step_down(optimizer, lambda: F.cross_entropy(training_logits(model, x), y))
