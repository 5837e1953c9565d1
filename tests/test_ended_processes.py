"""What other tests ask about processes that they end."""

from __future__ import annotations

import subprocess
import threading

from tests.support.ray_cluster import runs


def test_a_process_that_ends_while_it_is_looked_at_runs_no_more() -> None:
    for _ in range(300):  # one in twenty ends between two looks
        process = subprocess.Popen(["true"])
        reaper = threading.Thread(target=process.wait)
        reaper.start()
        while runs(process.pid):
            pass
        reaper.join()
        assert not runs(process.pid)
