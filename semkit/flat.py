"""The input gradient of a net written down once as a plain list of tensor operations, forward and backward, and run
without autograd.

What is written down is what autograd does, operation by operation (semkit.rewriting says what is done in other ways);
run as a list it costs less Python, and what is not needed any more is freed at once or written over.
"""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from semkit.folding import Folded
from semkit.rewriting import rewritten

CALLS_BEFORE = 100  # of a shape: writing down takes as long as what so many calls save, and odd shapes come once
MOST = 8  # lists of a net: each has its own copy of the weights


class Written:
    """A list of operations for one shape of x and y, and what it needs of the weights, made anew when they change."""

    def __init__(self, gradient: Callable, folded: Folded, x: Tensor, y: Tensor):
        self.folded, self.version = folded, None
        weights = {**dict(folded.graph.named_parameters()), **dict(folded.graph.named_buffers())}

        def of_weights(x, y, *given):
            named = dict(zip(weights, given, strict=True))
            return gradient(lambda x: functional_call(folded.graph, named, (x,)), x, y)

        self.weights = list(weights.values())
        listed = make_fx(of_weights)(x, y, *(weight.detach() for weight in self.weights))
        self.makers = rewritten(listed, [None, None, *self.weights])
        self.run = listed.forward

    @torch.no_grad()
    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self.folded.refresh()
        if self.version != self.folded.version:
            self.made = [make() for make in self.makers]
            self.version = self.folded.version
        return self.run(x, y, *self.weights, *self.made)


class Flat:
    """gradient(folded, x, y), from a list of operations for every shape that comes often; from autograd for others.

    A list must give autograd's bits before it is used. why_not says why a net could not be written down, or that this
    machine computed another gradient from the list; autograd then does all of it.
    """

    def __init__(self, gradient: Callable[[Callable, Tensor, Tensor], Tensor], folded: Folded):
        self.gradient, self.folded, self.why_not = gradient, folded, None
        self.calls, self.written = Counter(), {}

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        shape = _shape(x, y)
        if shape not in self.written:
            self.calls[shape] += 1
            if self.calls[shape] > CALLS_BEFORE:
                self.write(x, y)
        return self.written[shape](x, y) if shape in self.written else self.gradient(self.folded, x, y)

    def __getstate__(self) -> dict:
        """For a copy, without lists: those read the weights of the net that they were written for."""
        return {**vars(self), "calls": Counter(), "written": {}}

    def write(self, x: Tensor, y: Tensor) -> None:
        """Writes the list for the shape of x and y now, where there is none and none of why_not and MOST forbids it."""
        if self.why_not is not None or _shape(x, y) in self.written or len(self.written) == MOST:
            return
        try:
            written = Written(self.gradient, self.folded, x, y)
            differs = not torch.equal(written(x, y), self.gradient(self.folded, x, y))
        except Exception as error:  # whatever an operation raises that cannot be written down, or run in another form
            self.why_not = " ".join(str(error).split())[:200]
            return
        if differs:
            self.why_not = "the list gave another gradient than autograd"
        else:
            self.written[_shape(x, y)] = written


def _shape(x: Tensor, y: Tensor) -> tuple:
    return x.shape, x.stride(), x.dtype, y.shape, y.dtype
