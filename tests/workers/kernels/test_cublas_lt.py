"""cuBLASLt without a GPU: what is said where it is missing. What it computes is in tests/gpu."""

from __future__ import annotations

import pytest
import torch

from workers.kernels.cublas_lt import LtError, version


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch brings cuBLASLt")
def test_a_machine_without_it_is_told_so() -> None:
    with pytest.raises(LtError, match=r"cuBLASLt is not there: libcublasLt\.so"):
        version()
