"""A model as an ordinary Hugging Face directory: of a run that ends, or of one of its checkpoints.

    python export.py RUN/step-100 OUT [--dtype float32|bfloat16]

The directory holds config.json, safetensors, generation settings and the tokenizer, nothing of ours but a
small file, `.exported`, that tells a later export that it may replace the directory. It is written under
another name and renamed when complete. A run with --lora-rank has its adapters merged into final/, and as
peft stores them in adapter/; from a checkpoint they go to OUT and OUT-adapter. The tower of a composite model
is frozen and in no checkpoint: it comes from the model that the run began with, and so do the files of its
processor.

Weights go to disk one by one: the safetensors files get their headers first, for all shapes are known, then
each tensor is gathered, cast and written to its place. No rank holds more than a few of them at a time.

Left out: other formats.
"""

import argparse
import contextlib
import copy
import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Iterable, Iterator, Sequence

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
)
from transformers.core_model_loading import revert_weight_conversion

import checkpoint
import config
import fsdp
import loading
import lora
import model
import peft_files

MARK = ".exported"
DTYPES = ("float32", "bfloat16")
SHARD = "5GB"  # the largest file of weights: hubs and caches take files of this size
NAMES = {  # of dtypes, in a safetensors header
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def prepare(args: argparse.Namespace) -> torch.dtype:
    """The dtype of a run's final/: the one chosen, else bfloat16 if the model came so, else float32. Raises
    ValueError if final/ is there and may not be replaced."""
    for name in ("final", "adapter") if lora.wanted(args) else ("final",):
        _check_target(Path(args.out) / name, [args.model, getattr(args, "reference", None), args.lora_from])
    return _dtype(args.final_dtype, args.model, args.trust_remote_code)


def _check_target(out: str | Path, keep: Sequence[str | None] = ()) -> None:
    """Raises ValueError for a directory that an export may not replace: one that no export wrote, a run, or
    one of `keep`, the models that a run started from."""
    out = Path(out)
    if not os.path.lexists(out):
        return
    if not out.exists():
        raise ValueError(f"{out}: a link to what is not there; choose another name")
    for path in (Path(path) for path in keep if path):
        if path.exists() and out.resolve() in (path.resolve(), *path.resolve().parents):
            raise ValueError(f"{out}: holds the model that the run started from; choose another name")
    if (out / "args.json").exists() or any(out.glob("step-*")):
        raise ValueError(f"{out}: is a run directory; choose another name")
    if not (out / MARK).is_file():
        raise ValueError(f"{out}: exists and was not written by an export; choose another name")


def _dtype(choice: str | None, model: str, trust_remote_code: bool = False) -> torch.dtype:
    if choice is None:
        came = loading.settings(model, trust_remote_code).dtype
        return torch.bfloat16 if came == torch.bfloat16 else torch.float32
    return getattr(torch, choice)


def export(
    model: nn.Module,
    tokenizer: Any,
    out: str | Path,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> None:
    """A sharded LanguageModel as a Hugging Face directory, all ranks together; `from_pretrained` loads it.

    With a `score` head it is a sequence classifier; a value head goes beside it, value_head.safetensors.
    Adapters are merged into their base as it lies on disk; by themselves they go to adapter/ beside it.
    Raises ValueError, on all ranks, if it cannot be written, `out` may not be replaced, or a weight is not
    finite.
    """
    device = fsdp.meeting(next(model.parameters()))
    adapters = lora.settings(model)
    state = loading.stored(model)
    wholes = _wholes(state)
    if adapters is not None:
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        state = dict(_wholes({name: state[name] for name in state if name in trained}))
        wholes = iter(())
    problem = ""
    if fsdp.ranks()[0] == 0:
        try:
            lm, weights = model.lm, wholes
            if adapters is not None:
                _write_adapters(adapters, state, tokenizer, Path(out).with_name("adapter"))
                lm, state, weights = lora.merged(adapters, state, trust_remote_code)
                lm.generation_config = model.lm.generation_config
                _give_score(lm, state, tokenizer)
            _write(lm, state, weights, tokenizer, out, dtype)
        except (OSError, ValueError, SafetensorError) as error:
            problem = f"{getattr(error, 'strerror', None) or error}"
            problem = problem if str(out) in problem else f"{out}: {problem}"
    for _ in wholes:  # what rank 0 has not asked for, or the others' part of it
        pass
    if fsdp.from_rank_zero(int(bool(problem)), device):
        raise ValueError(problem or f"{out}: rank 0 could not write it")


def _wholes(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state, whole, one after another, all ranks together; rank 0's on the CPU."""
    for name, value in state.items():
        yield name, _whole(value)


def _whole(value: Tensor) -> Tensor:
    whole = fsdp.whole(value).detach()
    return whole.cpu() if fsdp.ranks()[0] == 0 else whole


def _write(
    lm: nn.Module,
    state: dict[str, Tensor],
    wholes: Iterable[tuple[str, Tensor]],
    tokenizer: Any,
    out: str | Path,
    dtype: torch.dtype,
) -> None:
    """Save a LanguageModel under another name and rename it when complete: the names and shapes of its state,
    and the tensors one by one."""
    # the skeleton sets its own attention, and a live model shares its config
    settings = copy.deepcopy(lm.config)
    kind = AutoModelForSequenceClassification if hasattr(lm, "score") else AutoModelForCausalLM
    with torch.device("meta"):
        skeleton = kind.from_config(settings, dtype=dtype, attn_implementation="eager")
    generates = skeleton.can_generate()
    if generates:  # its own goes past transformers, which refuses some that it has read, once changed
        skeleton.generation_config = GenerationConfig()
    kept = {name: dtype if value.is_floating_point() else value.dtype for name, value in state.items()}
    kept |= {f"lm.{name}": buffer.dtype for name, buffer in skeleton.named_buffers()}  # some stay in fp32
    body = {
        name.removeprefix("lm."): torch.empty_like(value, dtype=kept[name], device="meta")
        for name, value in state.items()
        if name.startswith("lm.")
    }
    named = _matched(lm, skeleton, body)
    with _replacing(out) as beside:
        skeleton.save_pretrained(beside, state_dict={})  # all but the weights
        if generates:
            lm.generation_config.to_json_file(beside / "generation_config.json")
        _save_along(_write_weights(skeleton, named, wholes, out, beside), tokenizer, beside)
        for path in loading.processor(lm.config):
            shutil.copyfile(path, beside / path.name)


def _write_weights(
    skeleton: nn.Module,
    named: dict[str, Tensor],
    wholes: Iterable[tuple[str, Tensor]],
    out: str | Path,
    beside: Path,
) -> dict[str, Tensor]:
    """Tensors into files as `save_pretrained` lays them out; what of them is not the transformers model's.

    Where transformers stores a parameter in another form (fused experts one by one), it is brought into that
    by transformers itself, alone. Only where several make one tensor on disk must all be there at once.
    """
    ignored = skeleton._keys_to_ignore_on_save or ()
    named = {name: value for name, value in named.items() if name not in ignored}
    stored, apart = revert_weight_conversion(skeleton, dict(named)), {}
    for name, value in named.items():
        apart |= revert_weight_conversion(skeleton, {name: value})
    one_by_one = {n: v.shape for n, v in stored.items()} == {n: v.shape for n, v in apart.items()}
    # parts of a fused parameter are no longer of one memory, which the size of files would count for each
    places = _lay_out(skeleton, {name: torch.empty_like(value) for name, value in stored.items()}, beside)
    others, together = {}, {}
    for name, value in wholes:
        _check_finite(out, name, value)
        key = name.removeprefix("lm.")
        if key == name:
            others[name] = value
        elif key in named:
            together[key] = value.to(named[key].dtype)
        if one_by_one:
            _put(revert_weight_conversion(skeleton, together), places)
            together = {}
        del value  # before the next is gathered
    _put(revert_weight_conversion(skeleton, together), places)
    return others


def _lay_out(skeleton: nn.Module, stored: dict[str, Tensor], beside: Path) -> dict[str, tuple[Path, int]]:
    """Files of weights that hold their headers and zeros; of each tensor the file, and where it begins."""
    pattern = "model{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(stored, filename_pattern=pattern, max_shard_size=SHARD)
    places = {}
    for file, names in split.filename_to_tensors.items():
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name in sorted(names, key=lambda name: (-stored[name].itemsize, name)):  # as safetensors does
            begin, end = end, end + stored[name].nbytes
            kind, shape = NAMES.get(stored[name].dtype), list(stored[name].shape)
            if kind is None:
                raise ValueError(f"{name} is {stored[name].dtype}, which is not written here")
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with open(beside / file, "wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            opened.truncate(8 + len(text) + end)
        places |= {name: (beside / file, 8 + len(text) + header[name]["data_offsets"][0]) for name in names}
    if split.is_sharded:
        about = {"total_parameters": skeleton.num_parameters(), **split.metadata}
        index = {"metadata": about, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (beside / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return places


def _put(tensors: dict[str, Tensor], places: dict[str, tuple[Path, int]]) -> None:
    for name, value in tensors.items():
        path, begin = places[name]
        with open(path, "r+b") as file:
            file.seek(begin)
            file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy())


def _write_adapters(settings: Any, state: dict[str, Tensor], tokenizer: Any, out: str | Path) -> None:
    """Save what is trained as peft does, a value head beside it."""
    told, named = peft_files.as_peft(settings, state)
    for name, value in state.items():
        _check_finite(out, name, value)
    with _replacing(out) as beside:
        told.save_pretrained(beside)
        save_file(named, beside / "adapter_model.safetensors", {"format": "pt"})
        _save_along(state, tokenizer, beside)


def _save_along(state: dict[str, Tensor], tokenizer: Any, place: Path) -> None:
    """A value head, if a state has one, and the tokenizer."""
    values = {name: value for name, value in state.items() if name.startswith("value_head.")}
    if values:
        save_file(values, place / "value_head.safetensors")
    save_tokenizer(tokenizer, place)


def _give_score(lm: nn.Module, state: dict[str, Tensor], tokenizer: Any) -> None:
    """Make a language model the classifier that a LanguageModel's state dict says it is."""
    if "lm.score.weight" in state:
        lm.score = nn.Linear(state["lm.score.weight"].shape[1], 1, bias=False)
        lm.config.num_labels = 1
        lm.config.pad_token_id = tokenizer.pad_token_id


def _check_finite(out: str | Path, name: str, value: Tensor) -> None:
    # the extremes of what holds a NaN are NaN; isfinite of all of it takes twice its memory
    if value.numel() and not torch.stack(value.aminmax()).isfinite().all():
        raise ValueError(f"{out}: not written, for a weight is not finite ({name.removeprefix('lm.')})")


@contextlib.contextmanager
def _replacing(out: str | Path) -> Iterator[Path]:
    """A directory to write into under another name, which takes its place when complete. Raises ValueError
    if `out` may not be replaced."""
    _check_target(out)
    out = Path(out).resolve()
    beside, old = (out.with_name(f".{word}-{out.name}") for word in ("tmp", "removed"))
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        (beside / MARK).write_text("written by export.py, which may replace this directory\n")
        yield beside
        for path in beside.iterdir():  # safetensors lets nobody else read
            path.chmod((beside / MARK).stat().st_mode)
            with open(path, "rb") as file:  # a header, laid out first, must not outlive its numbers
                os.fsync(file.fileno())
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            os.replace(out, old)
        os.replace(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def save_tokenizer(tokenizer: Any, place: str | Path, settings: GenerationConfig | None = None) -> None:
    """A tokenizer, and where generation stops, into a directory. Raises OSError if they do not fit."""
    Path(place).mkdir(parents=True, exist_ok=True)
    try:
        tokenizer.save_pretrained(place)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(f"{place}: {error}") from error  # its library has no type of its own
    if settings is not None:
        settings.to_json_file(Path(place) / "generation_config.json")


def _matched(lm: nn.Module, skeleton: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a skeleton stores of a state, in its order, a tied weight once. Raises ValueError unless every
    parameter has its tensor and every tensor its parameter."""
    head = {id(parameter) for parameter in lm.get_output_embeddings().parameters()}
    headless = not hasattr(skeleton, "lm_head") and hasattr(lm, "score")
    dropped = {name for name, p in lm.named_parameters(remove_duplicate=False) if id(p) in head and headless}
    stored = skeleton.state_dict()
    wanted = {name: parameter.shape for name, parameter in skeleton.named_parameters()}
    wanted |= {name: buffer.shape for name, buffer in skeleton.named_buffers() if name in stored}
    shapes = {name: value.shape for name, value in state.items()}
    unfilled = sorted(name for name, shape in wanted.items() if shapes.get(name) != shape)
    unplaced = sorted(set(state) - set(stored) - dropped)
    if unfilled or unplaced:
        said = [f"{len(unfilled)} parameters without their tensor (first: {unfilled[0]})"] if unfilled else []
        said += [f"{len(unplaced)} tensors without a parameter (first: {unplaced[0]})"] if unplaced else []
        raise ValueError(f"{type(lm).__name__} cannot be exported: {', '.join(said)}")
    return {name: state[name] for name in stored if name in wanted}


def _export_offline(path: Path, out: Path, dtype: str | None, trust: bool = False) -> None:
    """The same from a checkpoint on disk, in one process."""
    state = checkpoint.outline(path)
    made = checkpoint.read_record(path)["args"]
    source = made.get("model")
    if not isinstance(source, str) or not source:
        raise ValueError(f"{path}: its record names no model")
    _check_target(out, [source, made.get("reference"), made.get("lora_from")])
    kept = path.parent / "tokenizer"  # the run's own, with the tokens and the template it added
    tokenizer = loading.load_tokenizer(str(kept) if kept.exists() else source, trust)
    if "adapter" in made:
        with config.located(str(path)):
            adapters = peft_files.rebuilt(made)
        state = dict(checkpoint.read(path, state))
        _write_adapters(adapters, state, tokenizer, out.with_name(f"{out.name}-adapter"))
        lm, state, wholes = lora.merged(adapters, state, trust)
    else:
        settings = loading.settings(source, trust)
        with loading.one_line(str(path)):
            lm = loading.skeleton(settings, trust)
            _as_saved(lm, state)
            lacking = [name for name in (f"lm.{name}" for name in loading.stored(lm)) if name not in state]
            untrained = model.untrained(made, lacking, "lm.score.weight" in state, trust)
            wholes = itertools.chain(checkpoint.read(path, state), untrained.items())
            state = state | untrained
    with loading.one_line(str(path)):
        for place in (source, kept):  # the run's own, if there, knows where training ended turns
            with contextlib.suppress(OSError):
                lm.generation_config = GenerationConfig.from_pretrained(place)
        _give_score(lm, state, tokenizer)
    chosen = dtype or made.get("final_dtype")
    _write(lm, state, wholes, tokenizer, out, _dtype(chosen if chosen in DTYPES else None, source, trust))


def _as_saved(lm: nn.Module, state: dict[str, Tensor]) -> None:
    """The settings of a model that a state dict says otherwise of: how many rows, and whether its head is
    its embedding."""
    settings = lm.config
    embedding = lm.get_input_embeddings().weight
    name = next(name for name, parameter in lm.named_parameters() if parameter is embedding)
    settings.get_text_config().vocab_size = state[f"lm.{name}"].shape[0]  # it may have grown
    head = next(name for name, module in lm.named_modules() if module is lm.get_output_embeddings())
    if f"lm.{head}.weight" in state:
        settings.tie_word_embeddings = settings.get_text_config().tie_word_embeddings = False


def main(argv: Sequence[str] | None = None) -> None:
    made = config.parser(__doc__.splitlines()[0])
    made.usage = "%(prog)s RUN/step-N OUT [flags]"
    made.add_argument("step", type=config.text, help="a checkpoint, RUN/step-N")
    made.add_argument("out", type=config.directory, help="the directory to write")
    made.add_argument("--dtype", choices=DTYPES, default=None, help="None: as the run would have")
    # not what the checkpoint's record says: that may come from anybody
    made.add_argument("--trust-remote-code", type=config.boolean, default=False, metavar="true|false")
    args = made.parse_args(sys.argv[1:] if argv is None else argv)
    with config.user_errors():
        _export_offline(Path(args.step), Path(args.out), args.dtype, args.trust_remote_code)
    config.tell(f"wrote {args.out}")


if __name__ == "__main__":
    main()
