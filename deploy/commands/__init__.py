"""The commands of `python -m deploy`, one file each.

A command is a module with HELP (one line), `add_arguments(parser)` and `run(options) -> int` (the exit status);
its name is its file's, with dashes. It is listed in `deploy.__main__`. Errors of ours (SluiceError) may leave `run`:
they become one line and status 1.
"""
