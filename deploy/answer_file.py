"""The file of answers that a job writes: one JSON object per line, in the order of the requests.

It is only ever appended to, a line at a time, so a job that was killed leaves whole answers and at most one torn
line. Each answer carries the fingerprint of its request; an error line stands for itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path

from cluster.config import SluiceConfig
from cluster.errors import SluiceError

STANDARD = Path("-")  # standard input or output, as a file's name
_WEIGHTS = ("*.safetensors", "config.json")


def fingerprints(config: SluiceConfig, lines: Sequence[bytes]) -> list[int]:
    """64 bits of each request: of its text, its place in the file and the model that answers it.

    Weight files count with their names and sizes: a job must not read gigabytes before its first answer.
    """
    model = blake2b(digest_size=16)
    for key in ("dtype", "load_format", "dummy_seed"):
        model.update(f"{key}={getattr(config.model, key)}\n".encode())
    folder = Path(config.model.path)
    for path in sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        model.update(f"{path.name}={path.stat().st_size}\n".encode())
    model.update((folder / "config.json").read_bytes())
    key = model.digest()
    return [_fingerprint(key, index, line) for index, line in enumerate(lines)]


def _fingerprint(key: bytes, index: int, line: bytes) -> int:
    return int.from_bytes(blake2b(b"%d\n%b" % (index, line), key=key, digest_size=8).digest())


class AnswerFile:
    """`num_kept` answers stood in it before, `num_written` were added.

    Every line has reached the operating system when `append` returns.
    """

    def __init__(self, path: Path, descriptor: int, num_kept: int = 0) -> None:
        self.path = path
        self.num_kept = num_kept
        self.num_written = 0
        self._descriptor = descriptor

    @classmethod
    def create(cls, path: Path, input_path: Path) -> AnswerFile:
        """Raises SluiceError, also when the file holds something already: answers may have taken hours."""
        if path == STANDARD:
            return cls(path, os.dup(1))
        if path.is_file() and path.stat().st_size and not _is_same(path, input_path):
            raise SluiceError(
                f"--output {path} is not empty; add --resume to go on where it ends, remove it, or name another file"
            )
        return cls(path, _open(path, input_path))

    @classmethod
    def resume(cls, path: Path, input_path: Path, requests: Sequence[int]) -> AnswerFile:
        """Keeps the whole lines there are and cuts a torn one.

        Raises SluiceError when they do not answer `requests` (fingerprints), one by one from the first on.
        """
        if path == STANDARD:
            raise SluiceError("--resume needs a file to look into; name one with --output")
        descriptor = _open(path, input_path)
        try:
            content = path.read_bytes()
            end = content.rfind(b"\n") + 1
            lines = content[:end].splitlines()
            _check(path, lines, requests)
            os.ftruncate(descriptor, end)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor, len(lines))

    def append(self, answer: Mapping[str, object]) -> None:
        """Raises SluiceError when the line cannot be written whole."""
        text = json.dumps(answer, ensure_ascii=False, separators=(",", ":")) + "\n"
        data = memoryview(text.encode(errors="backslashreplace"))  # \udxxx is how JSON writes half a character
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            raise SluiceError(
                f"--output {self.path} takes no more: {error.strerror}; make room, then go on with --resume"
            ) from None
        self.num_written += 1

    def close(self) -> None:
        os.close(self._descriptor)


def _open(path: Path, input_path: Path) -> int:
    if _is_same(path, input_path):
        raise SluiceError(f"--output {path} is the input; name another file")
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
        raise SluiceError(f"--output {path} cannot be written: {error.strerror}; name another file") from None


def _is_same(path: Path, input_path: Path) -> bool:
    return path.exists() and input_path.exists() and path.samefile(input_path)


def _check(path: Path, lines: Sequence[bytes], requests: Sequence[int]) -> None:
    remedy = "name the input and the model that it was begun with, or another --output"
    if len(lines) > len(requests):
        raise SluiceError(f"--output {path} has {len(lines)} lines, the input {len(requests)}; {remedy}")
    for number, (line, fingerprint) in enumerate(zip(lines, requests, strict=False), 1):
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict) or not ("error" in answer or "fingerprint" in answer):
            raise SluiceError(f"--output {path}, line {number}: no answer of this command; name another --output")
        if "error" not in answer and answer["fingerprint"] != name_of(fingerprint):
            raise SluiceError(f"--output {path}, line {number}: the answer to another request or model; {remedy}")


def name_of(fingerprint: int) -> str:
    """As it stands in an answer."""
    return f"{fingerprint:016x}"
