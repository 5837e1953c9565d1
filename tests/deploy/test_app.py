"""From arguments to a Serve application; nothing is started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve._private import constants

from cluster.errors import ConfigError
from deploy.app import build

ROOT = Path(__file__).parents[2]


def test_building_starts_nothing_and_a_later_build_has_a_higher_revision() -> None:
    import ray

    args = {"config_inline": {"model": {"path": "/nowhere"}, "http": {"replicas": 2}}, "overrides": ["name=shop"]}
    first, second = (arguments_of(build(args)) for _ in range(2))
    assert first[1] < second[1]
    assert first[0] == second[0]
    assert not ray.is_initialized()
    config = json.loads(first[0])
    assert (config["name"], config["http"]["replicas"]) == ("shop", 2)


def arguments_of(app: Any) -> tuple[str, int]:
    """What each replica of the app will be made with: config and revision."""
    return app._bound_deployment.init_args


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ({"file": "x.yaml"}, "args.file: "),
        ({"config": "/nowhere.yaml"}, "/nowhere.yaml: cannot be read"),
        ({"config": "x", "config_inline": {}}, "args: both config and config_inline"),
        ({"config_inline": {"model": {"path": "m"}, "kv": {"blocks": 3}}}, "kv.blocks: there is no such key"),
        ({"config_inline": {"model": {"path": "m"}}, "overrides": ["kv.block_size=0"]}, "kv.block_size: 0 does not"),
    ],
)
def test_bad_arguments_are_named(args: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(args)
    assert str(caught.value).startswith(complaint)


def test_serve_build_takes_the_app_of_a_config_file(tmp_path: Path) -> None:
    (tmp_path / "sluice.yaml").write_text(yaml.safe_dump({"model": {"path": "/nowhere"}, "http": {"replicas": 3}}))
    serve = Path(sys.executable).with_name("serve")
    command = [str(serve), "build", "deploy.app:app", "-o", "app.yaml"]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=100)
    (app,) = yaml.safe_load((tmp_path / "app.yaml").read_text())["applications"]
    (deployment,) = app["deployments"]
    assert app["import_path"] == "deploy.app:app"
    assert deployment["num_replicas"] == 3
    assert deployment["graceful_shutdown_timeout_s"] >= 300


def test_a_replica_is_told_nothing_that_serve_does_not_read() -> None:
    """What it does not know it ignores in silence."""
    app = build({"config_inline": {"model": {"path": "m"}}})
    options = app._bound_deployment.ray_actor_options
    assert options is not None
    told = options["runtime_env"]["env_vars"]
    assert told
    assert [name for name in told if not hasattr(constants, name)] == []
