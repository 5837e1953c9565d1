"""A checkpoint folder: config.json and safetensors files, mapped into memory and never copied here.

The format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the bytes.
Parsed here because a mapped file that is shorter than its header says kills the process at the first touch, and
because the header is what identifies the weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from cluster.errors import CheckpointError
from cluster.hashing import HASH_BYTES

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
_MAX_HEADER_BYTES = 100 * 1024 * 1024
_SAMPLES = 64
_SAMPLE_BYTES = 4096


def read_json(path: Path) -> dict[str, object]:
    """A JSON object. Raises CheckpointError naming the file."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; point model.path at a Hugging Face checkpoint folder") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not an object; download it again")
    return content


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: bytes [start, end) of its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class WeightFile:
    """One safetensors file, mapped privately: processes that only read share its pages.

    Tensors are views of the mapping, which lives as long as any of them. Raises CheckpointError naming the file,
    and the tensor where there is one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.size = path.stat().st_size
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if self.size < 8 or length > min(self.size - 8, _MAX_HEADER_BYTES):
                    raise CheckpointError(f"{path}: truncated inside its header ({self.size} bytes); download it again")
                self.header = file.read(length)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}); restore the file") from error
        try:
            entries = json.loads(self.header)
            self.tensors = {
                name: self._stored(name, entry, 8 + length) for name, entry in entries.items() if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: not a safetensors header ({error!r}); download it again") from error
        needed = max((tensor.end for tensor in self.tensors.values()), default=0)
        if self.size < needed:
            last = max(self.tensors, key=lambda name: self.tensors[name].end)
            raise CheckpointError(
                f"{path}: truncated, {self.size} bytes where tensor {last} ends at {needed}; download it again"
            )
        self._bytes = torch.from_file(str(path), shared=False, size=self.size, dtype=torch.uint8)

    def _stored(self, name: str, entry: Mapping[str, object], base: int) -> StoredTensor:
        dtype = _DTYPES.get(str(entry["dtype"]))
        if dtype is None:
            raise CheckpointError(
                f"{self.path}: tensor {name} has dtype {entry['dtype']}, known are {', '.join(_DTYPES)}"
            )
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
            raise ValueError(f"tensor {name}: shape {shape!r}, data_offsets {offsets!r}")
        stored = StoredTensor(dtype, tuple(map(int, shape)), base + int(offsets[0]), base + int(offsets[1]))
        if stored.start < base or stored.end - stored.start != prod(stored.shape) * dtype.itemsize:
            raise ValueError(f"tensor {name}: shape {shape!r} does not fill data_offsets {offsets!r}")
        return stored

    def read(self, name: str) -> Tensor:
        """A view of the mapping; a copy only where the file left the tensor unaligned."""
        stored = self.tensors[name]
        data = self._bytes[stored.start : stored.end]
        if stored.start % stored.dtype.itemsize:
            data = data.clone()
        return data.view(stored.dtype).view(stored.shape)

    def sample(self) -> bytes:
        """`_SAMPLES` pieces spread evenly over the file, its end included."""
        last = max(self.size - _SAMPLE_BYTES, 0)
        starts = sorted({last * i // (_SAMPLES - 1) for i in range(_SAMPLES)})
        with self.path.open("rb") as file:
            pieces: list[bytes] = []
            for start in starts:
                file.seek(start)
                pieces.append(file.read(_SAMPLE_BYTES))
        return b"".join(pieces)


class Checkpoint:
    """All tensors of a folder by name. Opening checks every file; nothing is read beyond headers and samples."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / INDEX
        if index.exists() and (folder / SINGLE).exists():
            raise CheckpointError(f"{folder}: holds both {SINGLE} and {INDEX}; remove the one that is out of date")
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{index}: no weight_map; download it again")
            wanted = {str(name): str(file) for name, file in weight_map.items()}
            names = sorted(set(wanted.values()))
        elif (folder / SINGLE).exists():
            wanted, names = {}, [SINGLE]
        elif shards := sorted(path.name for path in folder.glob("*.safetensors")):
            raise CheckpointError(f"{folder}: {INDEX} is missing, which says what {shards[0]} holds; download it again")
        else:
            raise CheckpointError(
                f"{folder}: neither {SINGLE} nor {INDEX}; convert the weights to safetensors, other formats are "
                "refused because they can run code"
            )
        self.files = {name: WeightFile(folder / name) for name in names}
        self._owner: dict[str, WeightFile] = {}
        for file in self.files.values():
            for name in file.tensors:
                if name in self._owner:
                    raise CheckpointError(
                        f"{file.path}: tensor {name} is in {self._owner[name].path.name}, too; download both again"
                    )
                self._owner[name] = file
        self.tensors: Mapping[str, StoredTensor] = {name: file.tensors[name] for name, file in self._owner.items()}
        for name, file in wanted.items():
            if name not in self.files[file].tensors:
                elsewhere = f"it is in {self._owner[name].path.name}; " if name in self._owner else ""
                raise CheckpointError(
                    f"{folder / file}: tensor {name} is missing, which {INDEX} places there; {elsewhere}download both "
                    "again"
                )

    def file_of(self, name: str) -> Path:
        return self._owner[name].path

    def read(self, name: str) -> Tensor:
        return self._owner[name].read(name)

    def identity(self) -> bytes:
        """16 bytes: headers, sizes and sampled bytes, in the order of file names. Equal for copies of a folder."""
        digest = blake2b(digest_size=HASH_BYTES, person=b"sluice.weights")
        for name, file in sorted(self.files.items()):
            for part in (name.encode(), file.size.to_bytes(8, "little"), file.header, file.sample()):
                digest.update(len(part).to_bytes(8, "little"))
                digest.update(part)
        return digest.digest()
