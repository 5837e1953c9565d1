"""The file of answers: what is kept of one, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cluster.config_file import parse
from cluster.errors import SluiceError
from deploy.answer_file import STANDARD, AnswerFile, fingerprints, name_of

ERROR = {"error": {"message": "é \ud83d"}}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("{}\n")
    return path


def write(path: Path, source: Path, *requests: int) -> bytes:
    """Answers to `requests`, and an error."""
    file = AnswerFile.create(path, source)
    for request in requests:
        file.append({"fingerprint": name_of(request), "token_ids": [request]})
    file.append(ERROR)
    assert (file.num_kept, file.num_written) == (0, len(requests) + 1)
    file.close()
    return path.read_bytes()


def test_whole_lines_are_kept_and_a_torn_one_is_cut(tmp_path: Path, source: Path) -> None:
    path = tmp_path / "out"
    whole = write(path, source, 1, 2)
    assert [json.loads(line) for line in whole.splitlines()][2] == ERROR
    for torn in (b"", b'{"fingerprint"', b'{"fingerprint":"0"}', b"\xff"):
        path.write_bytes(whole + torn)
        file = AnswerFile.resume(path, source, [1, 2, 3, 4])
        assert file.num_kept == 3 and path.read_bytes() == whole
        file.append({"fingerprint": name_of(4)})
        file.close()
        assert path.read_bytes() == whole + b'{"fingerprint":"0000000000000004"}\n'


def test_a_file_that_is_not_there_yet_is_begun(tmp_path: Path, source: Path) -> None:
    AnswerFile.resume(tmp_path / "out", source, [1]).close()
    assert (tmp_path / "out").read_bytes() == b""
    AnswerFile.create(tmp_path / "out", source).close()  # empty: nothing is lost


@pytest.mark.parametrize(
    ("requests", "extra", "message"),
    [
        ([1, 2], b"", "has 3 lines, the input 2; name the input"),
        ([1, 3, 4], b"", "line 2: the answer to another request or model; name the input"),
        ([1, 2, 3, 4], b"\n", "line 4: no answer of this command; name another"),
        ([1, 2, 3, 4], b'{"text": "x"}\n', "line 4: no answer of this command"),
        ([1, 2, 3, 4], b"[]\n", "line 4: no answer of this command"),
    ],
)
def test_what_does_not_belong_is_refused_and_left_alone(
    tmp_path: Path, source: Path, requests: list[int], extra: bytes, message: str
) -> None:
    path = tmp_path / "out"
    before = write(path, source, 1, 2) + extra
    path.write_bytes(before)
    with pytest.raises(SluiceError, match=message):
        AnswerFile.resume(path, source, requests)
    assert path.read_bytes() == before


def test_answers_are_never_overwritten(tmp_path: Path, source: Path) -> None:
    path = tmp_path / "out"
    before = write(path, source, 1)
    with pytest.raises(SluiceError, match=f"{path} is not empty; add --resume"):
        AnswerFile.create(path, source)
    assert path.read_bytes() == before
    for opens in (AnswerFile.create, lambda path, source: AnswerFile.resume(path, source, [])):
        with pytest.raises(SluiceError, match="is the input; name another file"):
            opens(source, source)


def test_a_full_disk_says_how_to_go_on(source: Path) -> None:
    file = AnswerFile.create(Path("/dev/full"), source)
    with pytest.raises(SluiceError, match="/dev/full takes no more: No space left on device; make room, then go on"):
        file.append(ERROR)
    assert file.num_written == 0
    file.close()


def test_standard_output_is_written_and_not_resumed(source: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = AnswerFile.create(STANDARD, source)
    file.append({"fingerprint": "x"})
    file.close()
    assert capfd.readouterr().out == '{"fingerprint":"x"}\n'
    os.fstat(1)  # ours is still open
    with pytest.raises(SluiceError, match="--resume needs a file"):
        AnswerFile.resume(STANDARD, source, [])


def test_a_fingerprint_is_of_text_place_and_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")

    def of(*lines: bytes, **settings: object) -> list[int]:
        return fingerprints(parse({"model": {"path": str(tmp_path), **settings}}), lines)

    before = of(b"a", b"b", b"b")
    assert len(set(before)) == 3 and all(0 <= number < 2**64 for number in before)
    assert of(b"a", b"b", b"b", b"c")[:3] == before, "more lines may follow"
    assert of(b"b", b"a", b"b")[:2] != before[:2]
    changed = [of(b"a", b"b", b"b", **change) for change in ({"dtype": "float16"}, {"dummy_seed": 1})]
    (tmp_path / "config.json").write_text('{"a":1}')
    changed.append(of(b"a", b"b", b"b"))
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    changed.append(of(b"a", b"b", b"b"))
    assert len({tuple(each) for each in (before, *changed)}) == 5
