"""The weights of a model into its shards: every rank reads its own part of them, and none holds the whole.

    skeleton   transformers' model as a configuration describes it: buffers, and parameters without memory
    find       where in its files each of these lies
    fill       memory for a skeleton, sharded or not, and its weights

The rows come from the safetensors files themselves. Where transformers would make a parameter out of several
tensors, or of another shape (the experts of a mixture, say), rank 0 loads the model as transformers does and
sends each rank its part.
"""

import contextlib
import copy
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

import fsdp
import loading

Place = tuple[Path, str]  # a file and the name of a tensor in it


class Source(NamedTuple):
    """Where the weights of a skeleton come from."""

    path: str
    config: Any
    trust_remote_code: bool
    reward_model: bool
    vocabulary: int  # to which the embeddings have grown
    places: dict[str, Place | None] | None  # by parameter, None: zeros; None: only transformers can tell


def skeleton(path: str, config: Any, trust_remote_code: bool) -> nn.Module:
    """What loading.from_pretrained gives, in fp32, but for its parameters, which are on the meta device."""
    with loading.without_memory():
        lm = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    lm.tie_weights()
    # of a directory that is there nothing is asked of a hub
    told: dict[str, Any] = {"local_files_only": Path(path).exists()}
    try:
        lm.generation_config = GenerationConfig.from_pretrained(path, **told)
    except OSError:  # no generation_config.json: older models say it in the other
        told |= {"config_file_name": "config.json", "_from_model_config": True}
        lm.generation_config = GenerationConfig.from_pretrained(path, **told)
    return lm


def find(path: str, lm: nn.Module, reward_model: bool) -> dict[str, Place | None] | None:
    """Parameter of the skeleton -> where it lies, as transformers itself would take it; None where it is not
    one tensor of its shape. Unties the skeleton's head if the files hold another one than the embedding, and
    fills its persistent buffers."""
    state, found = lm.state_dict(), {}
    changes = get_model_conversion_mapping(lm)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    for file in loading.weight_files(path):
        with safe_open(file, "pt") as opened:
            for key in opened.keys():
                name, source = rename_source_key(key, renamings, converters, lm.base_model_prefix, state)
                if name not in state and key in state:
                    name, source = key, None
                if name not in state:
                    continue  # no parameter here: nobody misses it
                shape = opened.get_slice(key).get_shape()
                if source is not None or name in found or shape != list(state[name].shape):
                    return None
                found[name] = file, key
    _untie(lm, found)
    own = {parameter: name for name, parameter in lm.named_parameters()}  # a tied one has several names
    places: dict[str, Place | None] = {}
    for name, parameter in lm.named_parameters(remove_duplicate=False):
        if name in found:
            places.setdefault(own[parameter], found[name])
    if reward_model and loading.is_classifier(lm.config):  # without the head that it had as a language model
        for name in {"lm_head.weight", "lm_head.bias"} & (set(own.values()) - places.keys()):
            places[name] = None
    buffers = _persistent(lm)
    if set(own.values()) != places.keys() or not buffers.keys() <= found.keys():
        return None
    for name, buffer in buffers.items():
        buffer.copy_(_tensor(found[name]))
    return places


def _untie(lm: nn.Module, found: dict[str, Place]) -> None:
    """As transformers does: what is tied by the configuration, and twice in the files, is two parameters if
    the two differ."""
    for target, source in list(lm.all_tied_weights_keys.items()):
        if target in found and source in found and not _equal(found[target], found[source]):
            lm.all_tied_weights_keys.pop(target)
            module, _, name = target.rpartition(".")
            twin = nn.Parameter(torch.empty_like(lm.get_parameter(source)))
            setattr(lm.get_submodule(module), name, twin)
    loading.untie(lm)


def _tensor(place: Place) -> Tensor:
    with safe_open(place[0], "pt") as opened:
        return opened.get_tensor(place[1])


def _equal(one: Place, other: Place) -> bool:
    return torch.equal(_tensor(one).float(), _tensor(other).float())


def _persistent(lm: nn.Module) -> dict[str, Tensor]:
    """The buffers that a model is saved with."""
    return {name: buffer for name, buffer in lm.named_buffers() if name in lm.state_dict()}


def score(path: str) -> Tensor:
    """The head of a sequence classifier. Raises ValueError if it has none."""
    for file in loading.weight_files(path):
        with safe_open(file, "pt") as opened:
            if "score.weight" in opened.keys():
                return opened.get_tensor("score.weight")
    raise ValueError(f"{path}: a classifier without score.weight")


@torch.no_grad()
def fill(model: nn.Module, source: Source | None, device: torch.device) -> None:
    """Memory on `device` for the parameters of a LanguageModel that have none, and their weights: of this
    rank's rows of a sharded one, all ranks together, else of the whole. Raises ValueError, on every rank, for
    weights that are missing, misshapen or not finite. The parameters are new objects."""
    empty = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    if empty:
        _materialise(model, device)
    held = {_plain(name): p for name, p in model.named_parameters() if name in empty}
    if source is not None and source.places is not None:
        for name, shard in held.items():
            _read(shard, source.places[name], spread(source.config))
    elif source is not None:
        _receive(model, held, source)
    if source is not None:
        refuse_not_finite(source.path, model)


def _plain(name: str) -> str:
    """The name that transformers has for a parameter of a LanguageModel, with adapters or without."""
    return name.removeprefix("lm.").replace(".base_layer.", ".")


def _materialise(model: nn.Module, device: torch.device) -> None:
    made: dict[nn.Parameter, nn.Parameter] = {}  # of parameters, lest a tied one become two
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None and old.is_meta:
                if old not in made:
                    made[old] = nn.Parameter(torch.empty_like(old, device=device), old.requires_grad)
                module._parameters[name] = made[old]
    if isinstance(model, FSDPModule):
        model._apply(lambda tensor: tensor)  # changes nothing, and lets FSDP know


def _read(shard: Tensor, place: Place | None, spread: float) -> None:
    """A rank's part of one tensor, and of the rows by which it has grown since."""
    local, part = fsdp.local_piece(shard)
    if place is None or not local.numel():
        local.zero_()
        return
    # opened anew for each tensor: what was read of a mapped file counts as this process's memory
    with safe_open(place[0], "pt") as opened:
        if not shard.ndim:
            local.copy_(opened.get_tensor(place[1]))
            return
        given, (rows, *others) = opened.get_slice(place[1]), part
        old = given.get_shape()[0]
        if rows.start < old:
            local[: old - rows.start].copy_(given[(slice(rows.start, min(rows.stop, old)), *others)])
        if rows.stop > old:
            first = max(rows.start, old)
            whole = opened.get_tensor(place[1]).float()
            made = _new_rows(whole, first, rows.stop, spread)
            local[first - rows.start :].copy_(made[(slice(None), *others)])


def read(source: Source, name: str, like: Tensor) -> Tensor:
    """One parameter of an outline, whole and in fp32, from a source that has its place."""
    made = torch.empty(like.shape)
    _read(made, source.places[_plain(name)], spread(source.config))
    return made


def _receive(model: nn.Module, held: dict[str, Tensor], source: Source) -> None:
    """The weights that rank 0 loads whole, each rank its rows of them."""
    sharded = any(isinstance(shard, DTensor) for shard in held.values())
    rank, world_size = fsdp.ranks() if sharded else (0, 1)
    given, said = {}, ""
    if rank == 0:
        try:
            given = _whole(source, held)
        except ValueError as error:
            said = str(error)
    if said := fsdp.gathered(said)[0] if sharded else said:
        raise ValueError(said)
    for name, shard in held.items():
        local, part = fsdp.local_piece(shard)
        whole = given.pop(name, None)  # freed when sent
        for other in range(1, world_size):
            theirs, meet = fsdp.piece(shard, other), shard.device_mesh.device_type  # shards may be on the CPU
            if rank == 0 and whole[theirs].numel():
                dist.send(whole[theirs].to(meet, local.dtype).contiguous(), other)
            elif rank == other and local.numel():
                sent = torch.empty_like(local, device=meet)
                dist.recv(sent, 0)
                local.copy_(sent)
        if rank == 0:
            local.copy_(whole[part])
    for name, buffer in _persistent(model.lm).items():
        if rank == 0:
            buffer.copy_(given[name])
        if sharded:
            dist.broadcast(buffer, 0)


def _whole(source: Source, held: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters and persistent buffers as transformers loads them, in fp32. Raises ValueError."""
    with loading.one_line(source.path):
        lm = loading.from_pretrained(
            source.path, source.config, torch.float32, source.trust_remote_code, source.reward_model
        )
        grow(lm, source.vocabulary)
        given = dict(lm.named_parameters())
        if odd := sorted(given.keys() ^ held.keys()):
            raise ValueError(f"{len(odd)} weights are not as its configuration says (first: {odd[0]})")
        return given | _persistent(lm)


@contextlib.contextmanager
def standing_in(lm: nn.Module) -> Iterator[None]:
    """In a skeleton, one number on the CPU in place of each weight: peft puts adapters where the weight of
    their layer is, and on the meta device their start would be lost."""
    places = [
        (module._parameters, name, parameter)
        for module in lm.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.is_meta
    ]
    for place, name, parameter in places:
        number = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
        place[name] = nn.Parameter(number, requires_grad=False)
    try:
        yield
    finally:
        for place, name, parameter in places:
            place[name] = parameter


@torch.no_grad()
def grow(lm: nn.Module, vocabulary: int) -> None:
    """Embeddings of at least `vocabulary` rows. A new row is the mean of the old ones plus noise that its
    index alone decides; of a skeleton, `fill` writes them."""
    old = lm.get_input_embeddings().weight.shape[0]
    if vocabulary > old:
        lm.resize_token_embeddings(vocabulary, mean_resizing=False)
        for module in (lm.get_input_embeddings(), lm.get_output_embeddings()):
            for parameter in module.parameters():
                if not parameter.is_meta:  # the same twice where both are one matrix
                    parameter[old:] = _new_rows(parameter[:old], old, vocabulary, spread(lm.config))


def spread(config: Any) -> float:
    """The standard deviation of a fresh embedding."""
    return getattr(config.get_text_config(), "initializer_range", 0.02)


def _new_rows(old: Tensor, first: int, end: int, spread: float) -> Tensor:
    """The rows from `first` to `end` of a grown embedding or head (V, D), or bias (V,), of its `old` ones."""
    made = old.mean(0).expand(end - first, *old.shape[1:]).clone()
    if old.ndim > 1:
        for row in range(first, end):
            noise = torch.randn(old.shape[1], generator=torch.Generator().manual_seed(row))
            made[row - first] += spread * noise
    return made


def refuse_not_finite(where: str, model: nn.Module) -> None:
    """Raises ValueError, on every rank that has part of them, for weights that are not finite."""
    if bad := fsdp.not_finite(model):
        first = _plain(bad[0])
        raise ValueError(f"{where}: {len(bad)} weights hold numbers that are not finite (first: {first})")
