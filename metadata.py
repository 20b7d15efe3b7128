"""The metadata of a checkpoint, read without running code: its tensors, and the files that hold them.

torch.distributed.checkpoint writes it as a pickle. `SafeReader` takes only the classes that a checkpoint of
tensors alone refers to, and anything else is a ValueError of one line.
"""

import contextlib
import pickle
from enum import EnumType
from pathlib import Path
from typing import Any, Iterator

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

# What the metadata of tensors alone refers to.
ALLOWED = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
        "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", "float32", "float64", "bfloat16", "float16", "uint8", "int32", "int64"),
    "pathlib": ("PosixPath",),
}  # fmt: skip


class SafeReader(FileSystemReader):
    """A FileSystemReader whose metadata cannot run code and holds tensors only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = self._get_metadata_path(kwargs.get("rank"))

        class Unpickler(pickle.Unpickler):
            def find_class(self, module: str, name: str) -> Any:
                if (module, name) == ("builtins", "getattr"):
                    return _member  # Python before 3.11.4 writes the members of an enumeration so
                if name not in ALLOWED.get(module, ()):
                    raise ValueError(
                        f"{path}: checkpoint metadata refers to {module}.{name}; refusing to load it"
                    )
                return super().find_class(module, name)

        with open(path, "rb") as file:
            metadata = Unpickler(file).load()
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise ValueError(f"{path}: entry {name} is not a tensor; refusing to load it")
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _member(enumeration: Any, name: str) -> Any:
    """The member of an enumeration; for anything else a ValueError."""
    if not isinstance(enumeration, EnumType) or name not in enumeration.__members__:
        raise ValueError(f"checkpoint metadata asks for {name!r} of {enumeration!r}; refusing to load it")
    return enumeration[name]


@contextlib.contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """A pickle may raise whatever it likes: within, that is a ValueError that names the path."""
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split())[:300]  # a name in a pickle may hold line breaks
        if isinstance(error, ValueError) and str(path) in said:
            raise ValueError(said) from error
        raise ValueError(f"{path}: unreadable metadata ({type(error).__name__}: {said})") from error


def read(path: Path) -> Metadata:
    """What a checkpoint holds. Raises ValueError for anything but tensors."""
    with unreadable(path):
        found = SafeReader(str(path)).read_metadata()
        named = {info.relative_path for info in found.storage_data.values()}
        outside = [name for name in named if name != Path(name).name]
    if outside:
        raise ValueError(f"{path}: its metadata names {outside[0]!r}, a file outside")
    return found
