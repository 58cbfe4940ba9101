"""Batch-norm folded into the convolution before it: the eval-mode net that most passes run."""

import threading
import warnings
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import get_total_norm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from semkit.images.files import one_line

TRACING = threading.Lock()  # one tracer at a time, because tracing patches methods of nn.Module


class _Tracer(fx.Tracer):
    """Traces the calls of its own thread only, because fx shows it the calls of every module in the process."""

    def __init__(self):
        super().__init__()
        self.thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward, args, kwargs):
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


def _traced(model: nn.Module) -> fx.GraphModule:
    with TRACING:
        graph = _Tracer().trace(model)
    return fx.GraphModule(model, graph, type(model).__name__)


class Folded:
    """model(x) in eval mode, with every conv -> batch-norm pair run as one convolution.

        weight <- weight * gamma / sqrt(variance + eps)
        bias   <- beta + (bias - mean) * gamma / sqrt(variance + eps)

    x [N,C,H,W] -> logits [N,classes]. The folded weights are computed anew when a weight or a running statistic of the
    model has changed. They are updated in place, so call backward before the weights change.
    dtype: of the folded weights; with bfloat16, autocast has nothing to convert at each call.
    why_not: why the model cannot be traced, else None; it then runs as it is.
    compiled: run through torch.compile, which takes seconds at the first call and for every new shape. If compiling
    fails, a warning says so once, not_compiled holds the reason, and the net runs uncompiled.

        folded = Folded(model.eval())
        logits = folded(x)
    """

    def __init__(self, model: nn.Module, compiled: bool = False, dtype: torch.dtype | None = None):
        self.model, self.dtype, self.why_not, self.not_compiled = model, dtype, None, None
        self.pairs, self.state, self.run = [], None, None
        self.sources = [*model.parameters(), *model.buffers()]
        try:
            self.graph = _traced(model)
        except Exception as error:  # the model's forward may raise anything when it gets a symbol
            self.why_not, self.compiled = one_line(error), False
            if compiled:
                self._run_uncompiled("the net cannot be traced")
            return
        self._fold()
        self.graph.recompile()
        self.compiled = compiled

    def _run_uncompiled(self, why: str) -> None:
        self.compiled, self.not_compiled = False, why
        warnings.warn(f"torch.compile failed, the net runs uncompiled: {why}", stacklevel=1)

    def _fold(self) -> None:
        graph = self.graph.graph
        calls = [node.target for node in graph.nodes]
        for node in list(graph.nodes):
            module = self._module(node)
            if type(module) is nn.ReLU and len(node.args[0].users) == 1:
                node.op, node.target = "call_function", F.relu  # not in place, because that is slow with autograd
            before = node.args[0] if isinstance(module, nn.BatchNorm2d) else None
            conv = self._module(before)
            if type(conv) is not nn.Conv2d or len(before.users) > 1 or calls.count(before.target) > 1:
                continue
            fused = self._fused(conv)
            self.pairs.append((conv, module, fused))
            self.graph.set_submodule(before.target, fused)  # in the traced graph only: the model keeps its own
            node.replace_all_uses_with(before)
            graph.erase_node(node)

    def _module(self, node: object) -> nn.Module | None:
        """The module that a node calls, if it calls one."""
        return self.graph.get_submodule(node.target) if getattr(node, "op", None) == "call_module" else None

    def _fused(self, conv: nn.Conv2d) -> nn.Conv2d:
        fused = deepcopy(conv)
        fused.bias = nn.Parameter(torch.zeros_like(conv.weight[:, 0, 0, 0]))
        return fused.to(self.dtype).requires_grad_(False)

    @torch.no_grad()
    def _read(self) -> tuple[int, float]:
        """A number pair that changes with every weight and running statistic: torch's count of writes, the total norm.

        The norm is for writes through .data, which are not counted.
        """
        values = [source for source in self.sources if source.is_floating_point()]
        return sum(source._version for source in self.sources), get_total_norm(values).item() if values else 0.0

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute the folded weights anew if a weight or running statistic has changed."""
        state = self._read()
        if state == self.state:
            return
        for conv, norm, fused in self.pairs:
            weight, bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            fused.weight.copy_(weight)
            fused.bias.copy_(bias)
        self.state = state

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.why_not is not None:
            return self.model(x)
        self.refresh()
        if not self.compiled:
            return self.graph(x)
        try:
            if self.run is None:
                self.run = torch.compile(self.graph)
            return self.run(x)
        except Exception as error:
            logits = self.graph(x)  # raises where the net itself is at fault
            self._run_uncompiled(one_line(error))
            return logits
