"""Tensor operations in place of those that autograd runs: the same bits, faster on a processor.

relu and its gradient on the integers that bfloat16 numbers are made of: processors have no bfloat16 arithmetic but in
products, and turn every number into a float32 and back. Both in the memory of what they are given, where nothing else
looks at that, and so the sums that convolutions make. Convolutions with weights laid out for the processor once, not
at every call.
"""

import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from semkit.convolving import ONEDNN, SUMMED

aten = torch.ops.aten

Layout = tuple  # (which argument, padding, stride, dilation, groups, shape of the images) of a convolution's weight

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


def add_(added: Tensor, x: Tensor, *how) -> Tensor:
    """conv(x) + added in the memory of `added`."""
    return ONEDNN._convolution_pointwise_.binary(added, x, *how)


def _shares_memory(node: fx.Node) -> bool:
    """Whether what a node returns may lie in the memory of what it was given."""
    if node.op != "call_function":
        return True
    if node.target is operator.getitem:
        return _shares_memory(node.args[0])
    if node.target in (relu_, slope_, add_):
        return False
    schema = node.target._schema
    unsafe = schema.name.startswith(("aten::_unsafe_", "aten::unsafe_"))  # views that do not say so
    return unsafe or any(found.alias_info is not None for found in schema.returns)


def _leave_out(graph: fx.Graph, node: fx.Node) -> None:
    node.replace_all_uses_with(node.args[0])
    graph.erase_node(node)


def _write_over(graph: fx.Graph) -> None:
    """Operations in the memory of what they are given, where they are the last to look at it."""
    place = {node: i for i, node in enumerate(graph.nodes)}

    def looked_at_after(given: fx.Node, node: fx.Node) -> bool:
        others = [user for user in given.users if user is not node]
        return any(
            place[user] > place[node] or (_shares_memory(user) and looked_at_after(user, node)) for user in others
        )

    def owner(given: fx.Node) -> fx.Node:
        while given.op == "call_function" and _shares_memory(given):
            given = given.args[0]
        return given

    def free(given: fx.Node, node: fx.Node) -> bool:
        return not _shares_memory(owner(given)) and not looked_at_after(owner(given), node)

    for node in list(graph.nodes):
        if node.target is aten.relu.default and free(node.args[0], node):
            node.target = relu_
        elif node.target is aten.threshold_backward.default and node.args[2] == 0 and free(node.args[0], node):
            node.target, node.args = slope_, node.args[:2]
        elif node.target is aten.clone.default and not node.kwargs and free(node.args[0], node):
            _leave_out(graph, node)
        elif node.target is SUMMED and free(node.args[1], node):
            x, added, *how = node.args
            apart = owner(x) is not owner(added)  # a convolution still reads what it has written beside
            if apart and added.meta["val"].stride() == node.meta["val"].stride():
                node.target, node.args = add_, (added, x, *how)


def _lay_out(graph: fx.Graph) -> list[Layout]:
    """Has convolutions whose weights are arguments in bfloat16 take them laid out for oneDNN, as further arguments."""
    arguments = graph.find_nodes(op="placeholder")
    layouts, last = [], arguments[-1]
    for node in list(graph.nodes):
        if node.target is SUMMED:
            x, added, weight, bias, padding, stride, *rest = node.args
        elif node.target is aten.convolution.default and node.args[5:] == ([1, 1], False, [0, 0], 1):
            (x, weight, bias, stride, padding), added = node.args[:5], None
        else:
            continue
        if weight not in arguments or weight.meta["val"].dtype != torch.bfloat16:
            continue
        how = (padding, stride, [1, 1], 1)
        layouts.append((arguments.index(weight), *how, [*x.meta["val"].shape]))
        with graph.inserting_after(last):
            last = graph.placeholder(f"laid_out_{len(layouts)}")
        if added is None:
            node.target = ONEDNN._convolution_pointwise.default
            node.args = (x, last, bias, *how, "none", [], None)
        else:
            node.args = (x, added, last, bias, padding, stride, *rest)
    return layouts


def laid_out(weight: Tensor, *how) -> Tensor:
    """The weight as a Layout says, all but the argument that it is."""
    return ONEDNN._reorder_convolution_weight(weight, *how)


def rewritten(listed: fx.GraphModule) -> list[Layout]:
    """The list with the operations above, in place; which of its arguments it takes once more at the end, laid out."""
    graph = listed.graph
    for node in list(graph.nodes):
        if node.target in (aten.detach.default, aten.alias.default):
            _leave_out(graph, node)
    graph.eliminate_dead_code()
    layouts = _lay_out(graph) if ONEDNN else []
    graph.eliminate_dead_code()
    _write_over(graph)
    for node in graph.nodes:
        node.meta = {}  # the tensors that it was written down with
    listed.recompile()
    return layouts
