"""Time: best of several, against a reference measured in the same run. Tests say order and counts."""
