"""One cache entry as one safetensors file: whole, checked, and read through a memory map.

All tensors lie one behind the other in a single tensor of bytes. The header says how each batch is
laid out in it, down to strides, which decide the order of sums; so what is read back gives the
same numbers as what was written. A checksum covers data and header.
"""

import json
import math
import os
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, overload

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

Batch = tuple[Any, ...]
"""Tensors on the CPU, and numbers that belong to them."""

SUFFIX, PARTIAL = ".safetensors", "partial-"
_FORMAT = "1"
# PyTorch's own allocator aligns to 64 bytes, which vectorised kernels may depend on.
_ALIGNMENT = 64
# Room for the header: a key of about 2,000 characters and a few layouts. Assumption.
_HEAD_BYTES = 8192
_LENGTH_BYTES = 8
_UNCHECKED = "00000000"
_FIELDS = {"format", "key", "built_s", "is_pooled", "layouts", "runs", "checksum"}
_CHUNK = 1 << 20


class NotStorable(ValueError):
    """An entry holds something that a file cannot give back exactly."""


@dataclass(frozen=True, slots=True)
class Label:
    """What a file says of itself.

    Attributes:
        key: Names everything that decides the values.
        built_s: Seconds that making them took.
        is_pooled: Whether they are features behind pooling: few bytes that took the whole network.
        size_bytes: The file's size.
    """

    key: str
    built_s: float
    is_pooled: bool
    size_bytes: int


class Writer:
    """Writes an entry batch by batch, under a temporary name until it is whole.

    Args:
        path: Where the entry is to appear; its folder exists.
        claim: Asked before the file grows to so many bytes; False gives it up.

    Attributes:
        partial: Where it lies until it is whole.
        size_bytes: Its size so far.

    Raises:
        OSError: The file cannot be written. So do all methods.
    """

    def __init__(self, path: Path, claim: Callable[[int], bool]) -> None:
        self._path = path
        self._claim = claim
        self._checksum = 0
        self._layouts: dict[str, int] = {}
        self._runs: list[list[int]] = []
        self.size_bytes = _HEAD_BYTES
        handle, name = tempfile.mkstemp(prefix=PARTIAL, dir=path.parent)
        self.partial = Path(name)
        self._file = os.fdopen(handle, "w+b")
        self._file.seek(_HEAD_BYTES)

    def append(self, batch: Batch) -> bool:
        """Add a batch; False where there is no room for it.

        Raises:
            NotStorable: It cannot be given back exactly.
        """
        leaves = [leaf for leaf in batch if isinstance(leaf, Tensor)]
        layout = json.dumps([_described(leaf) for leaf in batch])
        grown = self.size_bytes + sum(_padded(leaf.nbytes) for leaf in leaves)
        if not self._claim(grown):
            return False
        at = self._layouts.setdefault(layout, len(self._layouts))
        if self._runs and self._runs[-1][0] == at:
            self._runs[-1][1] += 1
        else:
            self._runs.append([at, 1])
        for leaf in leaves:
            flat = leaf.detach().as_strided((leaf.numel(),), (1,)).view(torch.uint8).numpy()
            self._write(flat.data)
            self._write(bytes(_padded(leaf.nbytes) - leaf.nbytes))
        self.size_bytes = grown
        return True

    def _write(self, data: Any) -> None:
        self._file.write(data)
        self._checksum = zlib.crc32(data, self._checksum)

    def commit(self, key: str, built_s: float, *, is_pooled: bool) -> None:
        """Put the whole entry in its place; an older one there is replaced.

        Raises:
            NotStorable: Its batches are laid out in too many ways.
        """
        text = {
            "format": _FORMAT,
            "key": key,
            "built_s": repr(built_s),
            "is_pooled": str(int(is_pooled)),
            "layouts": "[" + ",".join(self._layouts) + "]",
            "runs": json.dumps(self._runs),
            "checksum": _UNCHECKED,
        }
        head = _head(text, self.size_bytes - _HEAD_BYTES)
        if len(head) > _HEAD_BYTES - _LENGTH_BYTES:
            raise NotStorable("the header is too long")
        head = head.ljust(_HEAD_BYTES - _LENGTH_BYTES)
        text["checksum"] = f"{zlib.crc32(head, self._checksum):08x}"
        self._file.seek(0)
        self._file.write(len(head).to_bytes(_LENGTH_BYTES, "little"))
        self._file.write(_head(text, self.size_bytes - _HEAD_BYTES).ljust(len(head)))
        self._file.close()
        os.replace(self.partial, self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_up()

    def give_up(self) -> None:
        """Remove what is not in its place; nothing where the entry is."""
        try:
            self._file.close()
        finally:
            self.partial.unlink(missing_ok=True)


def _head(text: dict[str, str], n_bytes: int) -> bytes:
    data = {"dtype": "U8", "shape": [n_bytes], "data_offsets": [0, n_bytes]}
    return json.dumps({"__metadata__": text, "data": data}, separators=(",", ":")).encode()


def _padded(n_bytes: int) -> int:
    return math.ceil(n_bytes / _ALIGNMENT) * _ALIGNMENT


def _described(leaf: object) -> object:
    """Say what a tensor looks like, or what a number is."""
    if isinstance(leaf, Tensor):
        if leaf.device.type != "cpu" or not _is_dense(leaf):
            raise NotStorable("a tensor is not dense, or not on the CPU")
        return {
            "dtype": str(leaf.dtype).removeprefix("torch."),
            "shape": list(leaf.shape),
            "stride": list(leaf.stride()),
        }
    if isinstance(leaf, torch.Size):
        return {"size": list(leaf)}
    if leaf is None or type(leaf) in (bool, int, float, str):
        return {"value": leaf}
    raise NotStorable(f"a {type(leaf).__name__} is no tensor and no number")


def _is_dense(tensor: Tensor) -> bool:
    """Say whether a tensor's elements fill a stretch of memory, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return tensor.layout is torch.strided and tensor.numel() > 0


class Stored(Sequence[Batch]):
    """The batches of an entry on disk, as views of a private memory map.

    Writing into them changes neither the file nor what others read. The map lasts as long as
    any of them.

    Args:
        path: The entry's file.
        key: The entry.
        is_checked: Whether the file has been compared with its checksum before.

    Raises:
        ValueError: It is not a whole and undamaged entry of that key.
        OSError: It cannot be read.
    """

    def __init__(self, path: Path, key: str, *, is_checked: bool = False) -> None:
        head, text = _read_head(path)
        if text["key"] != key:
            raise ValueError(f"{path} holds another entry")
        if not is_checked:
            _check(path, head, text["checksum"])
        self.label = _label(path, text)
        layouts, runs = json.loads(text["layouts"]), json.loads(text["runs"])
        self._places: list[tuple[int, Any]] = []
        at = 0
        for kind, count in runs:
            for _ in range(count):
                self._places.append((at, layouts[kind]))
                at += sum(_padded(_n_bytes(leaf)) for leaf in layouts[kind] if "dtype" in leaf)
        try:
            with safe_open(path, framework="pt") as file:
                self._data: Tensor = file.get_tensor("data")
        except SafetensorError as err:
            raise ValueError(f"{path} is damaged: {err}") from err

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at, layout = self._places[index]
        leaves: list[Any] = []
        for leaf in layout:
            if "dtype" in leaf:
                n = _n_bytes(leaf)
                flat = self._data[at : at + n].view(getattr(torch, leaf["dtype"]))
                leaves.append(flat.as_strided(leaf["shape"], leaf["stride"]))
                at += _padded(n)
            else:
                leaves.append(torch.Size(leaf["size"]) if "size" in leaf else leaf["value"])
        return tuple(leaves)


def _n_bytes(leaf: dict[str, Any]) -> int:
    dtype: torch.dtype = getattr(torch, leaf["dtype"])
    count: int = math.prod(leaf["shape"])
    return count * dtype.itemsize


def _read_head(path: Path) -> tuple[bytes, dict[str, str]]:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if length != _HEAD_BYTES - _LENGTH_BYTES:
            raise ValueError(f"{path} is no entry of ours")
        head = file.read(length)
    try:
        text = json.loads(head)["__metadata__"]
        if {*text} != _FIELDS or text["format"] != _FORMAT:
            raise ValueError(f"{path} is an entry of another version")
    except (KeyError, TypeError, RecursionError) as err:
        raise ValueError(f"{path} is no entry of ours") from err
    return head, text


def _check(path: Path, head: bytes, told: str) -> None:
    """Read a file and compare it with its checksum."""
    checksum = 0
    buffer = memoryview(bytearray(_CHUNK))
    with open(path, "rb", buffering=0) as file:
        file.seek(_LENGTH_BYTES + len(head))
        while n := file.readinto(buffer):
            checksum = zlib.crc32(buffer[:n], checksum)
    blank = head.replace(_told(told), _told(_UNCHECKED), 1)
    if f"{zlib.crc32(blank, checksum):08x}" != told:
        raise ValueError(f"{path} does not agree with its checksum")


def _told(checksum: str) -> bytes:
    return f'"checksum":"{checksum}"'.encode()


def _label(path: Path, text: dict[str, str]) -> Label:
    return Label(
        text["key"], float(text["built_s"]), text["is_pooled"] == "1", path.stat().st_size
    )


def read_label(path: Path) -> Label:
    """Read what an entry's file says of itself; its data are not looked at.

    Raises:
        ValueError: It is not an entry.
        OSError: It cannot be read.
    """
    return _label(path, _read_head(path)[1])
