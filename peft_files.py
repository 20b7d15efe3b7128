"""Adapters in peft's own files, settings (adapter_config.json) and tensors (adapter_model.safetensors): read,
to go on with them, and made, to be written; and their settings in the record of a checkpoint.

A tensor of the file is a parameter of a LanguageModel under another name: without peft's prefix, and with the
name of the adapter in it.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import added
import files
import model

TRAINED = "default"  # peft's name of the adapters that are trained
MISSING = "adapters need peft (pip install peft)"
FILES = ("adapter_config.json", "adapter_model.safetensors")
# What an adapter's settings may say: peft injects accordingly, and a merge follows its layers.
SETTINGS = (
    "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "trainable_token_indices",
)  # fmt: skip
# What may be there too: it says nothing of how they compute, or is looked at elsewhere.
BESIDE = (
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "lora_dropout", "modules_to_save",
)  # fmt: skip


def peft() -> Any:
    """The library. Raises ValueError if it is not there."""
    try:
        import peft
    except ImportError:
        raise ValueError(MISSING) from None
    return peft


def unfused(lm: nn.Module, ends: list[str]) -> list[str]:
    """The names of linear layers that peft takes for such: in a mixture whose first blocks are dense it takes
    `up_proj` for that of the experts, which are one tensor now."""
    if not ends:
        return ends
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    made = peft().LoraConfig(target_modules=ends)
    convert_peft_config_for_transformers(made, lm, None)
    return [end for end in ends if end in made.target_modules]


def read(args: argparse.Namespace) -> tuple[Any, dict[str, Tensor]]:
    """Settings and tensors of --lora-from, the tensors named as those of a LanguageModel. Raises ValueError
    for what is none, was made on another base, or sets what is not supported."""
    folder = Path(args.lora_from)
    for name in FILES:
        if not (folder / name).is_file():
            raise ValueError(f"--lora-from {folder}: no {name}")
    try:
        told = files.read_json(folder / FILES[0])
        tensors = load_file(folder / FILES[1])
        kept = {key: told[key] for key in SETTINGS if key in told}
        made = peft().LoraConfig(**kept, base_model_name_or_path=args.model)
    except (TypeError, KeyError, ValueError, SafetensorError, OSError) as error:
        raise ValueError(f"--lora-from {folder}: {str(error).splitlines()[0]}") from error
    usual = peft().LoraConfig().to_dict() | {"peft_type": "LORA"}
    free = {"init_lora_weights": "gaussian"}  # others of it change the base
    other = [
        key for key, value in told.items()
        if key not in SETTINGS + BESIDE and value not in (usual.get(key), free.get(key), None, False, {}, [])
    ]  # fmt: skip
    other += ["modules_to_save"] * (not set(told.get("modules_to_save") or ()) <= {"score", "classifier"})
    if other:
        said = f"{other[0]} = {json.dumps(told[other[0]])[:40]}"
        raise ValueError(f"--lora-from {folder}: {FILES[0]} sets {said}, which is not supported")
    if made.trainable_token_indices and getattr(args, "method", None) != "csft":
        which = "sft.py --method csft goes on with; else give the final/ of its run as --model"
        raise ValueError(f"--lora-from {folder} has rows of added tokens, which {which}")
    base = told.get("base_model_name_or_path")
    if base and Path(base).exists() and model.fingerprint(base) != model.fingerprint(args.model):
        raise ValueError(f"--lora-from {folder} was made on {base}, which is another model than --model")
    return made, {_inside(name): value for name, value in tensors.items()}


def _inside(name: str) -> str:
    """A tensor of peft's file -> its parameter of a LanguageModel."""
    name = name.removeprefix("base_model.model.")
    for part in ("lora_A", "lora_B"):
        name = name.replace(f".{part}.weight", f".{part}.{TRAINED}.weight")
    return f"lm.{name.replace(added.PEFT, added.NAME)}"


def recorded(made: Any) -> dict[str, Any]:
    """The settings in the record of a checkpoint, as JSON gives them back."""
    found = {key: getattr(made, key) for key in SETTINGS}
    if not made.trainable_token_indices:  # of which older records say nothing
        del found["trainable_token_indices"]
    return {k: sorted(v) if isinstance(v, (set, tuple)) else v for k, v in found.items()}


def rebuilt(made: dict[str, Any]) -> Any:
    """The LoraConfig of a checkpoint's record. Raises ValueError if its base is not what it was."""
    if model.fingerprint(made["model"]) != made["model_digest"]:
        raise ValueError(f"its adapters were trained on another model than {made['model']} is now")
    return peft().LoraConfig(**made["adapter"], base_model_name_or_path=made["model"])


def as_peft(made: Any, trained: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Settings and tensors as peft stores them: what PeftModel.from_pretrained reads."""
    scores = "lm.score.weight" in trained
    kept = recorded(made)
    told = peft().LoraConfig(
        **kept,
        base_model_name_or_path=made.base_model_name_or_path,
        inference_mode=True,
        task_type="SEQ_CLS" if scores else "CAUSAL_LM",
        modules_to_save=["score"] if scores else None,
    )
    for key in ("target_modules", "exclude_modules"):  # in their order: peft makes a set of a list
        setattr(told, key, kept[key])
    return told, {_outside(name): value for name, value in trained.items() if name.startswith("lm.")}


def _outside(name: str) -> str:
    """A parameter of a LanguageModel -> its tensor of peft's file."""
    name = name.replace(f".{TRAINED}.", ".").removeprefix("lm.")
    if added.is_row(name):
        name = name.removesuffix(added.NAME) + added.PEFT
    return f"base_model.model.{name}"
