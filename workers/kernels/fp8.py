"""How rows become e4m3 with a scale each. Needs no GPU."""

from __future__ import annotations

LARGEST = 448.0  # of e4m3
SMALLEST = 1e-4  # what a row of smaller numbers is scaled as: a row of zeros stays one
