"""The input gradient of a net written down once as a plain list of tensor operations, forward and backward, and run
without autograd.

What is written down is what autograd does, operation by operation (semkit.rewriting says what is done in other ways);
run as a list it costs less Python, and what is not needed any more is freed at once or written over. On a GPU the list
is a CUDA graph: one launch for some hundred.
"""

from collections import Counter
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from semkit.folding import TRACING, Folded
from semkit.rewriting import Layout, laid_out, rewritten

CALLS_BEFORE = 100  # of a shape: writing down takes as long as what so many calls save, and odd shapes come once
MOST = 8  # lists that a net uses: each has its own copy of the weights

_calls: Counter = Counter()  # of this process, by what a net is built like and the shape
_lists: dict[tuple, tuple[Callable, list[Layout]]] = {}  # the same; read by every net that is built alike


def _listed(gradient: Callable, folded: Folded, x: Tensor, y: Tensor) -> tuple[Callable, list[Layout]]:
    """list(x, y, *weights, *laid out weights) for one shape of x and y, and which weights are to be laid out how."""
    weights = _weights(folded)

    def of_weights(x, y, *given):
        named = dict(zip(weights, given, strict=True))
        return gradient(lambda x: functional_call(folded.graph, named, (x,)), x, y)

    with TRACING:
        listed = make_fx(of_weights)(x, y, *(weight.detach() for weight in weights.values()))
    layouts = rewritten(listed)  # which makes the list's code anew
    return listed.forward, layouts


def _weights(folded: Folded) -> dict[str, Tensor]:
    return {**dict(folded.graph.named_parameters()), **dict(folded.graph.named_buffers())}


class Written:
    """A list, which nets that are built alike share, and a net's own weights for it, laid out anew when they change."""

    def __init__(self, gradient: Callable, folded: Folded, x: Tensor, y: Tensor):
        name = folded.kind, _shape(x, y)
        if name not in _lists:
            _lists[name] = _listed(gradient, folded, x, y)
        (self.run, self.layouts), self.folded, self.version = _lists[name], folded, None
        self.weights = [*_weights(folded).values()]

    @torch.no_grad()
    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self.folded.refresh()
        if self.version != self.folded.version:
            arguments = [x, y, *self.weights]
            self.laid_out = [laid_out(arguments[which], *how) for which, *how in self.layouts]
            self.version = self.folded.version
        return self.run(x, y, *self.weights, *self.laid_out)


class Captured:
    """A gradient as a CUDA graph, which reads a net's folded weights where they lie.

    Nobody has run it yet: no GPU was to be had. As every list it is tried against autograd before it is used.
    """

    def __init__(self, gradient: Callable, folded: Folded, x: Tensor, y: Tensor):
        self.folded, self.given = folded, (x.clone(), y.clone())
        with torch.cuda.device(x.device):
            aside = torch.cuda.Stream()  # what is captured has to have run before, on another stream than the usual one
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                gradient(folded, *self.given)
            torch.cuda.current_stream().wait_stream(aside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=_pool(), stream=aside, capture_error_mode="thread_local"):
                self.made = gradient(folded, *self.given)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self.folded.refresh()
        for mine, given in zip(self.given, (x, y), strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.made.clone()  # the next graph that runs writes over it


@cache
def _pool() -> tuple:
    """The memory that all graphs of this process share: one runs at a time."""
    return torch.cuda.graph_pool_handle()


class Flat:
    """gradient(folded, x, y), from a list of operations for every shape that comes often; from autograd for others.

    Nets that are built alike share lists. One must give autograd's bits for a net before the net uses it. why_not says
    why a net could not be written down, or that this machine computed another gradient from the list; autograd then
    does all of it. So it does while torch.compile has the net.
    """

    def __init__(self, gradient: Callable[[Callable, Tensor, Tensor], Tensor], folded: Folded):
        self.gradient, self.folded, self.why_not, self.written = gradient, folded, None, {}

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        shape = _shape(x, y)
        if shape not in self.written and not self.folded.compiled:
            _calls[self.folded.kind, shape] += 1
            if _calls[self.folded.kind, shape] > CALLS_BEFORE:
                self.write(x, y)
        return self.written[shape](x, y) if shape in self.written else self.gradient(self.folded, x, y)

    def __getstate__(self) -> dict:
        """For a copy, without lists: those read the weights of the net that they were written for."""
        return {**vars(self), "written": {}}

    def write(self, x: Tensor, y: Tensor) -> None:
        """Has a list for the shape of x and y from now on, if none of why_not and MOST forbids it."""
        shape = _shape(x, y)
        if self.why_not is not None or shape in self.written or len(self.written) == MOST:
            return
        try:
            written = (Captured if x.is_cuda else Written)(self.gradient, self.folded, x, y)
            other = 1 - x, y.roll(1, 0)  # not what it was made with, which a list may hold by mistake
            differs = not torch.equal(written(*other), self.gradient(self.folded, *other))
        except Exception as error:  # whatever an operation raises that cannot be written down, or run in another form
            self.why_not = " ".join(str(error).split())[:200]
            return
        if differs:
            self.why_not = "the list gave another gradient than autograd"
        else:
            self.written[shape] = written


def _shape(x: Tensor, y: Tensor) -> tuple:
    return x.shape, x.stride(), x.dtype, y.shape, y.dtype
