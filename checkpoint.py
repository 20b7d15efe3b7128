"""Checkpoints that are complete or absent, and the export to an ordinary Hugging Face directory.

    python checkpoint.py export RUN/step-100 OUT [--dtype float32|bfloat16]

A checkpoint `step-N` holds every parameter, AdamW's state, the random state of each rank and `trainer.json`
(step, arguments, a checksum of every file). It is written under another name and renamed when complete, so a
kill at any moment leaves the one before. Its tensors go through torch.distributed.checkpoint, sharded, so any
number of ranks reads it. Loading runs no code: the reader takes only the classes a tensor-only checkpoint
needs.

Left out: asynchronous saves, object stores, optimisers other than AdamW.
"""

import argparse
import contextlib
import copy
import json
import os
import pickle
import re
import shutil
import sys
import zlib
from enum import EnumType
from pathlib import Path
from typing import Any, NoReturn, Sequence

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

import fsdp

FORMAT = 1
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


def save(
    out: str | Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    args: dict[str, Any],
    keep_last: int,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write out/step-N, all ranks together, then prune to the newest `keep_last`. An existing step-N is left
    alone. `extra` are further tensors by name (or dicts of them) that change during training."""
    out = Path(out)
    target = out / f"step-{step}"
    beside = out / f".tmp-step-{step}"
    rank = fsdp.ranks()[0]
    if target.exists():
        return
    if rank == 0:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    fsdp.barrier()
    dcp.save(_state(model, optimizer) | (extra or {}), checkpoint_id=str(beside))
    if rank == 0:
        files = {path.name: [path.stat().st_size, _checksum(path)] for path in sorted(beside.iterdir())}
        record = {"format": FORMAT, "step": step, "args": args, "files": files}
        record["world_size"] = fsdp.ranks()[1]
        with open(beside / "trainer.json", "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
        for old in complete(out)[keep_last:]:
            shutil.rmtree(old)
    fsdp.barrier()


def complete(out: str | Path) -> list[Path]:
    """The checkpoints of a run, newest first. A directory counts once it was renamed into place with its
    record."""
    found = [path for path in Path(out).glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    found = [path for path in found if (path / ".metadata").exists() and (path / "trainer.json").exists()]
    return sorted(found, key=lambda path: -int(path.name.removeprefix("step-")))


def resume(
    out: str | Path,
    choice: str | None,
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    args: dict[str, Any],
    free: Sequence[str],
    device: torch.device,
    extra: dict[str, Any] | None = None,
) -> int:
    """Load what `--resume` names into model, optimizer and the `extra` of `save`, sharded as they are now,
    and return its step.

    `choice` None starts at 0; "auto" takes the newest whole checkpoint, or starts at 0 where there is none;
    "step-N" must be whole. Raises ValueError if it is not, or was made with other flags than `args`, those in
    `free` excepted.
    """
    path = _find(Path(out), choice, device) if choice else None
    if path is None:
        return 0
    record = read_record(path)
    for key in sorted(set(record["args"]) | set(args)):
        made, now = record["args"].get(key), args.get(key)
        if key in free or made == now or (key == "data_digest" and key not in record["args"]):
            continue
        if key == "data_digest":
            raise ValueError(f"{path} was made from other rows than --data has now; choose another --out")
        flag = f"--{key.replace('_', '-')}"
        raise ValueError(f"{path} was made with {flag} {made}, this run has {flag} {now}")
    state = _state(model, optimizer) | (extra or {})
    if record["world_size"] != fsdp.ranks()[1]:
        state = {key: value for key, value in state.items() if not key.startswith("rng_")}
    _read(path, state)
    for name, value in state.items():
        if name.startswith("rng_"):
            torch.set_rng_state(value)
    return record["step"]


def _metadata(path: Path) -> Metadata:
    """What a checkpoint holds. Raises ValueError for anything but tensors."""
    try:
        return SafeReader(str(path)).read_metadata()
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: unreadable metadata ({type(error).__name__}: {error})") from error


def _read(path: Path, state: dict[str, Any], **options: Any) -> None:
    """Fill a state from a checkpoint. Raises ValueError for anything but tensors of its names and shapes."""
    _metadata(path)  # by itself first: within dcp.load its refusal would be wrapped
    try:
        dcp.load(state, storage_reader=SafeReader(str(path)), **options)
    except CheckpointException as error:  # a BaseException
        cause = str(next(iter(error.failures.values()))[0]).splitlines()[0]
        raise ValueError(f"{path}: does not fit this model: {cause}") from error


def _find(out: Path, choice: str, device: torch.device) -> Path | None:
    """The checkpoint to resume from, on all ranks. Rank 0 checks sizes and checksums; with "auto" it puts a
    damaged one aside, so that the step can be written again."""
    candidates = complete(out)
    if choice != "auto":
        names = ", ".join(path.name for path in candidates) or "none"
        candidates = [path for path in candidates if path.name == choice]
        if not candidates:
            raise ValueError(f"no complete checkpoint at {out / choice} (complete: {names})")
    chosen = -1
    damage = "damaged"
    for index, path in enumerate(candidates if fsdp.ranks()[0] == 0 else []):
        damage = _damage(path)
        if not damage:
            chosen = index
            break
        if choice != "auto" or "this program reads" in damage:
            break
        print(f"warning: {path}: {damage}; passed over", file=sys.stderr, flush=True)
        aside = path.with_name(f".damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
    else:
        damage = ""
    refused = bool(damage) and chosen < 0
    chosen, refused = (fsdp.from_rank_zero(int(value), device) for value in (chosen, refused))
    if refused:
        raise ValueError(f"{out}: {damage}" if choice == "auto" else f"{candidates[0]}: {damage}")
    return candidates[chosen] if chosen >= 0 else None


def read_record(path: Path) -> dict[str, Any]:
    """trainer.json of a checkpoint. Raises ValueError if it is not one, or of a newer format."""
    record = json.loads((path / "trainer.json").read_text(encoding="utf-8"))
    if not isinstance(record, dict) or not {"format", "step", "args", "files", "world_size"} <= set(record):
        raise ValueError("not a checkpoint's record")
    if record["format"] > FORMAT:
        raise ValueError(f"format {record['format']}, this program reads <= {FORMAT}")
    return record


def _state(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Any]:
    """Tensors only. AdamW's state is made here where no step has been taken, as its first step would make
    it."""
    moments = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        moments |= {f"{name}.{key}": value for key, value in state.items()}
    rank = fsdp.ranks()[0]
    return {"model": dict(model.named_parameters()), "optim": moments, f"rng_{rank}": torch.get_rng_state()}


def _checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(2**24):
            value = zlib.crc32(block, value)
    return value


def _damage(path: Path) -> str:
    """What is wrong with the files of a checkpoint, or an empty string."""
    try:
        files = read_record(path)["files"]
    except ValueError as error:
        return f"trainer.json: {error}"
    for name, (size, checksum) in files.items():
        file = path / name
        if not file.exists():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
        if _checksum(file) != checksum:
            return f"{name} has changed since it was written"
    return ""


def export(
    model: nn.Module,
    tokenizer: Any,
    out: str | Path,
    dtype: torch.dtype = torch.float32,
) -> None:
    """A sharded LanguageModel as a Hugging Face directory, all ranks together; `from_pretrained` loads it.

    With a `score` head it is a sequence classifier; a value head goes beside it, value_head.safetensors.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)  # collective; empty on all ranks but 0
    if fsdp.ranks()[0] == 0:
        _write(model.lm, state, tokenizer, out, dtype)
    fsdp.barrier()


def _write(
    lm: nn.Module, state: dict[str, Tensor], tokenizer: Any, out: str | Path, dtype: torch.dtype
) -> None:
    """Save a LanguageModel's state dict under another name and rename it when complete."""
    out = Path(out)
    if out.exists() and not (out / "config.json").exists():
        raise ValueError(f"{out}: exists and is not an exported model")
    beside = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    # the skeleton sets its own attention, and a live model shares its config
    config = copy.deepcopy(lm.config)
    kind = AutoModelForSequenceClassification if hasattr(lm, "score") else AutoModelForCausalLM
    with torch.device("meta"):
        skeleton = kind.from_config(config, dtype=dtype, attn_implementation="eager")
    if kind is AutoModelForCausalLM:
        skeleton.generation_config = lm.generation_config
    state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    # a tied weight once
    kept = {name for name, _ in [*skeleton.named_parameters(), *skeleton.named_buffers()]}
    plain = {name.removeprefix("lm."): value for name, value in state.items()}
    skeleton.save_pretrained(
        beside, state_dict={name: value for name, value in plain.items() if name in kept}
    )
    values = {name: value for name, value in state.items() if name.startswith("value_head.")}
    if values:
        save_file(values, beside / "value_head.safetensors")
    tokenizer.save_pretrained(beside)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(beside, out)


def _export_offline(path: Path, out: Path, dtype: torch.dtype) -> None:
    """The same from a checkpoint on disk, in one process."""
    if path.name not in [found.name for found in complete(path.parent)]:
        raise ValueError(f"{path}: no complete checkpoint")
    if _damage(path):
        raise ValueError(f"{path}: {_damage(path)}")
    saved = _metadata(path).state_dict_metadata
    shapes = {
        name.removeprefix("model."): entry.size for name, entry in saved.items() if name.startswith("model.")
    }
    source = read_record(path)["args"]["model"]
    kept = path.parent / "tokenizer"  # the run's own, with the tokens and the template it added
    tokenizer = AutoTokenizer.from_pretrained(kept if kept.exists() else source)
    config = AutoConfig.from_pretrained(source)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for place in (source, kept):  # a model need not have one; the run's own knows where training ended turns
        with contextlib.suppress(OSError):
            lm.generation_config = GenerationConfig.from_pretrained(place)
    embedding = lm.get_input_embeddings().weight
    name = next(name for name, parameter in lm.named_parameters() if parameter is embedding)
    config.get_text_config().vocab_size = shapes[f"lm.{name}"][0]  # it may have grown
    head = next(name for name, module in lm.named_modules() if module is lm.get_output_embeddings())
    if f"lm.{head}.weight" in shapes:
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    state = {name: torch.empty(shape) for name, shape in shapes.items()}
    _read(path, {"model": state}, no_dist=True)
    if "lm.score.weight" in state:
        lm.score = nn.Linear(state["lm.score.weight"].shape[1], 1, bias=False)
        lm.config.num_labels = 1
        lm.config.pad_token_id = tokenizer.pad_token_id
    _write(lm, state, tokenizer, out, dtype)


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = _fail
    parser.add_argument("command", choices=["export"])
    parser.add_argument("step", type=Path, help="a checkpoint, RUN/step-N")
    parser.add_argument("out", type=Path, help="the directory to write")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    try:
        _export_offline(args.step, args.out, getattr(torch, args.dtype))
    except (ValueError, OSError) as error:
        _fail(str(error))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
