"""How numbers become e4m3 with a scale each. Needs no GPU."""

from __future__ import annotations

LARGEST = 448.0  # of e4m3
SMALLEST = 1e-4  # what smaller numbers are scaled as: a row of zeros stays one
BLOCK = 128  # features of a row, or rows and columns of a matrix, that share a scale
