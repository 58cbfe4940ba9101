"""The eval-mode net that most passes run: batch-norm folded into the convolution before it, compiled if asked."""

import operator
import threading
import warnings
from collections import Counter

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from semkit.convolving import Convolution, has_own

TRACING = threading.Lock()  # one tracer at a time: each puts back what it found in torch's own Module
ADDITIONS = (operator.add, torch.add, "add", "add_")


def _why(error: BaseException) -> str:
    """What went wrong in few words: what torch wraps it in, and a compiler's command line, are left out."""
    error = getattr(error, "inner_exception", error)
    told, _, output = str(error).partition("Output:")
    first = next(iter(told.strip().splitlines()), type(error).__name__)
    said = [line.strip() for line in output.splitlines() if "error" in line or "not found" in line]
    return ": ".join([first, *said[:1]])[:200]


def _of_compiling(error: Exception) -> bool:
    """Whether the compiler failed, a missing C++ one or no place for what it makes among it, not what it compiled."""
    # By name: where torch has no place for its files, the module that has the class cannot be imported.
    return isinstance(error, OSError) or "TorchDynamoException" in (kind.__name__ for kind in type(error).__mro__)


class _Tracer(fx.Tracer):
    """A tracer of what its own thread calls: torch hands it the calls of every module in the process meanwhile."""

    def __init__(self):
        super().__init__()
        self.thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward, args, kwargs):
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


def _traced(model: nn.Module) -> fx.GraphModule:
    """fx.symbolic_trace(model), also while other threads run nets."""
    with TRACING:
        graph = _Tracer().trace(model)
    return fx.GraphModule(model, graph, type(model).__name__)


class Folded:
    """model(x) in eval mode with every conv -> batch-norm pair as one convolution; follows the model's weights.

        weight * gamma / sqrt(variance + eps);  beta + (bias - mean) * gamma / sqrt(variance + eps)

    It follows what torch counts in a tensor's _version: optimizers, load_state_dict, in-place operations, passes in
    train mode. Not counted are writes through .data, fused optimizers in eval mode, and a tensor put in another's
    place: Engine.prepare the model anew after those. `why_not` says why a model could not be traced; it then runs as
    it is. compiled: through torch.compile, which takes seconds at the first call and at every new shape; where it fails
    it warns, once, and not_compiled says why: all is then as if it had not been asked for. dtype: what the folded
    weights are kept in, so that autocast has nothing to round at every call. native: in bfloat16 on a processor,
    uncompiled, convolutions (in channels_last) also make the sums of residual nets and, on the way back, those of their
    gradients: each is rounded once, not twice, and saves a pass over memory. Not so in nets that write over what they
    have computed. New weights are written over the old ones: go back through a graph before its net's weights change.
    """

    def __init__(self, model: nn.Module, compiled: bool = False, dtype: torch.dtype | None = None, native: bool = True):
        self.model, self.dtype, self.native, self.why_not, self.not_compiled = model, dtype, native, None, None
        self.sources = [*model.parameters(), *model.buffers()]
        self._build(compiled)

    def _build(self, compiled: bool) -> None:
        self.pairs, self.version, self.run, self.compiled = [], None, None, compiled
        try:
            self.graph = _traced(self.model)
        except Exception as error:  # whatever a model's own forward raises when it meets a symbol
            self.why_not, self.compiled = " ".join(str(error).split())[:200], False
            if compiled:
                self._tell("the net cannot be traced")
            return
        here = not compiled and not any(values.is_cuda for values in self.sources)
        native = here and self.native and self.dtype == torch.bfloat16 and has_own()
        self._fold(native)
        if native and not any(map(self._writes_over, self.graph.graph.nodes)):
            self._sum_inside()
            self._keep_inside()
        self.graph.recompile()
        self.kind = str(self.graph), self.dtype, native  # the same for nets that are built alike

    def _tell(self, why: str) -> None:
        self.not_compiled = why
        # As if from here, wherever the net is called: so it is told once.
        warnings.warn(f"torch.compile failed, the net runs uncompiled: {why}", stacklevel=1)

    def _fold(self, native: bool) -> None:
        calls = Counter(node.target for node in self.graph.graph.nodes)
        for node in list(self.graph.graph.nodes):
            module = self._module(node)
            if type(module) is nn.Identity:
                node.replace_all_uses_with(node.args[0])
                self.graph.graph.erase_node(node)
            if type(module) is nn.ReLU and len(node.args[0].users) == 1:
                # Not in place as the module may be: autograd keeps books of what is written over, and is slow at it.
                node.op, node.target = "call_function", F.relu
            before = node.args[0] if isinstance(module, nn.BatchNorm2d) else None
            conv = self._module(before)
            if type(conv) is not nn.Conv2d or len(before.users) > 1 or calls[before.target] > 1:
                continue
            fused = Convolution(conv, self.dtype, native)
            self.pairs.append((conv, module, fused))
            # The traced graph has its own containers: the model keeps its convolution.
            self.graph.set_submodule(before.target, fused)
            node.replace_all_uses_with(before)
            self.graph.graph.erase_node(node)

    def _module(self, node: object) -> nn.Module | None:
        """What a node calls, if it calls a module."""
        return self.graph.get_submodule(node.target) if getattr(node, "op", None) == "call_module" else None

    def _writes_over(self, node: fx.Node) -> bool:
        """Whether a node writes over what others may look at; nobody else looks at what a module returns, used once."""
        named = node.op == "call_method" and node.target.endswith("_")
        asked = node.kwargs.get("inplace") or "out" in node.kwargs or getattr(self._module(node), "inplace", False)
        return bool(named or asked) and not (node.args[0].op == "call_module" and len(node.args[0].users) == 1)

    def _sum_inside(self) -> None:
        """Has convolutions make the sum of their result and another tensor."""
        graph = self.graph.graph
        for node in list(graph.nodes):
            if node.target not in ADDITIONS or len(node.all_input_nodes) != 2 or node.kwargs:
                continue
            for conv, added in (node.args, node.args[::-1]):
                if isinstance(self._module(conv), Convolution) and len(conv.users) == len(conv.args) == 1:
                    with graph.inserting_before(node):
                        summed = graph.call_module(conv.target, (*conv.args, added))
                    node.replace_all_uses_with(summed)
                    graph.erase_node(node)
                    graph.erase_node(conv)
                    break

    def _keep_inside(self) -> None:
        """Has convolutions hand on what others look at besides, so that they add the gradients up."""
        graph = self.graph.graph
        for node in list(graph.nodes):
            convs = [user for user in node.users if len(user.args) == 1]
            convs = [conv for conv in convs if isinstance(self._module(conv), Convolution)]
            # Those that look at a few pixels last on the way back, first on the way there: they add to what is there.
            convs.sort(key=lambda conv: self._module(conv).kernel_size != (1, 1))
            for conv in convs[: len(node.users) - 1]:
                with graph.inserting_after(node):
                    both = graph.call_module(conv.target, (node,), {"keep": True})
                with graph.inserting_after(both):
                    kept, mine = (graph.call_function(operator.getitem, (both, i)) for i in (1, 0))
                conv.replace_all_uses_with(mine)
                graph.erase_node(conv)
                node.replace_all_uses_with(kept, delete_user_cb=lambda user, both=both: user is not both)
                node = kept

    @torch.no_grad()
    def refresh(self) -> None:
        """New folded weights if any weight or running statistic was written to since the last time."""
        version = sum(t._version for t in self.sources)
        if version == self.version:
            return
        for conv, norm, fused in self.pairs:
            weight, bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            fused.write(weight, bias)
        self.version = version

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
            if not _of_compiling(error):
                raise
            self._build(compiled=False)
            self._tell(_why(error))
            return self(x)
