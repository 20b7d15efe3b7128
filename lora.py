"""Adapters (LoRA): peft puts them into the linear layers of the body, which stays frozen, and nothing else
of the model notices.

    y = W x + (alpha / r) B A dropout(x)    W frozen, A (r, in) random, B (out, r) at first 0

The frozen weights are kept in the dtype that the body computes in, without an fp32 copy; the adapters, and
scalar heads, are trained in fp32. The head is frozen too, so vocab.py computes no gradient of it, and it is
the reference's as well: the reference is the policy with its adapters off, or with a frozen copy of those it
started from (`Reference`), and no second model is in memory. Checkpoints hold what is trained alone; an
export adds the adapters to the base as it lies on disk, in fp32.

Left out: adapters on the head, on the embeddings or on the fused experts of a mixture, DoRA, trained biases,
quantised bases, a reference that is updated.
"""

import argparse
import importlib.util
import itertools
import json
import warnings
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import config
import files
import fsdp
import model
import shards
import vocab

TRAINED, START = "default", "start"  # peft's names of the adapters: of those trained, and their frozen start
MISSING = "adapters need peft (pip install peft)"
FILES = ("adapter_config.json", "adapter_model.safetensors")
# What an adapter's settings may say: peft injects accordingly, and a merge follows its layers.
SETTINGS = (
    "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out",
)  # fmt: skip
# What may be there too: it says nothing of how they compute, or is looked at elsewhere.
BESIDE = (
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "lora_dropout", "modules_to_save",
)  # fmt: skip


# ---- flags
# -----------------------------------------------------------------------------------------------------------


def add_flags(made: argparse.ArgumentParser) -> None:
    """The flags of adapters, for a training script."""
    group = made.add_argument_group("adapters (LoRA)")
    add = group.add_argument
    # fmt: off
    add("--lora-rank", type=config.count_or_zero, default=0, help="of each adapter; 0: no adapters")
    add("--lora-alpha", type=config.positive, default=None, help="scale times rank; None: twice --lora-rank")
    add("--lora-dropout", type=config.not_negative, default=None, help="of their input; None: 0")
    add("--lora-targets", type=config.text, default=None, help="names a,b; None: all-linear")
    add("--lora-from", type=config.text, default=None, help="a directory of adapters to go on with")
    # fmt: on


def resolve(args: argparse.Namespace) -> None:
    """Put the defaults of adapters into args, None everywhere without them; fail in one line for a flag that
    does not go with the others."""
    reference = getattr(args, "reference", None)
    for flag, path in (("--model", args.model), ("--reference", reference)):
        if path and (Path(path) / FILES[0]).exists():
            config.fail(f"{flag} {path} holds adapters", right="--model its base, --lora-from the adapters")
    args.lora_rank = args.lora_rank or None
    names = ("lora_alpha", "lora_dropout", "lora_targets")
    given = [name for name in names if getattr(args, name) is not None]
    if args.lora_from:
        fixed = [name for name in ("lora_rank", *given) if getattr(args, name) and name != "lora_dropout"]
        if fixed:
            config.fail(f"--lora-from takes no --{fixed[0].replace('_', '-')}: it is that of the adapters")
    elif not args.lora_rank:
        if given:
            config.fail(f"--{given[0].replace('_', '-')} needs --lora-rank")
        if reference in ("base", "start") and not Path(reference).exists():
            config.fail(f"--reference {reference} needs --lora-rank or --lora-from")
        return
    if importlib.util.find_spec("peft") is None:
        config.fail(MISSING)
    if args.weights == "random":
        config.fail("--lora-rank needs --weights pretrained", right="an adapter without its base is nothing")
    if getattr(args, "sync_reference_every", 0):
        config.fail("--sync-reference-every goes not with --lora-rank: its reference is the frozen base")
    args.lora_dropout = args.lora_dropout or 0.0
    if args.lora_dropout >= 1:
        config.fail("--lora-dropout", f"must be less than 1, got {args.lora_dropout}")
    if args.lora_rank:
        args.lora_alpha = args.lora_alpha or 2.0 * args.lora_rank
        args.lora_targets = args.lora_targets or "all-linear"


def wanted(args: argparse.Namespace) -> bool:
    """Does a run train adapters?"""
    return bool(args.lora_rank or args.lora_from)


def shared(args: argparse.Namespace) -> tuple[str, ...] | None:
    """The adapters that turn the policy into the reference: none of them for "base", their copy for "start".
    None if the reference is a model of its own."""
    if not wanted(args) or args.reference not in (None, "base", "start", args.model):
        return None
    begins = args.lora_from and args.reference in (None, "start")
    return (START,) if begins else ()


def equal_at_start(args: argparse.Namespace) -> bool:
    """Do policy and reference compute the same at step 0, to the bit?"""
    adapters = shared(args)
    if adapters is None:
        return not wanted(args) and args.reference in (None, args.model)
    return adapters == (START,) * bool(args.lora_from) and not (adapters and args.lora_dropout)


def check_rows(args: argparse.Namespace, new: int) -> None:
    """Raises ValueError where adapters would leave new rows of the embedding, `new` in number, untrained."""
    if new and wanted(args):
        raise ValueError(
            f"--method csft adds {new} control tokens, whose embeddings adapters leave untrained (train a "
            "csft model without --lora-rank first)"
        )


# ---- in
# -----------------------------------------------------------------------------------------------------------


class Reference(NamedTuple):
    """The policy with other adapters on, in place of a second LanguageModel: called, and asked for its head,
    like one, and without gradients."""

    policy: model.LanguageModel
    adapters: tuple[str, ...]  # those on; none: the base

    def __call__(self, *inputs: Any) -> Tensor:
        found = layers(self.policy)
        for layer in found:
            layer._active_adapter = list(self.adapters)
        try:
            return self.policy(*inputs)  # (N, D)
        finally:
            for layer in found:
                layer._active_adapter = [TRAINED]

    @property
    def head(self) -> vocab.Head:
        return self.policy.head


class Dropout(nn.Module):
    """Of the input of an adapter, where gradients are recorded and nowhere else: what is evaluated, sampled
    or frozen before a step is the whole model."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.p, training=torch.is_grad_enabled())


def add(
    policy: model.LanguageModel, args: argparse.Namespace, say: Callable = print, copy: bool = False
) -> None:
    """Freeze a model and give it adapters, in place, the same on all ranks, before it is sharded; scalar
    heads it has go on training. With `copy` they stay beside it as they are now, frozen, for a `Reference`.
    Says what is trained.

    Raises ValueError for targets that are not linear layers of the body, or an adapter directory that is not
    one, was made on another base, or does not fit.
    """
    lm = policy.lm
    kept = None
    if args.lora_from:
        made, kept = _read(args)
    else:
        made = _settings(lm, args)
    _inject(lm, made, args.lora_dropout, args.seed)
    if kept is not None:
        _fill(policy, kept, args.lora_from)
    if copy:
        _copy_start(lm, made)
    policy.requires_grad_(False)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(".lora_" in name and f".{TRAINED}." in name)
    for head in policy.fp32_modules:
        head.requires_grad_(True)
    torch.manual_seed(args.seed + 1 + fsdp.ranks()[0])  # every rank drops out others
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    total = sum(p.numel() for p in policy.parameters())
    kinds = sorted({name.rpartition(".")[2] for name, _ in _named_layers(lm)})
    say(f"adapters: rank {made.r} on {len(layers(policy))} layers ({', '.join(kinds)}), "
        f"{trained:,} of {total:,} parameters are trained")  # fmt: skip


def insert(lm: nn.Module, args: argparse.Namespace) -> int:
    """The adapters of the flags into a transformers model on the meta device, trained and nothing else of it:
    shapes for a plan. Returns how many numbers they hold. Raises ValueError as `add` does."""
    made = _read(args)[0] if args.lora_from else _settings(lm, args)
    with torch.device("meta"):
        _inject(lm, made, 0.0, 0)
    for name, parameter in lm.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    return sum(parameter.numel() for parameter in lm.parameters() if parameter.requires_grad)


def layers(part: nn.Module) -> list[Any]:
    """The layers of a model that have adapters, as peft's modules."""
    return [layer for _, layer in _named_layers(part)]


def _named_layers(part: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in part.named_modules() if hasattr(module, "lora_A")]


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ValueError(MISSING) from None
    return peft


def _settings(lm: nn.Module, args: argparse.Namespace) -> Any:
    """peft's LoraConfig of the flags."""
    targets, transposed = _targets(lm, args.lora_targets)
    return _peft().LoraConfig(
        r=args.lora_rank,
        lora_alpha=int(args.lora_alpha) if args.lora_alpha.is_integer() else args.lora_alpha,
        target_modules=targets,
        fan_in_fan_out=transposed,
        base_model_name_or_path=args.model,
    )


def _targets(lm: nn.Module, chosen: str) -> tuple[list[str], bool]:
    """The ends of the names of the layers to adapt, as peft takes them, and whether they hold their weights
    transposed (GPT-2). Raises ValueError for one that names nothing, or something else too."""
    body = {id(module) for module in lm.base_model.modules()}
    named = dict(lm.named_modules())
    linear = {n for n, m in named.items() if id(m) in body and isinstance(m, (nn.Linear, Conv1D))}
    ends = sorted({name.rpartition(".")[2] for name in linear})
    chosen_ends = ends if chosen == "all-linear" else [part.strip() for part in chosen.split(",")]
    found = {end: {n for n in named if n == end or n.endswith(f".{end}")} for end in chosen_ends}
    for end, names in found.items():
        if not names:
            raise ValueError(f"--lora-targets {end}: no module of that name (there are {', '.join(ends)})")
        if others := sorted(names - linear):
            raise ValueError(
                f"--lora-targets {end}: {others[0]} is no linear layer of the body, where alone adapters go"
            )
    if not set().union(*found.values()):
        raise ValueError(f"{type(lm).__name__} has no linear layers for adapters")
    kinds = {isinstance(named[name], Conv1D) for names in found.values() for name in names}
    return chosen_ends, kinds == {True}


def _inject(lm: nn.Module, made: Any, dropout: float, seed: int, name: str = TRAINED) -> None:
    """Adapters into a transformers model, fp32. Raises ValueError for targets outside the body."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, of what is refused below
        try:
            with shards.standing_in(lm):
                _peft().inject_adapter_in_model(made, lm, adapter_name=name)
        except (ValueError, RuntimeError, TypeError) as error:
            raise ValueError(f"peft refuses these adapters: {str(error).splitlines()[0]}") from error
    body = {id(module) for module in lm.base_model.modules()}
    for place, layer in _named_layers(lm):
        if id(layer) not in body or not isinstance(layer.base_layer, (nn.Linear, Conv1D)):
            raise ValueError(f"adapters on {place}: only linear layers of the body may have them")
        layer.lora_dropout[name] = Dropout(dropout)
    for place, parameter in lm.named_parameters():
        if ".lora_" in place:
            parameter.data = parameter.data.float()


@torch.no_grad()
def _copy_start(lm: nn.Module, made: Any) -> None:
    _inject(lm, made, 0.0, 0, START)
    for layer in layers(lm):
        for part in (layer.lora_A, layer.lora_B):
            part[START].weight.copy_(part[TRAINED].weight)
        layer._active_adapter = [TRAINED]


def _read(args: argparse.Namespace) -> tuple[Any, dict[str, Tensor]]:
    """Settings and tensors of --lora-from, the tensors named as those of a LanguageModel."""
    folder = Path(args.lora_from)
    for name in FILES:
        if not (folder / name).is_file():
            raise ValueError(f"--lora-from {folder}: no {name}")
    try:
        told = files.read_json(folder / FILES[0])
        tensors = load_file(folder / FILES[1])
        kept = {key: told[key] for key in SETTINGS if key in told}
        made = _peft().LoraConfig(**kept, base_model_name_or_path=args.model)
    except (TypeError, KeyError, ValueError, SafetensorError, OSError) as error:
        raise ValueError(f"--lora-from {folder}: {str(error).splitlines()[0]}") from error
    plain = _peft().LoraConfig().to_dict() | {"peft_type": "LORA"}
    free = {"init_lora_weights": "gaussian"}  # others of it change the base
    other = [
        key for key, value in told.items()
        if key not in SETTINGS + BESIDE and value not in (plain.get(key), free.get(key), None, False, {}, [])
    ]  # fmt: skip
    other += ["modules_to_save"] * (not set(told.get("modules_to_save") or ()) <= {"score", "classifier"})
    if other:
        said = f"{other[0]} = {json.dumps(told[other[0]])[:40]}"
        raise ValueError(f"--lora-from {folder}: {FILES[0]} sets {said}, which is not supported")
    base = told.get("base_model_name_or_path")
    if base and Path(base).exists() and model.fingerprint(base) != model.fingerprint(args.model):
        raise ValueError(f"--lora-from {folder} was made on {base}, which is another model than --model")
    return made, {_inside(name): value for name, value in tensors.items()}


def _inside(name: str) -> str:
    """A tensor of peft's file -> its parameter of a LanguageModel."""
    name = name.removeprefix("base_model.model.")
    for part in ("lora_A", "lora_B"):
        name = name.replace(f".{part}.weight", f".{part}.{TRAINED}.weight")
    return f"lm.{name}"


@torch.no_grad()
def _fill(policy: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Adapters, and a score where there is one, from tensors by name. Raises ValueError unless all fit."""
    places = {n: p for n, p in policy.named_parameters() if ".lora_" in n or n == "lm.score.weight"}
    odd = sorted(
        name for name in places.keys() | tensors.keys()
        if getattr(places.get(name), "shape", 0) != getattr(tensors.get(name), "shape", 1)
        and not (name == "lm.score.weight" and name not in tensors)  # of a model without: it starts at 0
    )  # fmt: skip
    if odd:
        said = "missing or of another shape" if odd[0] in places else "of no parameter here"
        raise ValueError(f"{where}: {len(odd)} tensors are {said} (first: {odd[0].removeprefix('lm.')})")
    for name, value in tensors.items():
        places[name].copy_(value)


# ---- out
# -----------------------------------------------------------------------------------------------------------


def record(policy: model.LanguageModel, args: argparse.Namespace) -> dict[str, Any]:
    """What a checkpoint's record says of a run's models: their digests, and the settings of adapters, from
    which an export rebuilds them."""
    plain = argparse.Namespace(**vars(args))
    alike = shared(args) if "reference" in vars(args) else None
    if alike is not None:
        del plain.reference
    found: dict[str, Any] = model.digests(plain)
    if alike is not None:
        found["reference"] = "start" if alike else "base"  # of --model and --lora-from, which have digests
    if args.lora_from:
        found["lora_from_digest"] = files.fingerprint(Path(args.lora_from) / name for name in FILES)
    if made := settings(policy):
        found["adapter"] = {key: _plain(getattr(made, key)) for key in SETTINGS}
    return found


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return sorted(value) if isinstance(value, (set, tuple)) else value


def settings(policy: model.LanguageModel) -> Any:
    """peft's LoraConfig of a model's adapters; None if it has none."""
    return getattr(policy.lm, "peft_config", {}).get(TRAINED)


def rebuilt(made: dict[str, Any]) -> Any:
    """The LoraConfig of a checkpoint's record. Raises ValueError if its base is not what it was."""
    if model.fingerprint(made["model"]) != made["model_digest"]:
        raise ValueError(f"its adapters were trained on another model than {made['model']} is now")
    return _peft().LoraConfig(**made["adapter"], base_model_name_or_path=made["model"])


@torch.no_grad()
def merged(
    made: Any, trained: dict[str, Tensor], trust_remote_code: bool = False
) -> tuple[nn.Module, dict[str, Tensor], Iterator[tuple[str, Tensor]]]:
    """The base as it lies on disk, in fp32, with trained adapters added to it: transformers' model, for the
    names; the state dict of a LanguageModel, for the shapes; its tensors, read and merged one by one. Scalar
    heads are as they are in `trained`."""
    base = made.base_model_name_or_path
    scores = "lm.score.weight" in trained
    trust = {"trust_remote_code": trust_remote_code}
    whole = model.outline(base, torch.float32, 1, reward_model=scores, **trust)
    _inject(whole.lm, made, 0.0, 0)
    _fill(whole, {name: value for name, value in trained.items() if ".lora_" in name}, base)
    if whole.source.places is None:  # only transformers can tell, and reads all
        shards.fill(whole, whole.source, torch.device("cpu"))
    own = {name for name, _ in (*whole.named_parameters(), *whole.named_buffers())}  # a tied weight once
    state = {n: v for n, v in whole.state_dict().items() if n in own and ".lora_" not in n}
    adapted = {f"{name}.base_layer.weight": layer for name, layer in _named_layers(whole)}
    weights = ((n.replace(".base_layer.", "."), _sum(whole, n, v, adapted.get(n))) for n, v in state.items())
    heads = {name: value for name, value in trained.items() if ".lora_" not in name}
    state = {name.replace(".base_layer.", "."): value for name, value in state.items()} | heads
    return whole.lm, state, itertools.chain(weights, heads.items())


@torch.no_grad()
def _sum(whole: model.LanguageModel, name: str, value: Tensor, layer: Any) -> Tensor:
    """A weight of the base, and what its adapter adds to it."""
    value = shards.read(whole.source, name, value) if value.is_meta else value
    return value if layer is None else value.add_(layer.get_delta_weight(TRAINED))


def as_peft(made: Any, trained: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """Settings and tensors as peft stores them: what PeftModel.from_pretrained reads."""
    scores = "lm.score.weight" in trained
    kept = {key: _plain(getattr(made, key)) for key in SETTINGS}
    told = _peft().LoraConfig(
        **kept,
        base_model_name_or_path=made.base_model_name_or_path,
        inference_mode=True,
        task_type="SEQ_CLS" if scores else "CAUSAL_LM",
        modules_to_save=["score"] if scores else None,
    )
    told.target_modules = kept["target_modules"]  # in their order: peft makes a set of a list
    names = {name: name.replace(f".{TRAINED}.", ".") for name in trained if name.startswith("lm.")}
    return told, {f"base_model.model.{new.removeprefix('lm.')}": trained[old] for old, new in names.items()}
