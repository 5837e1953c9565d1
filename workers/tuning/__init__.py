"""Ops whose tactics are measured, and how: see workers.autotune, the command."""
