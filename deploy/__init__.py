"""The composition root and the outside world: CLI, HTTP, recipes."""
