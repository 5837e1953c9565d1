"""Each RUN step of deploy/Dockerfile: run in a clean root, or why not. Part of `.ci/run`; takes a second.

python -m tests.helm.image_steps
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from tests.support.clean_root import empty
from tests.support.dockerfile import STAGES
from tests.support.image import NOT_RUN

HERE = ("application",)
_LONG_FORM = "`make test ARGS=--full` runs it in a clean Debian (tests/helm/test_image_steps.py)"
LATER = {
    "build-cpu": f"it installs 1.5 GB of packages. tests/helm/test_image.py holds their list and pins; {_LONG_FORM}",
    "cuda": f"it downloads packages of Debian. {_LONG_FORM}",
    **{stage: f"nowhere: {reason} (tests/helm/test_image.py)" for stage, reason in NOT_RUN.items()},
}


def main() -> int:
    may = os.geteuid() == 0 and shutil.which("unshare") is not None
    for name, stage in STAGES.items():
        for step in stage.of("RUN"):
            print(f"{name}: {step if len(step) < 100 else step[:99] + '…'}")
            if name in LATER:
                print(f"  not run here: {LATER[name]}")
            elif not may:
                print("  not run here: a root directory of its own needs root and unshare")
            else:
                with tempfile.TemporaryDirectory() as directory:
                    empty(Path(directory)).run(step)
                print("  ran in a clean root")
    return 0


if __name__ == "__main__":
    sys.exit(main())
