"""A file is whole or it is not there: checkpoints, .safetensors and small text files.

    import torch
    from weights.atomic import load, save, save_safetensors
    save("checkpoint.pt", {"step": 7, "weight": torch.zeros(3, 2)})
    state = load("checkpoint.pt")                      # tensors, numbers, strings; never code
    save_safetensors("model.safetensors", {"weight": torch.zeros(3, 2)})

A file is written aside, flushed to the disk, read back, and renamed over the old one: a crash at
any instant leaves the old file or the new one. A checkpoint is a plain torch file that loads with
weights_only=True. Being a zip archive it may end with a comment: here the SHA-256 of the rest, so
that a file that was cut short, or that has one wrong bit, is recognised.

    held = lock(Path("runs/mine"))                     # no second process in that folder
"""
import hashlib
import json
import os
import pickle
from pathlib import Path

try:
    import fcntl
except ImportError:                      # Windows
    fcntl = None

import torch

from weights.terminal import reason

_MARK = b"sha256:"
_SAFETENSORS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16",
                torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32", torch.int16: "I16",
                torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}


def save(path: str | os.PathLike, state) -> None:
    """Write state to path, all or nothing. Raises OSError where it cannot be written."""
    aside = f"{path}.tmp"
    try:
        with open(aside, "w+b") as file:
            torch.save(state, file)
            file.seek(-2, os.SEEK_END)          # a zip archive ends with its comment's length
            file.write((len(_MARK) + 64).to_bytes(2, "little"))
            mark = _MARK + digest(file, file.tell()).encode()
            file.seek(0, os.SEEK_END)
            file.write(mark)
            file.flush()
            os.fsync(file.fileno())
        if not whole(aside):
            raise OSError(f"{path} was not written as it should be")
        os.replace(aside, path)
        flush_folder(Path(path).parent)
    except (OSError, RuntimeError) as error:    # torch.save raises RuntimeError on a full disk
        Path(aside).unlink(missing_ok=True)
        raise OSError(f"{path} could not be saved: {reason(error)}") from None


def save_safetensors(path: str | os.PathLike, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors to path, all or nothing, in the format of github.com/huggingface/safetensors:
    the length of a header in JSON, the header, all bytes. Those with the largest elements come
    first, so that each begins at a multiple of its element's size. Raises OSError where it cannot
    be written."""
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    header, end = {"__metadata__": {"format": "pt"}}, 0         # without which transformers refuses
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _SAFETENSORS[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    aside = f"{path}.tmp"
    try:
        with open(aside, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors.values():
                file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        flush_folder(Path(path).parent)
    except OSError as error:
        Path(aside).unlink(missing_ok=True)
        raise OSError(f"{path} could not be saved: {reason(error)}") from None


def flush_folder(folder: Path) -> None:
    """Make a renaming outlast a power cut, where folders can be flushed."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def whole(path: str | os.PathLike) -> bool:
    """Whether a file is as `save` wrote it, to the bit."""
    with open(path, "rb") as file:
        length = file.seek(0, os.SEEK_END) - len(_MARK) - 64
        file.seek(max(0, length))
        mark, written = file.read(len(_MARK)), file.read()
        return mark == _MARK and written.decode("latin-1") == digest(file, length)


def digest(file, length: int) -> str:
    """SHA-256 of the first bytes of an open file."""
    file.seek(0)
    sha256 = hashlib.sha256()
    while length > 0 and (block := file.read(min(length, 1 << 24))):
        sha256.update(block)
        length -= len(block)
    return sha256.hexdigest()


def file_digest(path: str | os.PathLike) -> str:
    """The first 16 digits of a file's SHA-256: its name in results."""
    with open(path, "rb") as file:
        return digest(file, os.path.getsize(path))[:16]


def load(path: str | os.PathLike):
    """Read what `save` wrote, onto the CPU. Raises ValueError for a missing or damaged file, or
    one that holds anything but tensors and plain values."""
    try:
        if not whole(path):
            raise ValueError("it is not as it was written")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"no such checkpoint: {path}") from None
    except PermissionError as error:
        raise ValueError(f"{path} is unreadable: {error.strerror}") from None
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or not a checkpoint ({reason(error)})") from None


def refuse_existing(path: str | os.PathLike, force: bool | None = None, sources=()) -> None:
    """Raises ValueError where there is a file already, and where path is one of the sources, or
    lies in one that is a folder. force: whether --force was given, which replaces any other file;
    None: there is no such option."""
    for source in filter(None, sources):
        if Path(path).resolve().is_relative_to(Path(source).resolve()):
            raise ValueError(f"{path} is the source itself, or lies in it: choose another name")
    if os.path.lexists(path) and not force:
        raise ValueError(f"{path} is there already: choose another name"
                         + ", or add --force" * (force is not None))


def write_whole(path: Path, text: str) -> None:
    """All or nothing: a crash leaves the old file or the new one."""
    aside = path.with_name(f"{path.name}.tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def read_lines(path: Path) -> list[dict]:
    """The objects of a file of JSON, one a line, but for a line that was cut off. Raises OSError,
    ValueError."""
    written = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in written if line.endswith("\n")]


def lock(folder: Path):
    """Keep a second process out of a folder, as long as the returned file is open; the lock ends
    with the process. Raises ValueError where another one has it."""
    file = open(folder / ".lock", "a")
    if fcntl:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)        # not inherited by workers
        except (BlockingIOError, PermissionError):
            file.close()
            raise ValueError(f"another run is at work in {folder}; wait for it, or choose another "
                             "folder") from None
        except OSError:                 # some network file systems know no locks
            pass
    return file
