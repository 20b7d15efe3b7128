"""What can be known of a training before a model is loaded.

    begin     what stops a run at once: its directory, its trackers, the files of its models
    agree     before a model is made: do all nodes run the same code on the same rows?
    report    --check: one screen of what would be trained, and on what; and whether packing suits the model

Left out: whether the run fits into memory (estimate.py).
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import socket
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch

import attention
import batch
import config
import fsdp
import loading
import lora
import model
import packing
import precision
import rundir
import trackers
from arrays import Store


def begin(args: argparse.Namespace) -> None:
    """Fail in one line, or end with exit code 0, for a run that cannot or need not be; nothing is written."""
    rundir.check_run(args)
    with config.user_errors():
        trackers.check(args.log_to)
        device = precision.device(args.device, args.dtype, config.tell)
        speaks = int(os.environ.get("RANK", 0)) == 0
        if speaks and args.plan is None and args.dtype == "bfloat16" != precision.usual(device):
            config.warn("--dtype bfloat16: this CPU has no products of it, float32 is many times faster")
        for path in _models(args):
            loading.check(path, args.weights if args.plan is None else "random")  # a plan reads none
            if device == "cuda":
                with config.located(path):
                    settings = loading.settings(path, args.trust_remote_code)
                    attention.refuse(settings, device, getattr(torch, args.dtype))


def _models(args: argparse.Namespace) -> list[str]:
    """The models that a run reads; adapters are no model of their own."""
    apart = "reference" in vars(args) and lora.shared(args) is None
    return [path for path in dict.fromkeys((args.model, args.reference if apart else None)) if path]


def agree(*stores: Any, dtype: str = "") -> None:
    """Compare what each rank runs, by one gather: Python, libraries, our code, the encoded rows, its devices,
    the dtype it computes in, which a CPU may have decided.
    Raises ValueError, on all ranks, with the hosts and their values where they differ: such ranks would hang,
    or train something else than one of them alone."""
    ours = sorted(Path(__file__).parent.glob("*.py"))
    cards = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    told = {"Python": platform.python_version(), "torch": torch.__version__}
    told |= {name: _version(name) for name in ("transformers", "flash-attn")}
    told["code"] = hashlib.sha256(b"".join(path.read_bytes() for path in ours)).hexdigest()[:12]
    told["rows"] = " ".join(store.digest[:12] for store in stores if isinstance(store, Store))
    told["devices"] = ", ".join(f"{count} {name}" for name, count in Counter(cards).items()) or "CPU"
    told["dtype"] = dtype
    said = [json.loads(text) for text in fsdp.gathered(json.dumps([socket.gethostname(), told]))]
    for key in told:
        found = {}  # value -> host -> ranks
        for rank, (host, values) in enumerate(said):
            found.setdefault(values[key], {}).setdefault(host, []).append(rank)
        if len(found) > 1:
            parts = [f"{value or 'none'} on {_places(hosts)}" for value, hosts in found.items()]
            raise ValueError(f"{key} differs between ranks: {'; '.join(parts)} (all must be alike)")


def _version(name: str) -> str:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return "none"


def _places(hosts: dict[str, list[int]]) -> str:
    """The first hosts of some, with their ranks."""
    said = [f"{host} (rank {', '.join(map(str, ranks))})" for host, ranks in hosts.items()]
    return ", ".join(said[:3]) + f" and {len(said) - 3} more" * (len(said) > 3)


def tell_long(units: np.ndarray, batch_size: int, unit: str, say: Callable[..., None]) -> None:
    """Say which lists count for more than a batch, of `units` (n,): they are not split."""
    long = units[units > batch_size]
    if len(long):
        say(f"{len(long)} of {len(units)} lists have up to {long.max()} {unit}: a step with one is as large")


def report(
    args: argparse.Namespace,
    tokenizer: Any,
    train: Store,
    evaluated: Any,
    units: np.ndarray,
    device: torch.device,
    say: Callable[..., None],
    objective: Any = None,
) -> None:
    """Say what a run of these flags would do: `units` (n,) are what --batch-size counts of each example;
    `objective` is that of align.py, which may want the heads of model.add_value_head or add_score. Raises
    ValueError for a model that does not fit its tokenizer, its weights, --max-length or packed attention, or
    is quantised, for adapters that do not fit the model, and for a disk that does not hold a checkpoint where
    there shall be some."""
    say("flags: " + " ".join(f"{key}={value}" for key, value in vars(args).items() if value is not None))
    steps_per_epoch = batch.steps_per_epoch(units, args.batch_size)
    total = args.epochs * steps_per_epoch * getattr(args, "ppo_epochs", 1)
    total = total if args.steps is None else args.steps
    say(f"train: {len(train)} examples, {units.sum()} counted by --batch-size; held out: {len(evaluated)}")
    say(f"{train.lengths.sum()} tokens and {steps_per_epoch} batches an epoch, {total} steps")
    sizes = {}
    for path in _models(args):
        settings = loading.settings(path, args.trust_remote_code)
        tensors, numbers = loading.check(path, args.weights)
        trust = args.trust_remote_code
        sizes[path] = loading.size(path, settings, tensors, numbers, trust, args.weights)
        trains = (model.in_training, trust, getattr(torch, args.dtype), device)
        packing.check(path, settings, args.max_length, *trains)
        loading.refuse_quantised(path, settings)
        text = settings.get_text_config()
        model.check_positions(path, text, args.max_length)
        if path == args.model:
            trained = sizes[path]
            if lora.wanted(args):
                trained = lora.insert(loading.skeleton(settings, trust), args)
            width = text.hidden_size
            if objective is not None and objective.advantages is not None:
                trained += 2 * (width + 1) * width + width + 1
            trained += width * bool(objective and objective.scores)
        if getattr(args, "method", "") != "csft" and len(tokenizer) > text.vocab_size:
            raise ValueError(f"{path}: tokenizer has {len(tokenizer)} ids, the embedding {text.vocab_size}")
        weights = f"{tensors} tensors of {numbers} numbers" if tensors else "weights random, or on the hub"
        say(f"{path}: {settings.model_type}, {sizes[path]} parameters, {text.vocab_size} ids, {weights}")
    said = rundir.room(args, 12 * trained)  # fp32 and the two moments of AdamW
    fsdp.finish()
    say(f"{said}; final/ up to {4 * sizes[args.model] / 1e9:.2g} GB")
