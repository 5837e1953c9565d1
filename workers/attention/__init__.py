"""Attention: what a step's batch looks like, which backend computes it, and the reference that runs anywhere."""
