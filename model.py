"""A causal language model as two parts: a body that turns packed ids into hidden states, and a head for
vocab.py.

Works with every transformers architecture that uses its attention interface (Llama, Mistral, Qwen, Gemma,
Phi-3, GPT-NeoX/Pythia, GPT-2, OPT, OLMo, ...); `load` refuses one for which packing is not exact, as
packing.py finds. Of a composite model (Gemma 3 with its images) the text is trained. Left out:
encoder-decoders, images, GPT-Neo and others with attention code of their own.
"""

import argparse
import copy
import functools
import itertools
from pathlib import Path
from typing import Any, Callable, Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import AttentionInterface, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import cached_file

import added
import attention
import files
import fsdp
import loading
import packing
import shards
import vocab

# Operations that take most of a block's time: products with weights, and CUDA's attention. Not bmm, which on
# a CPU makes attention's scores, square in the length of a segment and written to after it.
PRODUCTS = {"aten::mm", "aten::addmm", "aten::_grouped_mm", "torch_attn::_varlen_attn"}
PRODUCTS |= {"flash_attn::_flash_attn_varlen_forward"}


class LanguageModel(nn.Module):
    """transformers' model `lm` with one entry point, so that FSDP gathers and frees around it."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm
        self.value_head = None  # (N, D) -> (N, 1), see add_value_head
        self.source: shards.Source | None = None  # of its weights, see fill

    def forward(self, ids: Tensor, positions: Tensor, layout: attention.Layout, predict: Tensor) -> Tensor:
        """ids, positions (1, T), predict (N,) -> the last hidden states at `predict` (N, D)."""
        body, sealed = self.lm.base_model, attention.Sealed(layout)
        states = body(input_ids=ids, position_ids=positions, layout=sealed, use_cache=False).last_hidden_state
        return states[0].index_select(0, predict)

    def generate(self, answers: Callable[[nn.Module], Any]) -> Any:
        """What `answers` makes of transformers' model, on its own attention with a cache. An entry point like
        `forward`, so that FSDP gathers and frees around it; reshard after it."""
        self.lm.eval()
        self.lm.set_attn_implementation("eager")  # every architecture has that, soft-caps included
        try:
            with torch.compiler.set_stance("force_eager"):
                return answers(self.lm)
        finally:
            self.lm.set_attn_implementation(attention.NAME)
            self.lm.train()

    @property
    def head(self) -> vocab.Head:
        """The head's parameters. Under FSDP only between a forward of this model and its backward: whole
        tensors."""
        linear = self.lm.get_output_embeddings()
        config = self.lm.config.get_text_config()
        scale = (getattr(config, "logit_scale", None) or 1.0) / (
            getattr(config, "logits_scaling", None) or 1.0
        )
        softcap = getattr(config, "final_logit_softcapping", None)
        return vocab.Head(linear.weight, linear.bias, softcap, scale, *added.of_head(self.lm))

    @property
    def fp32_modules(self) -> list[nn.Module]:
        """The scalar heads: they compute in fp32 whatever the body does."""
        return [head for head in (self.value_head, getattr(self.lm, "score", None)) if head is not None]

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer layers: the units of sharding and of activation checkpointing."""
        return [module for module in self.lm.modules() if isinstance(module, GradientCheckpointingLayer)]


def load(path: str, *options: Any, **named: Any) -> LanguageModel:
    """A LanguageModel from a local directory or a hub name, whole and on the CPU; its flags are those of
    `outline`. Raises ValueError as that does, and for weights that are missing or not finite."""
    model = outline(path, *options, **named)
    with loading.one_line(path):
        fill(model, torch.device("cpu"))
        return model


def outline(
    path: str,
    dtype: torch.dtype,
    max_length: int,
    weights: str = "pretrained",
    seed: int = 0,
    trust_remote_code: bool = False,
    compute: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    vocabulary: int = 0,
    reward_model: bool = False,
    allowed: Callable[[], None] = lambda: None,
) -> LanguageModel:
    """A LanguageModel in training mode with every dropout at 0, its pretrained weights still on disk: the
    parameters have shapes, `dtype`, and no memory until `fill`. Heads and adapters may be added, and it may
    be sharded, in between.

    `weights` "random" starts from the directory's config.json alone, with transformers' own initialisation
    under `seed`; they are there at once, the whole of them on every rank, so that a seed gives one model
    whatever the number of ranks. Embeddings grow to `vocabulary` rows where they have fewer and are never
    shrunk; a new row is the mean of the old ones plus noise that its index alone decides, so that equal
    models stay equal and no two new tokens start as one vector. With `reward_model` a sequence classifier is
    taken too, as the language model whose head it has lost. `allowed` is called once the directory is known
    to be a model, before any memory is taken. Raises ValueError: no such model, pickle weights, quantised
    ones, positions shorter than `max_length`, or an architecture for which packed attention is not exact,
    which packing.py asks in fp32 and in `compute` on `device`, those of the training.
    """
    with loading.one_line(path):
        found = loading.check(path, weights)
        config = loading.settings(path, trust_remote_code)
        numbers = loading.size(path, config, *found, trust_remote_code, weights)
        packing.check(path, config, max_length, in_training, trust_remote_code, compute, device)
        loading.refuse_quantised(path, config)
    allowed()
    with loading.one_line(path):
        source = None
        if weights == "random":
            torch.manual_seed(seed)
            trust = {"trust_remote_code": trust_remote_code}
            lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **trust)
            shards.refuse_not_finite(path, lm)
        else:
            loading.refuse_classifier(config, reward_model)
            lm = shards.skeleton(path, config, trust_remote_code)
            places = shards.find(path, lm, reward_model)
            if places is None:  # rank 0 will load it whole
                loading.refuse_larger(path, numbers)
            source = shards.Source(path, config, trust_remote_code, reward_model, vocabulary, places)
        loading.refuse_odd_stops(path, lm)
        shards.grow(lm, vocabulary)
        check_positions(path, lm.config.get_text_config(), max_length)
        model = in_training(lm)
        model.source = source
        lm.set_attn_implementation(attention.NAME)
        return _cast(model, dtype)


def fill(model: LanguageModel, device: torch.device, like: LanguageModel | None = None) -> None:
    """Give an outline its weights, in place: of a sharded one every rank reads its own rows, all ranks
    together. A copy takes them from the model that it is `like`, sharded and filled before. The parameters
    are new objects. Raises ValueError, on every rank, for weights that `load` refuses."""
    if like is None:
        shards.fill(model, model.source, device)
        added.start(model.lm)
        return
    shards.fill(model, None, device)
    fsdp.copy_parameters(like, model)
    for old, new in zip(like.lm.buffers(), model.lm.buffers(), strict=True):
        new.copy_(old)


def untrained(
    made: dict[str, Any], names: Sequence[str], reward_model: bool = False, trust_remote_code: bool = False
) -> dict[str, Tensor]:
    """Parameters and buffers that a run does not train and its checkpoints do not hold, by their names in a
    LanguageModel, whole and in fp32, as its record says it began. Raises ValueError if its model is another
    now."""
    if not names:
        return {}
    path, weights = made["model"], made.get("weights", "pretrained")
    options = (weights, made.get("seed", 0), trust_remote_code)
    found = outline(path, torch.float32, 1, *options, reward_model=reward_model)
    if made.get("model_digest") not in (None, fingerprint(path, weights)):
        raise ValueError(f"it was trained from another model than {path} is now")
    if found.source is not None and found.source.places is None:  # only transformers can tell, and reads all
        shards.fill(found, found.source, torch.device("cpu"))
    held = loading.stored(found)
    return {n: shards.read(found.source, n, held[n]) if held[n].is_meta else held[n] for n in names}


def place(
    model: LanguageModel,
    dtype: torch.dtype,
    device: torch.device,
    like: LanguageModel | None = None,
    replicate: int = 1,
    offload: bool = False,
) -> None:
    """Shard an outline over all ranks as fsdp.shard does, to compute in `dtype`, and `fill` it."""
    fsdp.shard(model, model.blocks, dtype, device, model.fp32_modules, replicate, offload)
    fill(model, torch.device("cpu") if offload else device, like)


def fingerprint(path: str, weights: str = "pretrained") -> str:
    """A hash of the contents of a model, wherever it lies: its config.json and, of "pretrained" weights,
    samples of each file (files.fingerprint)."""
    folder = Path(path)
    if not folder.exists():  # a hub name: its snapshot, which load has fetched
        folder = Path(cached_file(path, "config.json", local_files_only=True)).parent
    found = [folder / "config.json"]
    return files.fingerprint(found + [*folder.glob("*.safetensors")] * (weights == "pretrained"))


def digests(args: argparse.Namespace) -> dict[str, str]:
    """What a checkpoint's record says of the contents of a run's models: `model_digest`, and for align.py
    `reference_digest`."""
    paths = {"model": args.model}
    if "reference" in vars(args):
        paths["reference"] = args.reference or args.model
    return {f"{key}_digest": fingerprint(path, args.weights) for key, path in paths.items()}


def copied(model: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    """The same model again, its parameters in `dtype`: what `load` would give, without reading it twice."""
    return _cast(copy.deepcopy(model), dtype)


def check_vocabulary(tokenizer: Any, policy: LanguageModel, reference: LanguageModel | None = None) -> None:
    """Raises ValueError for a tokenizer with more ids than the embedding, or two models over different
    vocabularies."""
    size = policy.head.weight.shape[0]
    if len(tokenizer) > size:
        raise ValueError(f"tokenizer has {len(tokenizer)} ids, the embedding {size}; resize the model first")
    if reference is not None and reference.head.weight.shape[0] != size:
        raise ValueError(f"--reference has vocabulary {reference.head.weight.shape[0]}, the policy {size}")


def check_twins(policy: LanguageModel, reference: LanguageModel) -> None:
    """Raises ValueError unless the policy can be copied into the reference."""
    shapes = [{name: p.shape for name, p in lm.lm.named_parameters()} for lm in (policy, reference)]
    if shapes[0] != shapes[1]:
        raise ValueError("--sync-reference-every needs a --reference of the policy's architecture")


def add_value_head(model: LanguageModel, path: str, seed: int) -> None:
    """Give it a critic: D -> D -> D -> 1 with ReLUs, in fp32; its last layer starts at 0, so every value
    does, or it is the one that lies beside the model. Raises ValueError if that is another one's."""
    size = model.head.weight.shape[1]
    torch.manual_seed(seed)
    model.value_head = nn.Sequential(
        nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 1)
    )
    nn.init.zeros_(model.value_head[-1].weight)
    nn.init.zeros_(model.value_head[-1].bias)
    saved = Path(path) / "value_head.safetensors"
    if saved.exists():
        try:
            given = {name.removeprefix("value_head."): value for name, value in load_file(saved).items()}
            model.value_head.load_state_dict(given)
        except (SafetensorError, RuntimeError) as error:  # of several lines, the second of them says what
            lines = [*str(error).strip().splitlines(), ""]
            what = (lines[1] or lines[0]).strip()
            raise ValueError(f"{saved}: not this model's value head: {what}") from error
        shards.refuse_not_finite(str(saved), model.value_head)


def add_score(model: LanguageModel, path: str, padding_id: int) -> None:
    """Give it the scalar head `score` of transformers' sequence classifiers, starting at 0, or as it was
    where `path` is one.

    Raises ValueError for an architecture without such a classifier.
    """
    lm = model.lm
    lm.score = nn.Linear(model.head.weight.shape[1], 1, bias=False)
    nn.init.zeros_(lm.score.weight)
    lm.config.num_labels = 1
    lm.config.pad_token_id = padding_id
    try:
        with torch.device("meta"):
            # of a copy, for it sets its attention in there; eager, for every architecture has that
            config = copy.deepcopy(lm.config)
            twin = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{type(lm).__name__}: no sequence classifier ({str(error).splitlines()[0]})"
        ) from error
    missing = sorted(
        {name for name, _ in twin.named_parameters()} - {name for name, _ in lm.named_parameters()}
    )
    if missing:
        raise ValueError(f"{type(lm).__name__}: its sequence classifier has other parameters ({missing[0]})")
    if loading.is_classifier(lm.config):
        given = shards.score(path)
        if given.shape != lm.score.weight.shape:
            raise ValueError(f"{path}: a classifier of {given.shape[0]} labels, not a reward model")
        lm.score.weight.data.copy_(given)


def stop_at(model: LanguageModel, ids: Sequence[int]) -> None:
    """Let generation stop at these tokens too: the ends of turn that training taught."""
    settings = model.lm.generation_config
    old = settings.eos_token_id
    old = [] if old is None else [old] if isinstance(old, int) else list(old)
    found = [*old, *(id for id in ids if id not in old)]
    settings.eos_token_id = found[0] if len(found) == 1 else found or None


def checkpoint_activations(model: LanguageModel, which: str) -> None:
    """Keep only the input of a block and recompute the block in the backward pass: of every block ("full"),
    of every second one ("selective") or of none; or keep the outputs of every block's PRODUCTS too and
    recompute what lies between them ("ops"). In place, before fsdp.shard."""
    how = {"use_reentrant": False}
    if which == "ops":
        how["context_fn"] = functools.partial(create_selective_checkpoint_contexts, keep_products)
    if which != "none":
        model.lm.activation_checkpointing_enable(how)
    if which == "selective":
        for block in model.blocks[1::2]:
            block.gradient_checkpointing = False


def keep_products(context: Any, operation: Any, *args: Any, **named: Any) -> CheckpointPolicy:
    """Of "ops", for torch.utils.checkpoint: what is kept of a block's forward."""
    return CheckpointPolicy.MUST_SAVE if operation.name() in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


def compile_blocks(wanted: bool, *models: Any) -> None:
    """If `wanted`, let torch.compile fuse what a block does between its matrix products, for rows of any
    length; packed attention stays as it is, a break in the middle. Blocks of a class share what is compiled,
    within what activation checkpointing runs again and FSDP gathers around. In place, of what is a
    LanguageModel."""
    if wanted:
        AttentionInterface.register(attention.NAME, torch.compiler.disable(attention.attend))
    whole = [model for model in models if wanted and isinstance(model, LanguageModel)]
    for block in itertools.chain(*(model.blocks for model in whole)):
        block.forward = functools.partial(_compiled_forward, block, _compiled(type(block)))


@functools.cache
def _compiled(kind: type) -> Callable:
    """The forward of a class of blocks, without transformers' checkpointing around it. What is fused rounds
    where it would have rounded alone: else a policy and its reference, one of them with a backward to come,
    would differ before the first step."""
    options = {"emulate_precision_casts": True}
    return torch.compile(kind.forward.__wrapped__, dynamic=True, options=options)


def _compiled_forward(block: nn.Module, run: Callable, *args: Any, **named: Any) -> Any:
    if block.gradient_checkpointing and block.training:
        return block._gradient_checkpointing_func(functools.partial(run, block, **named), *args)
    return run(block, *args, **named)


def _cast(model: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    for parameter in model.parameters():  # not model.to(): rotary frequencies stay fp32, as under FSDP
        parameter.data = parameter.data.to(dtype)
    return model


def check_positions(path: str, config: Any, max_length: int) -> None:
    """Raises ValueError for a configuration with fewer positions than `max_length`, or whose rotary embedding
    changes with it."""
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and max_length > longest:
        raise ValueError(f"{path}: --max-length {max_length} exceeds its {longest} positions")
    rope = getattr(config, "rope_parameters", None) or {}
    variants = [rope, *[value for value in rope.values() if isinstance(value, dict)]]
    original = getattr(config, "original_max_position_embeddings", None) or longest
    for variant in variants:
        if variant.get("rope_type") in ("dynamic", "longrope"):
            original = variant.get("original_max_position_embeddings") or original
            if max_length > original:
                raise ValueError(
                    f"{path}: its rotary embedding changes beyond {original} positions with the longest of "
                    f"the row; use --max-length {original} or less"
                )


def in_training(lm: nn.Module) -> LanguageModel:
    """transformers' model as it trains: in training mode, for eval mode would switch activation checkpointing
    off, with every dropout and the jitter of every router at 0. What of a composite model is not its text
    (a tower for images) is frozen."""
    lm.train()
    if lm.config.get_text_config() is not lm.config:
        lm.requires_grad_(False)
        for part in (lm.get_decoder(), lm.get_output_embeddings()):
            part.requires_grad_(True)
    for module in lm.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and (
                "drop" in name or "jitter" in name or (name == "p" and isinstance(module, nn.Dropout))
            ):
                setattr(module, name, 0.0)
    return LanguageModel(lm)
