"""Matrix products."""

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxmerge.calibration.operators.registry import Attributes, operator, register_plain

register_plain({"MatMul": torch.matmul})


@operator("Gemm")
def gemm(attributes: Attributes, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """`alpha A B + beta C`, A and B transposed on demand; A is [M, K], B [K, N], C broadcasts to [M, N]."""
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    if attributes.get("transA", 0):
        a = a.T
    if alpha == beta == 1.0 and (c is None or c.dim() == 1):
        return F.linear(a, b if attributes.get("transB", 0) else b.T, c)
    product = alpha * (a @ (b.T if attributes.get("transB", 0) else b))
    return product if c is None else product + beta * c


@operator("Einsum")
def einsum(attributes: Attributes, *operands: Tensor) -> Tensor:
    """Einstein summation."""
    return torch.einsum(attributes["equation"].replace(" ", ""), *operands)
