"""Operators of an ONNX graph that compute nothing."""

import numpy as np
import onnx_ir as ir


def drop_zero_adds(graph: ir.Graph) -> None:
    """Remove x + 0 with a constant tensor of zeros: the mask of a model that masks nothing."""
    for node in list(graph):
        if node.op_type != "Add":
            continue
        for kept, zeros in (node.inputs, reversed(node.inputs)):
            if kept is None or zeros is None or not _adds_nothing(kept, zeros, node.outputs[0]):
                continue
            ir.convenience.replace_all_uses_with(node.outputs[0], kept, replace_graph_outputs=True)
            graph.remove(node, safe=True)
            break
    unused = [n for n, v in graph.initializers.items() if not v.uses() and not v.is_graph_output()]
    for name in unused:
        del graph.initializers[name]


def _adds_nothing(kept: ir.Value, zeros: ir.Value, total: ir.Value) -> bool:
    constant = zeros.const_value if zeros.is_initializer() else None
    if constant is None or constant.size > 1 << 20 or kept.shape is None:
        return False
    return kept.shape == total.shape and not np.any(constant.numpy())
