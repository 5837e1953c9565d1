"""deploy/Dockerfile, followed step by step in a clean Debian without a container engine, to what its image starts."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator

import pytest

from tests.support import chart
from tests.support.clean_root import debian
from tests.support.dockerfile import STAGES
from tests.support.image import PACKAGES, Built, Image

pytestmark = [pytest.mark.full, pytest.mark.slow, pytest.mark.netns, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    directory = tmp_path_factory.mktemp("image")
    base = debian(directory / "debian", *PACKAGES)
    if base is None:
        pytest.skip("needs root and iproute2, and Debian's debootstrap")
    yield Image(base, directory)
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def cpu(image: Image) -> Built:
    return image.build("cpu")


def test_the_user_is_made_and_the_libraries_for_rdma_are_installed(image: Image) -> None:
    cuda = image.build("cuda")
    assert cuda.ran == [*STAGES["application"].of("RUN"), *STAGES["cuda"].of("RUN")]
    assert cuda.run("id -u; id -g; id -un").split() == ["1000", "1000", "sluice"]
    assert "librdmacm.so.1" in cuda.run("ldconfig -p")
    assert list((cuda.root.path / "var" / "lib" / "apt" / "lists").iterdir()) == []


def test_every_package_is_installed_and_fits_the_others(image: Image, cpu: Built) -> None:
    assert image.build("build-cpu").ran == STAGES["build-cpu"].of("RUN")
    assert "No broken requirements found" in cpu.run("python -m pip check")
    left = [name for name in ("gcc", "make", "git", "curl") if cpu.run(f"command -v {name} || true").strip()]
    assert left == [], "no build tools"


def test_its_user_may_write_at_home_only(cpu: Built) -> None:
    home = {"HOME": "/home/sluice"}
    assert cpu.run("id -u; echo $PWD; touch $HOME/mine && rm $HOME/mine", **home).split() == ["1000", "/opt/sluice"]
    for place in ("/opt/sluice", "/usr/local/lib", "/etc"):
        assert cpu.run(f"touch {place}/mine 2>/dev/null || echo refused") == "refused\n"


def test_what_the_image_starts_runs_as_its_user(cpu: Built) -> None:
    """Its command, the application that Serve imports, and a model that the recipe's init container writes."""
    home = {"HOME": "/home/sluice"}
    assert "check-config" in cpu.run(shlex.join(cpu.command), **home)
    assert cpu.run("python -c 'import deploy.app; print(deploy.app.build.__name__)'", **home).strip() == "build"
    assert (
        cpu.run("python -c 'import workers.actor, torch, nixl; print(torch.get_num_threads() > 0)'", **home) == "True\n"
    )
    init = chart.recipe("cpu")["model"]["init"]["command"]
    assert init[:2] == ["python3", "-c"]
    cpu.run('export MODEL_PATH=$HOME/model && mkdir $MODEL_PATH && python3 -c "$PROGRAM"', PROGRAM=init[2], **home)
    assert "# 2 workers reserve 2 CPU cores" in cpu.run("python -m deploy check-config --model $HOME/model", **home)
    one = 'echo \'{"prompt": "once upon", "max_tokens": 4}\' > $HOME/in.jsonl'
    ask = "python -m deploy generate --model $HOME/model --input $HOME/in.jsonl --output $HOME/out.jsonl"
    cpu.run(f"{one} && {ask} && test -s $HOME/out.jsonl", **home)
