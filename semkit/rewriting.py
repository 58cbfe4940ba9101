"""Tensor operations in place of those that autograd runs: the same bits, faster on a processor.

relu and its gradient on the integers that bfloat16 numbers are made of: processors have no bfloat16 arithmetic but in
products, and turn every number into a float32 and back. Both in the memory of what they are given, where nothing else
looks at that. Convolutions with weights laid out for the processor once, not at every call; the gradient of one of
stride 1 as the convolution that it is.
"""

import operator
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx

aten = torch.ops.aten

MINUS_INFINITY = -128  # of bfloat16, read as int16: below it are the negative numbers, above it NaN and then 0 and up


def _bits(x: Tensor) -> Tensor:
    """x itself, or the integers that a bfloat16 x is made of: they are ordered as the numbers are, from 0 on."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


def relu_(x: Tensor) -> Tensor:
    """relu(x) in the memory of x; NaN stays NaN."""
    if x.dtype != torch.bfloat16:
        return x.relu_()
    F.threshold_(_bits(x), MINUS_INFINITY, 0)
    return x


def slope_(slope: Tensor, y: Tensor) -> Tensor:
    """relu's gradient in the memory of `slope`: slope where y = relu(x) is positive, else 0.

    For bfloat16 also 0, not slope, where y is a NaN with a sign.
    """
    aten.threshold_backward.grad_input(_bits(slope), _bits(y), 0, grad_input=_bits(slope))
    return slope


def _shares_memory(node: fx.Node) -> bool:
    """Whether what a node returns may lie in the memory of what it was given."""
    if node.op != "call_function":
        return True
    if node.target is operator.getitem:
        return _shares_memory(node.args[0])
    if node.target in (relu_, slope_):
        return False
    schema = node.target._schema
    unsafe = schema.name.startswith(("aten::_unsafe_", "aten::unsafe_"))  # views that do not say so
    return unsafe or any(found.alias_info is not None for found in schema.returns)


def _is_gradient(node: fx.Node) -> bool:
    """Whether a node is the gradient of a plain convolution, without dilation or groups, at its input alone."""
    backward = node.target is aten.convolution_backward.default
    return backward and node.args[6:] == ([1, 1], False, [0, 0], 1, [True, False, False])


def _write_over(graph: fx.Graph) -> None:
    """relu and its gradient in the memory of what they are given, where they are the last to look at it."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.target not in (aten.relu.default, aten.threshold_backward.default):
            continue
        given = node.args[0]
        if _shares_memory(given) or any(place[user] > place[node] or _shares_memory(user) for user in given.users):
            continue
        if node.target is aten.relu.default:
            node.target = relu_
        elif node.args[2] == 0:
            node.target, node.args = slope_, node.args[:2]


def _turned(weight: Tensor) -> Tensor:
    """The weight of the convolution that is the gradient, at its input, of one of stride 1 with this weight."""
    return weight.flip(2, 3).transpose(0, 1)


def _lay_out(graph: fx.Graph, given: Sequence[Tensor | None]) -> list[Callable[[], Tensor]]:
    """Convolutions whose weights are among the `given` tensors in bfloat16, with these laid out for oneDNN.

    How to make what the list takes besides.
    """
    weights = dict(zip(graph.find_nodes(op="placeholder"), given, strict=True))
    after, makers = [*weights][-1], []

    def lay_out(node: fx.Node, x: fx.Node, weight: Tensor, turn: Callable, bias, padding, stride) -> None:
        nonlocal after
        how, shape = (padding, stride, [1, 1], 1), list(x.meta["val"].shape)
        makers.append(lambda: torch.ops.mkldnn._reorder_convolution_weight(turn(weight), *how, shape))
        with graph.inserting_after(after):
            after = graph.placeholder(f"laid_out_{len(makers)}")
        node.target = torch.ops.mkldnn._convolution_pointwise.default
        node.args = (x, after, bias, *how, "none", [], None)

    for node in list(graph.nodes):
        if node.target not in (aten.convolution.default, aten.convolution_backward.default):
            continue
        weight = weights.get(node.args[1 if node.target is aten.convolution.default else 2])
        if weight is None or weight.dtype != torch.bfloat16:
            continue
        if node.target is aten.convolution.default:
            x, _, bias, stride, padding, *rest = node.args
            if rest == [[1, 1], False, [0, 0], 1]:
                lay_out(node, x, weight, lambda weight: weight, bias, padding, stride)
        elif _is_gradient(node) and node.args[4] == [1, 1] and len(node.users) == 1:
            [found], kernel = node.users, list(weight.shape[2:])
            if kernel == [1, 1]:
                continue  # added up in another order, in large nets
            padding = [size - 1 - pad for size, pad in zip(kernel, node.args[5], strict=True)]
            lay_out(node, node.args[0], weight, _turned, None, padding, [1, 1])
            node.meta = found.meta
            found.replace_all_uses_with(node)
    return makers


def rewritten(listed: fx.GraphModule, given: Sequence[Tensor | None]) -> list[Callable[[], Tensor]]:
    """The list with the operations above, in place; how to make the tensors that it takes besides those `given`."""
    graph = listed.graph
    for node in list(graph.nodes):
        if node.target in (aten.detach.default, aten.alias.default):
            node.replace_all_uses_with(node.args[0])
    graph.eliminate_dead_code()
    makers = _lay_out(graph, given) if torch.backends.mkldnn.is_available() else []
    graph.eliminate_dead_code()
    _write_over(graph)
    for node in graph.nodes:
        node.meta = {}  # the tensors that it was written down with
    listed.recompile()
    return makers
