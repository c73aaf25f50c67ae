"""The checkpoint of a sharded run: a folder that is whole, or is not there.

    save_sharded("run/checkpoint", state, group)        # on every rank of the group
    state = load_plain("run/checkpoint")                # what is not sharded
    fill("run/checkpoint", {"model/fc.weight": weight}) # into whole tensors, or any shards
    state = load_whole("run/checkpoint")                # all, on the host

A state is a tree of dicts and lists, whose leaves are tensors and plain values. Sharded tensors
(DTensors) are in tensors/, by torch.distributed.checkpoint, named by their path in the tree; all
else is rank 0's, in state.pt; sha256.json has the sums of all files, and is written last. So what
differs between ranks without being sharded, as BatchNorm's running statistics, is rank 0's.

The metadata of torch.distributed.checkpoint is a pickle: it is read by an unpickler that knows the
classes of such metadata alone, so that a folder from elsewhere runs no code.
"""
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.tensor import DTensor

from weights.atomic import digest, flush_folder, load, save
from weights.terminal import reason

SUMS = "sha256.json"


# -------------------------------------------------------------------------------------- the state
def split(tree, path: tuple = ()) -> tuple[object, dict[str, DTensor]]:
    """The tree without its sharded leaves, for which a list has None; these by their path."""
    if isinstance(tree, DTensor):
        return None, {"/".join(map(str, path)): tree}
    if not isinstance(tree, (dict, list, tuple)):
        return tree, {}
    is_dict, rest, sharded = isinstance(tree, dict), {}, {}
    for key, value in tree.items() if is_dict else enumerate(tree):
        rest[key], found = split(value, (*path, key))
        sharded |= found
        if is_dict and isinstance(value, DTensor):
            del rest[key]
    return (rest if is_dict else type(tree)(list(rest.values()))), sharded


def join(tree: dict, tensors: dict[str, Tensor]) -> dict:
    """The way back from split, for trees without sharded leaves in tuples. In place."""
    for path, tensor in tensors.items():
        *way, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        place = tree
        for key in way:
            place = place[key]
        place[last] = tensor
    return tree


# ---------------------------------------------------------------------------------------- writing
def save_sharded(path: str | os.PathLike, state: dict, group: dist.ProcessGroup,
                 before: Callable[[Path], None] | None = None) -> None:
    """Write state to a folder, all or nothing: a collective of the group, on the host.

    before(aside) is called on rank 0 when all is written into the folder aside, and has to move
    away what is at path. Raises OSError, the same on all ranks, where a rank cannot write."""
    path, aside, rank = Path(path), Path(f"{path}.tmp"), group.rank()
    rest, tensors = split(state)
    try:
        with same_error(path, group):
            if rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
                (aside / "tensors").mkdir(parents=True)
                save(aside / "state.pt", rest)
        with same_error(path, group):
            # without copies ahead: these would wait for a stream of GPU 0, in each rank's thread
            writer = dcp.FileSystemWriter(aside / "tensors", per_thread_copy_ahead=0)
            dcp.save(tensors, storage_writer=writer, process_group=group)
        sums, names = {}, [f"tensors/{file.name}" for file in (aside / "tensors").glob(
            f"__{rank}_*")] + ["state.pt", "tensors/.metadata"] * (rank == 0)
        with same_error(path, group):
            sums = {name: sum_of(aside / name) for name in names}
        gathered = gather(sums, path, group)
        with same_error(path, group):
            if rank == 0:
                sums = {name: sum for part in gathered for name, sum in part.items()}
                for name in sums:
                    if not (aside / name).exists():
                        raise OSError(f"{name}, which another rank wrote, is not there: all ranks "
                                      "must share the folder")
                (aside / SUMS).write_text(json.dumps(sums, indent=1))
                flush(aside / SUMS)
                for folder in (aside / "tensors", aside):
                    flush_folder(folder)
                if before:
                    before(aside)
                os.rename(aside, path)
                flush_folder(path.parent)
    except OSError:
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    except RuntimeError as error:               # of the group: all others are OSErrors by now
        raise OSError(f"{path} could not be saved: another rank is gone, or does not answer "
                      f"({reason(error)})") from None


def remove(path: Path) -> None:
    """A checkpoint: a file, or a folder, which is whole under its name or not there."""
    if path.is_dir():
        aside = path.with_name(path.name + ".old")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)
        shutil.rmtree(aside)
    path.unlink(missing_ok=True)


class same_error:
    """At the end of the block an error of one rank of the group becomes the same OSError on all."""

    def __init__(self, path: Path, group: dist.ProcessGroup):
        self.path, self.group = path, group

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> None:
        errors = gather(cause_of(error) if error else "", self.path, self.group)
        if first := next(filter(None, errors), ""):
            raise OSError(f"{self.path} could not be saved: {first}") from None


def gather(mine, path: Path, group: dist.ProcessGroup) -> list:
    """What each rank of the group has. Raises OSError where one does not answer."""
    found = [None] * group.size()
    try:
        dist.all_gather_object(found, mine, group=group)
    except RuntimeError:
        raise OSError(f"{path} could not be saved: another rank is gone") from None
    return found


def cause_of(error: BaseException) -> str:
    """Of what torch.distributed.checkpoint raises: the first rank's own error."""
    failures = getattr(error, "failures", None) or {}
    return reason(next((wrapped[0] for wrapped in failures.values()), error))


def sum_of(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return digest(file, os.path.getsize(path))


def flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


# ---------------------------------------------------------------------------------------- reading
def is_sharded(path: str | os.PathLike) -> bool:
    """Whether it is such a folder."""
    return Path(path, SUMS).is_file()


def fault_of(path: str | os.PathLike, part: int = 0, parts: int = 1) -> str:
    """What is wrong with a folder, in a sentence, or "". Of its files every parts-th is read, from
    part on, so that ranks can share the work."""
    try:
        sums = json.loads(Path(path, SUMS).read_text())
        for name in sorted(sums)[part::parts]:
            if sum_of(Path(path, name)) != sums[name]:
                return f"{path} is damaged: {name} is not as it was written"
    except (OSError, ValueError, TypeError) as error:
        return f"{path} is damaged, or no checkpoint ({reason(error)})"
    return ""


def load_plain(path: str | os.PathLike) -> dict:
    """The tree without its sharded leaves. Raises ValueError."""
    return load(Path(path, "state.pt"))


def keys(path: str | os.PathLike) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and type of the sharded tensors, by their path in the tree. Raises ValueError."""
    found = Reader(Path(path, "tensors")).read_metadata().state_dict_metadata
    return {key: (tensor.size, tensor.properties.dtype) for key, tensor in found.items()}


def fill(path: str | os.PathLike, targets: dict[str, Tensor], group=None) -> None:
    """Read the tensors of these paths into the targets, whole ones or shards of any mesh. group: of
    the ranks that read together; None: this process alone. Raises ValueError for what is not
    there, or is damaged; on all ranks alike."""
    if not targets:
        return
    there = keys(path)
    for key, target in targets.items():
        if key not in there or there[key][0] != target.shape:
            raise ValueError(f"{path} holds no {key} of shape {tuple(target.shape)}")
    with warnings.catch_warnings():                 # that one process reads alone
        warnings.simplefilter("ignore", UserWarning)
        try:
            dcp.load(targets, storage_reader=Reader(Path(path, "tensors")), process_group=group,
                     no_dist=group is None)
        except dcp.CheckpointException as error:
            raise ValueError(f"{path} is damaged ({cause_of(error)})") from None


def load_whole(path: str | os.PathLike, prefix: str = "") -> dict:
    """The tree with its sharded leaves, of paths that begin with prefix, as whole tensors on the
    host. Raises ValueError."""
    tensors = {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in keys(path).items()
               if key.startswith(prefix)}
    fill(path, tensors)
    return join(load_plain(path), tensors)


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict, path: Path,
            group=None) -> None:
    """Put a run's state, read from path, back into its model and optimizer, whichever of the two
    are sharded. group: as of fill. Raises ValueError where the state is of another model."""
    whole = {f"model/{name}": x for name, x in state["model"].items()} | {
        f"optimizer/state/{i}/{name}": x for i, kept in state["optimizer"]["state"].items()
        for name, x in kept.items()}
    sharded = keys(path) if path.is_dir() else {}
    shapes = {name: x.shape for name, x in whole.items()} | {
        name: shape for name, (shape, _) in sharded.items()}
    held = {f"model/{name}": x for name, x in model.state_dict(keep_vars=True).items()}
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        if (name := f"optimizer/state/{i}/momentum_buffer") in shapes:
            held[name] = optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    differing = [name for name in sorted(held.keys() | shapes.keys())
                 if name not in held or held[name].shape != shapes.get(name)]
    if differing:
        raise ValueError(f"the checkpoint is of another network: it differs in {differing[0]}")
    for name, x in whole.items():
        put(held[name], x)
    fill(path, {name: held[name].detach() for name in sharded}, group)


@torch.no_grad()
def put(target: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into target; into one that is sharded (a DTensor), this rank's part."""
    if isinstance(target, DTensor):
        for dim, placement in enumerate(target.placements):
            if placement.is_shard():
                parts = whole.chunk(target.device_mesh.size(dim), placement.dim)
                part = target.device_mesh.get_local_rank(dim)
                # of fewer rows than ranks the last ranks have none
                whole = parts[part] if part < len(parts) else whole.narrow(placement.dim, 0, 0)
        target = target.to_local()
    target.copy_(whole)


class Reader(dcp.FileSystemReader):
    """Whose metadata runs no code."""

    def read_metadata(self, *args, **options) -> dcp_metadata.Metadata:
        path = self.path / ".metadata"
        try:
            with open(path, "rb") as file:
                metadata = Unpickler(file).load()
            for name, held in metadata.state_dict_metadata.items():
                if not (type(held) is dcp_metadata.TensorStorageMetadata
                        and isinstance(held.size, torch.Size)
                        and isinstance(held.properties.dtype, torch.dtype)):
                    raise ValueError(f"{name} is no tensor")
        except Exception as error:      # a pickle of anything else raises nearly any
            raise ValueError(f"{path} is damaged, or no metadata ({reason(error)})") from None
        metadata.storage_meta = metadata.storage_meta or dcp_metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class Unpickler(pickle._Unpickler):         # the one in Python: its steps can be replaced
    """Of classes that are needed for metadata of tensors. Raises ValueError for any other. Not
    BytesStorageMetadata: what it stands for is read as a pickle that may run code."""
    MODULES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
    OTHERS = {("torch", "Size"), ("torch.serialization", "_get_layout"),
              *((module, name) for module in ("pathlib", "pathlib._local")
                for name in ("PosixPath", "WindowsPath"))}

    def find_class(self, module: str, name: str):
        known = module in self.MODULES and name in (
            "Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties",
            "ChunkStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING", "_StorageInfo")
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not (known or is_dtype or (module, name) in self.OTHERS):
            raise ValueError(f"metadata holds {module}.{name}, which could run code")
        return super().find_class(module, name)

    def load_build(self) -> None:
        """Sets attributes: of objects, but not of the classes themselves."""
        if callable(self.stack[-2]):
            raise ValueError("metadata changes a class or a function")
        super().load_build()

    dispatch = pickle._Unpickler.dispatch | {pickle.BUILD[0]: load_build}
