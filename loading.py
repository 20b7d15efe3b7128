"""What transformers reads of a model, checked: a directory or a hub name in, a whole model or tokenizer out,
or one line that says what is wrong with it.

    from_pretrained    a language model with every weight of it
    load_plain         the same to generate with, an adapter merged into its base
    load_tokenizer     the tokenizer

Left out: pickle weights.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any, Iterator

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()


@contextlib.contextmanager
def one_line(path: str) -> Iterator[None]:
    """Whatever goes wrong within, a dozen unrelated types for a directory that is not a model, is a
    ValueError of one line; transformers itself says nothing."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)  # its report of missing weights is ours
    try:
        yield
    except Exception as error:
        what = str(error).strip() or type(error).__name__
        raise ValueError(f"{path}: {what.splitlines()[0].removeprefix(f'{path}: ')}") from error
    finally:
        transformers_logging.set_verbosity(before)


def local(path: str) -> dict[str, bool]:
    """A path that looks like a directory must be one; then the hub is not asked. Raises ValueError where it
    is not, or names what is not safetensors of its own: pickles, other directories' files, kernels."""
    if Path(path).exists():
        for index in sorted(Path(path).glob("*.index.json")):
            named = set(_json(index).get("weight_map", {}).values())
            wrong = [name for name in map(str, named) if "/" in name or not name.endswith(".safetensors")]
            if wrong:
                raise ValueError(f"{index}: {min(wrong)} is not a safetensors file of this directory")
        settings = _json(Path(path) / "config.json") if (Path(path) / "config.json").is_file() else {}
        for key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
            if "/" in str(settings.get(key)):
                raise ValueError(f"{path}/config.json: {key} {settings[key]} is code from the hub; delete it")
        return {"local_files_only": True}
    if path.count("/") > 1 or path.startswith((".", os.sep)):
        raise ValueError(f"{path}: no such model directory")
    return {}


def _json(path: Path) -> dict[str, Any]:
    """An object in a file. Raises ValueError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must be one object")
    return found


def from_pretrained(
    path: str, config: Any, dtype: torch.dtype, options: dict[str, Any], reward_model: bool
) -> nn.Module:
    """A language model with every weight of it. Raises ValueError."""
    lm, report = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **options,
    )
    scorer = any("ForSequenceClassification" in name for name in config.architectures or ())
    if scorer and not reward_model:
        raise ValueError("a classifier, not a language model")
    _untie(lm)
    head = {f"lm_head.{kind}" for kind in ("weight", "bias")} if scorer else set()
    _refuse_missing(path, {**report, "missing_keys": set(report["missing_keys"]) - head}, lm)
    return lm


def _refuse_missing(path: str, report: dict[str, Any], lm: nn.Module) -> None:
    tied = set(getattr(lm, "all_tied_weights_keys", None) or {})
    missing = sorted(set(report["missing_keys"]) - tied)
    wrong = sorted(str(key) for key in report.get("mismatched_keys") or [])
    if missing or wrong:
        raise ValueError(
            f"{path}: {len(missing + wrong)} weights missing or misshapen (first: {(missing + wrong)[0]})"
        )


def _untie(lm: nn.Module) -> None:
    """A file may hold a head of its own where the configuration says tied: then it is trained apart, and the
    export must say so."""
    head, embedding = lm.get_output_embeddings(), lm.get_input_embeddings()
    for config in (lm.config, lm.config.get_text_config()):
        if head is not None and getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = head.weight is embedding.weight


def load_plain(path: str, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """transformers' own model, to generate with: in evaluation mode, on its own attention. A directory with
    an adapter is its base model with the adapter merged. Raises ValueError as `load` does."""
    options = {"trust_remote_code": trust_remote_code, **local(path)}
    if (Path(path) / "adapter_config.json").exists():
        return _merged(path, dtype, trust_remote_code)
    with one_line(path):
        config = AutoConfig.from_pretrained(path, **options)
        return from_pretrained(path, config, dtype, options, False).eval()


def _merged(path: str, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The base model of peft's adapter directory, the adapter merged into it in fp32."""
    try:
        import peft
    except ImportError:
        raise ValueError(f"{path} holds an adapter, which takes peft (pip install peft)") from None
    with one_line(path):
        if not (Path(path) / "adapter_model.safetensors").exists():
            raise ValueError("no adapter_model.safetensors (pickle .bin files are not loaded)")
        base = peft.PeftConfig.from_pretrained(path).base_model_name_or_path
        if not base:
            raise ValueError('adapter_config.json has no "base_model_name_or_path"')
    lm = load_plain(base, torch.float32, trust_remote_code)
    with one_line(path):
        merged = peft.PeftModel.from_pretrained(lm, path, local_files_only=True).merge_and_unload()
    return merged.to(dtype).eval()


def load_tokenizer(path: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model directory or hub name. Raises ValueError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, **local(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no tokenizer ({str(error).strip().splitlines()[0]})") from error


def refuse_not_finite(path: str, lm: nn.Module) -> None:
    """Raises ValueError for a weight that is not finite."""
    named = list(lm.named_parameters())
    peaks = torch._foreach_norm([parameter.detach() for _, parameter in named], float("inf"))
    bad = [name for (name, _), peak in zip(named, peaks) if not peak.isfinite()]
    if bad:
        raise ValueError(f"{path}: {len(bad)} weights hold numbers that are not finite (first: {bad[0]})")
