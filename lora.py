"""Adapters (LoRA): peft puts them into the linear layers of the body, which stays frozen, and nothing else
of the model notices. The body of a composite model is its text.

    y = W x + (alpha / r) B A dropout(x)    W frozen, A (r, in) random, B (out, r) at first 0

The frozen weights are kept in the dtype that the body computes in, without an fp32 copy; the adapters, and
scalar heads, are trained in fp32. The head is frozen too, so vocab.py computes no gradient of it, and it is
the reference's as well: the reference is the policy with its adapters off, or with a frozen copy of those it
started from (`Reference`), and no second model is in memory. Checkpoints hold what is trained alone; an
export adds the adapters to the base as it lies on disk, in fp32.

The rows of tokens that a run adds (sft.py --method csft) are trained whole: added.py.

Left out: adapters on the head, on the embeddings or on the fused experts of a mixture, DoRA, trained biases,
quantised bases, a reference that is updated.
"""

import argparse
import importlib.util
import itertools
import warnings
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import added
import config
import files
import fsdp
import loading
import model
import peft_files
import shards
import vocab

TRAINED, START = peft_files.TRAINED, "start"  # peft's names: of the adapters, of their frozen start


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
        if path and (Path(path) / peft_files.FILES[0]).exists():
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
        config.fail(peft_files.MISSING)
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
    policy: model.LanguageModel,
    args: argparse.Namespace,
    say: Callable = print,
    copy: bool = False,
    tokens: range = range(0),
) -> None:
    """Freeze a model and give it adapters, in place, the same on all ranks, before it is sharded; scalar
    heads it has go on training, and the rows of the `tokens` that were added. With `copy` the adapters stay
    beside it as they are now, frozen, for a `Reference`. Says what is trained.

    Raises ValueError for targets that are not linear layers of the body, an adapter directory that is not
    one, was made on another base, or does not fit, or added tokens that have more rows than it can hold.
    """
    lm = policy.lm
    if tokens and getattr(lm.config.get_text_config(), "hidden_size_per_layer_input", None):
        right = "train all weights, or give a base that has these tokens"
        what = "added tokens have rows in an embedding for its layers too, which adapter/ does not hold"
        raise ValueError(f"{type(lm).__name__}: {what} ({right})")
    kept = None
    if args.lora_from:
        made, kept = peft_files.read(args)
    else:
        made = _settings(lm, args)
    _inject(lm, made, args.lora_dropout, args.seed)
    told = made.trainable_token_indices
    made.trainable_token_indices = added.add(lm, tokens, fresh=told is None) if tokens else None
    if told not in (None, made.trainable_token_indices):
        raise ValueError(f"--lora-from {args.lora_from}: has rows of other added tokens than this run")
    if kept is not None:
        fresh = {n: p for n, p in policy.named_parameters() if added.is_row(n) and told is None}
        _fill(policy, fresh | kept, args.lora_from)
    if copy:
        _copy_start(lm, made)
    policy.requires_grad_(False)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(".lora_" in name and f".{TRAINED}." in name or added.is_row(name))
    for head in policy.fp32_modules:
        head.requires_grad_(True)
    torch.manual_seed(args.seed + 1 + fsdp.ranks()[0])  # every rank drops out others
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    total = sum(p.numel() for p in policy.parameters())
    kinds = sorted({name.rpartition(".")[2] for name, _ in _named_layers(lm)})
    say(f"adapters: rank {made.r} on {len(layers(policy))} layers ({', '.join(kinds)}), "
        f"{trained:,} of {total:,} parameters are trained")  # fmt: skip
    if tokens:
        say(f"adapters: the rows of {len(tokens)} added tokens are trained too; adapter/ goes onto a base "
            f"after base.resize_token_embeddings({len(policy.head.weight)})")  # fmt: skip


def insert(lm: nn.Module, args: argparse.Namespace) -> int:
    """The adapters of the flags into a transformers model on the meta device, trained and nothing else of it:
    shapes for a plan. Returns how many numbers they hold. Raises ValueError as `add` does."""
    made = peft_files.read(args)[0] if args.lora_from else _settings(lm, args)
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


def _settings(lm: nn.Module, args: argparse.Namespace) -> Any:
    """peft's LoraConfig of the flags."""
    targets, excluded, transposed = _targets(lm, args.lora_targets)
    return peft_files.peft().LoraConfig(
        r=args.lora_rank,
        lora_alpha=int(args.lora_alpha) if args.lora_alpha.is_integer() else args.lora_alpha,
        target_modules=targets,
        exclude_modules=excluded or None,
        fan_in_fan_out=transposed,
        base_model_name_or_path=args.model,
    )


def _targets(lm: nn.Module, chosen: str) -> tuple[list[str], list[str], bool]:
    """The ends of the names of the layers to adapt, as peft takes them, the names outside the body with such
    ends (of a composite model's tower), and whether the layers hold their weights transposed (GPT-2). Raises
    ValueError for an end that names nothing, or something else of the body too."""
    body = set(lm.base_model.modules()) & set(lm.get_decoder().modules())
    named = dict(lm.named_modules())
    inside = {name for name, module in named.items() if module in body}
    linear = {name for name in inside if _is_linear(named[name])}
    ends = sorted({name.rpartition(".")[2] for name in linear})
    every = chosen == "all-linear"
    chosen_ends = peft_files.unfused(lm, ends) if every else [part.strip() for part in chosen.split(",")]
    found = {end: {n for n in named if n == end or n.endswith(f".{end}")} for end in chosen_ends}
    for end, names in found.items():
        if not names:
            raise ValueError(f"--lora-targets {end}: no module of that name (there are {', '.join(ends)})")
        if others := sorted(names & inside - linear) or sorted(names - linear) * (not names & linear):
            raise ValueError(
                f"--lora-targets {end}: {others[0]} is no linear layer of the body, where alone adapters go"
            )
    every_name = set().union(*found.values())
    if not every_name:
        raise ValueError(f"{type(lm).__name__} has no linear layers for adapters")
    kinds = {isinstance(named[name], Conv1D) for name in every_name & linear}
    return chosen_ends, sorted(every_name - linear), kinds == {True}


def _is_linear(module: nn.Module) -> bool:
    """Does it compute y = W x + b, and nothing else? Some routers are subclasses that return three things."""
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


def _inject(lm: nn.Module, made: Any, dropout: float, seed: int, name: str = TRAINED) -> None:
    """Adapters into a transformers model, fp32; rows of added tokens are added.py's affair. Raises ValueError
    for targets outside the body."""
    torch.manual_seed(seed)
    tokens, made.trainable_token_indices = made.trainable_token_indices, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, of what is refused below
        try:
            with shards.standing_in(lm):
                peft_files.peft().inject_adapter_in_model(made, lm, adapter_name=name)
        except (ValueError, RuntimeError, TypeError) as error:
            raise ValueError(f"peft refuses these adapters: {str(error).splitlines()[0]}") from error
    made.trainable_token_indices = tokens
    body = {id(module) for module in lm.base_model.modules()}
    for place, layer in _named_layers(lm):
        if id(layer) not in body or not _is_linear(layer.base_layer):
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


@torch.no_grad()
def _fill(policy: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Adapters, and a score and rows where there are some, from tensors by name. Raises ValueError unless all
    fit."""
    places = {n: p for n, p in policy.named_parameters() if _adapts(n) or n == "lm.score.weight"}
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
        given = (Path(args.lora_from) / name for name in peft_files.FILES)
        found["lora_from_digest"] = files.fingerprint(given)
    if made := settings(policy):
        found["adapter"] = peft_files.recorded(made)
    return found


def settings(policy: model.LanguageModel) -> Any:
    """peft's LoraConfig of a model's adapters; None if it has none."""
    return getattr(policy.lm, "peft_config", {}).get(TRAINED)




@torch.no_grad()
def merged(
    made: Any, trained: dict[str, Tensor], trust_remote_code: bool = False
) -> tuple[nn.Module, dict[str, Tensor], Iterator[tuple[str, Tensor]]]:
    """The base as it lies on disk, in fp32, with trained adapters added to it: transformers' model, for the
    names; the state dict of a LanguageModel, for the shapes; its tensors, read and merged one by one. Scalar
    heads are as they are in `trained`."""
    base = made.base_model_name_or_path
    scores = "lm.score.weight" in trained
    end = loading.end_of_rows(made.trainable_token_indices)
    trust = {"trust_remote_code": trust_remote_code}
    whole = model.outline(base, torch.float32, 1, vocabulary=end, reward_model=scores, **trust)
    _inject(whole.lm, made, 0.0, 0)
    if end:
        added.add(whole.lm, range(end - len(next(iter(made.trainable_token_indices.values()))), end), False)
    _fill(whole, {name: value for name, value in trained.items() if _adapts(name)}, base)
    if whole.source.places is None:  # only transformers can tell, and reads all
        shards.fill(whole, whole.source, torch.device("cpu"))
    state = {name: value for name, value in loading.stored(whole).items() if not _adapts(name)}
    adapted = {f"{name}.base_layer.weight": layer for name, layer in _named_layers(whole)}
    adapted |= {f"{n}.weight": module for n, module in whole.named_modules() if hasattr(module, added.NAME)}
    weights = ((n.replace(".base_layer.", "."), _sum(whole, n, v, adapted.get(n))) for n, v in state.items())
    heads = {name: value for name, value in trained.items() if not _adapts(name)}
    state = {name.replace(".base_layer.", "."): value for name, value in state.items()} | heads
    return whole.lm, state, itertools.chain(weights, heads.items())


@torch.no_grad()
def _sum(whole: model.LanguageModel, name: str, value: Tensor, layer: Any) -> Tensor:
    """A weight of the base, and what its adapter adds to it, or its added tokens' rows."""
    value = shards.read(whole.source, name, value) if value.is_meta else value
    if hasattr(layer, added.NAME):
        added.merge(layer, value)
    return value.add_(layer.get_delta_weight(TRAINED)) if hasattr(layer, "lora_A") else value


def _adapts(name: str) -> bool:
    """Is this parameter of adapters, or a row of an added token?"""
    return ".lora_" in name or added.is_row(name)
