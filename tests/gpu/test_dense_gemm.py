"""Products of many rows with one matrix, by each kernel of cuBLASLt that a table names for this card, against torch."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.tensor_errors import error
from workers.kernels.tactics import LtKernel

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
BF16 = torch.bfloat16


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=CUDA, dtype=BF16)


def tuned() -> dict[tuple[int, int], dict[int, LtKernel]]:
    """By matrix, by rows."""
    from workers.kernels.tactic_table import DeviceSetting, TacticTable

    found: dict[tuple[int, int], dict[int, LtKernel]] = defaultdict(dict)
    for key, tactic in TacticTable.tuned(DeviceSetting.of(CUDA)).entries.items():
        if isinstance(tactic, LtKernel):
            _, shape, rows = key.split("/")
            outputs, inputs = shape.split("x")
            found[int(outputs), int(inputs)][int(rows)] = tactic
    if not found:
        pytest.skip("no table for this card, driver and libraries")
    return found


def test_every_kernel_that_a_table_names_computes_the_product() -> None:
    from workers.kernels.dense_gemm import dense

    for (outputs, inputs), kernels in tuned().items():
        weight = random(outputs, inputs) * 0.05
        for rows, kernel in kernels.items():
            for count in (rows, rows - 15):
                x = random(count, inputs)
                assert error(dense(x, weight, kernel), x.float() @ weight.float().t()) < 4e-3, (rows, kernel)


def test_every_kernel_adds_the_product_where_it_is_told_to() -> None:
    from workers.kernels.dense_gemm import dense

    for (outputs, inputs), kernels in tuned().items():
        weight = random(outputs, inputs) * 0.05
        for rows, kernel in [*kernels.items(), (300, None)]:
            x, total = random(rows - 15, inputs), random(rows - 15, outputs)
            want = total.float() + x.float() @ weight.float().t()
            assert dense(x, weight, kernel, total) is total
            assert error(total, want) < 4e-3, (rows, kernel)


def test_rows_of_any_stride_and_number_and_again_the_same() -> None:
    """What a kernel does not take as it lies, or in another dtype, is cuBLAS's."""
    from workers.kernels.dense_gemm import dense

    (outputs, inputs), kernels = next(iter(tuned().items()))
    weight, kernel = random(outputs, inputs) * 0.05, next(iter(kernels.values()))
    wide = random(130, inputs + 24)
    for x in (wide[:, :inputs], wide[:, 8 : 8 + inputs], wide[:, 1 : 1 + inputs], wide[:1, :inputs], wide[:0, :inputs]):
        y = dense(x, weight, kernel)
        assert y.shape == (len(x), outputs)
        assert torch.equal(y, dense(x, weight, kernel))
        if len(x):
            assert error(y, x.float() @ weight.float().t()) < 4e-3
    x = random(40, inputs)
    assert torch.equal(dense(x, weight, None), F.linear(x, weight))
    assert torch.equal(dense(x.float(), weight.float(), kernel), F.linear(x.float(), weight.float()))


def test_a_product_in_a_graph_is_the_one_outside() -> None:
    from workers.kernels.dense_gemm import dense

    (outputs, inputs), kernels = next(iter(tuned().items()))
    weight, kernel = random(outputs, inputs) * 0.05, next(iter(kernels.values()))
    x = random(96, inputs)
    want = dense(x, weight, kernel)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = dense(x, weight, kernel)
    y.zero_()
    graph.replay()
    assert torch.equal(y, want)


def test_a_kernel_that_is_not_there_is_named() -> None:
    from workers.kernels.cublas_lt import LtError, lt_linear

    kernel = LtKernel(66, 9999, 0, 0, 35, 0, 5)
    with pytest.raises(LtError, match="returned"):
        lt_linear(random(64, 512), random(256, 512), kernel)


def test_what_cublas_proposes_can_be_computed() -> None:
    from workers.kernels.cublas_lt import LtProduct, lt_linear

    x, weight = random(100, 1024), random(768, 1024) * 0.05
    proposed = LtProduct(0, (768, 1024), 1024).alternatives(100)
    assert len(proposed) > 1
    for kernel in proposed:
        assert error(lt_linear(x, weight, kernel), x.float() @ weight.float().t()) < 4e-3, kernel
