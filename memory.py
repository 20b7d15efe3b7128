"""What a run takes, counted before it: memory of a rank and FLOPs of a step, by arithmetic alone. What is
said of it: estimate.py.

    body      a configuration -> Body: shapes of weights, and what a token costs, of a model on no device
    need      Body, Run -> bytes of a rank by part, at the moment that takes most
    flops     of a step

Tensors are counted, by these rules. Shards are those of FSDP2: one axis in equal pieces, the last one padded,
over the ranks of one of --replicate's groups. What is trained has fp32 masters, gradients and two moments;
what is frozen beside adapters lies in the dtype that the body computes in. Embeddings and head stay gathered
in that dtype, of a live reference too; of the blocks the one at work and the next, and the policy's last one
while the head is at work; beside cached states the reference's head lies whole. A composite model's tower is
frozen, in fp32 beside what is trained, and its blocks, which never run, stay shards. Activations are what
autograd saves of each block, recorded in one pass over a model whose tensors have shapes and no memory. The
head's part follows vocab.py: chunks of fp32 logits, the fp32 accumulator of its gradient, and on a CPU an
fp32 copy of its weights. These moments compete: the head, the backward of the last block (all other
activations are still there), and that of the embeddings (all gradients are); on a CPU the export, too. What
is not counted is in the constants, here SPARE.

Left out: the KV cache of --sample-prompts, kernels' own work space.
"""

import argparse
import copy
import functools
import math
from typing import Any, Callable, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import AttentionInterface, AutoModelForCausalLM

import fsdp
import loading
import lora
import model
import vocab

NAME = "counted"  # of the attention that computes nothing
PROBE = 1024  # tokens of the pass: enough for what does not grow with them to count for nothing
# Of a GPU's memory, for CUDA's context, NCCL's buffers and the allocator's gaps.
SPARE = 0.08
# GB of memory: a card that has it, and its dense bf16 TFLOP/s by its data sheet.
CARDS = {24: ("RTX 4090", 165), 40: ("A100", 312), 80: ("H100", 989), 141: ("H200", 989), 192: ("B200", 2250)}
MOST_RANKS = 1024
COUNTED: dict[tuple, "Body"] = {}  # by what `bodies` was asked
TWINS = ("live", "adapters", "hidden")  # references whose states meet the head
# The adapters that are advised, and those of the table.
ADAPTERS = {
    "lora_rank": 16, "lora_alpha": 32.0, "lora_targets": "all-linear", "lora_from": None, "lora_dropout": 0.0,
}  # fmt: skip


class Weight(NamedTuple):
    shape: tuple[int, ...]
    trained: bool


class Body(NamedTuple):
    blocks: list[list[Weight]]  # of each unit of sharding
    idle: list[Weight]  # of units that never run: of a composite model the tower's
    root: list[Weight]  # embeddings, head, last norm
    head: tuple[int, int]  # (V, D)
    head_trained: bool
    inputs: list[float]  # bytes a token that go into each block
    saved: list[float]  # bytes a token that each block keeps for its backward
    products: list[float]  # those of them, and of what is not kept, that model.PRODUCTS put out
    widest: float  # bytes a token of the largest tensor among them
    flops: float  # of the products of a token's forward through all blocks
    attention: float  # of a token's forward and each key it sees

    @property
    def weights(self) -> list[Weight]:
        return [weight for unit in (*self.blocks, self.idle, self.root) for weight in unit]


class Run(NamedTuple):
    tokens: int  # of a micro-batch of a rank; all of them may meet the head
    ranks: int = 1  # among which a model is sharded
    microbatches: int = 1  # of a step
    size: int = 2  # bytes of a number that the body computes with
    checkpointing: str = "full"
    reference: str = "none"  # live, adapters (those are off), hidden (states cached), cached (numbers cached)
    drift: bool = False  # a gradient through kl or risk
    chunks: bool = True  # does the head project on the vocabulary? Not a reward model's
    cuda: bool = False
    sync: str = "every"  # micro-batch, or the last: gradients are whole until then
    offload: str = ""  # to the host: shards of a live "reference", or "all"
    staged: bool = False  # checkpoints are written from a copy


# ---- what a model is
# -----------------------------------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    """Shapes of attention, and what its backward keeps: queries, keys and values."""

    @staticmethod
    def forward(ctx, query, key, value):  # noqa: ANN001, ANN205
        ctx.save_for_backward(query, key, value)
        return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])  # (1, T, H, E)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **ignored: Any
) -> tuple[Tensor, None]:
    module.counted_flops = 2 * query.shape[1] * (query.shape[3] + value.shape[3])  # a query and a key
    return _Attention.apply(query, key, value), None


AttentionInterface.register(NAME, _attend)


def body(
    settings: Any, dtype: torch.dtype = torch.bfloat16, adapt: Callable | None = None, trust: bool = False
) -> Body:  # fmt: skip
    """What a model of a transformers configuration is made of, and what a token costs in it. Nothing is
    allocated. `adapt` puts adapters in, and all else is frozen. Raises ValueError for a configuration that
    makes no model."""
    with loading.one_line("config.json"), torch.device("meta"):
        told = {"dtype": dtype, "trust_remote_code": trust}
        lm = AutoModelForCausalLM.from_config(copy.deepcopy(settings), **told)
        lm.set_attn_implementation(NAME)
        lm = model.in_training(lm).lm.eval()  # no dropout; of a composite model the text is trained
    if adapt:
        lm.requires_grad_(False)
        adapt(lm)
        for parameter in lm.parameters():
            parameter.data = parameter.data.to(dtype)
    units, resting = _units(lm)
    taken = {id(parameter) for unit in (*units, *resting) for parameter in unit.parameters()}
    root = [_weight(parameter) for parameter in lm.parameters() if id(parameter) not in taken]
    head = lm.get_output_embeddings().weight
    with loading.one_line("config.json"):
        inputs, saved, products, widest = _recorded(lm, units)
    seen = sum(getattr(module, "counted_flops", 0) for module in lm.modules())
    blocks = [[_weight(parameter) for parameter in unit.parameters()] for unit in units]
    idle = [_weight(parameter) for unit in resting for parameter in unit.parameters()]
    chosen = getattr(settings.get_text_config(), "num_experts_per_tok", None)  # of those fused in one tensor
    work = 0.0
    for shape in (weight.shape for unit in blocks for weight in unit if len(weight.shape) > 1):
        work += 2 * math.prod(shape) * (min(1, (chosen or shape[0]) / shape[0]) if len(shape) > 2 else 1)
    shape = (head.shape[0], head.shape[1])
    return Body(blocks, idle, root, shape, head.requires_grad, inputs, saved, products, widest, work, seen)


def _units(lm: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The units of sharding: those that text runs through, and the others."""
    units = model.LanguageModel(lm).blocks
    text = set(lm.get_decoder().modules())
    return [unit for unit in units if unit in text], [unit for unit in units if unit not in text]


def _weight(parameter: Tensor) -> Weight:
    return Weight(tuple(parameter.shape), parameter.requires_grad)


def _recorded(lm: nn.Module, units: Sequence[nn.Module]) -> tuple[list, list, list, float]:
    """One pass over PROBE tokens: what goes into each block, what autograd saves of it, each storage once and
    weights not at all, and what its products put out; the largest that is saved. All a token."""
    inputs, saved, products, sizes = [], [0], [0], []
    held = {_key(part): part for part in (*lm.parameters(), *lm.buffers())}  # a freed one's key may return

    def enter(module: nn.Module, given: tuple, named: dict) -> None:
        inputs.append(_bytes((given or tuple(named.values()))[0]) / PROBE)
        saved.append(0)
        products.append(0)

    def made(context: Any, operation: Any, *given: Any, **named: Any) -> bool:
        name = operation.name()
        if name == "aten::new_empty":  # that of _Attention
            products[-1] += math.prod(given[1]) * given[0].itemsize / PROBE
        elif name in model.PRODUCTS:
            left, right = [value for value in given if isinstance(value, Tensor) and value.dim() > 1][:2]
            products[-1] += left.shape[0] * right.shape[-1] * left.itemsize / PROBE
        return False

    def keep(value: Tensor) -> Tensor:
        if _key(value) not in held:
            held[_key(value)] = value
            saved[-1] += _bytes(value) / PROBE
            sizes.append(_bytes(value) / PROBE)
        return value

    hooks = [unit.register_forward_pre_hook(enter, with_kwargs=True) for unit in units]
    ids = torch.zeros(1, PROBE, dtype=torch.long, device="meta")
    saving = torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value)
    with saving, create_selective_checkpoint_contexts(made)[0]:
        lm.base_model(input_ids=ids, position_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return inputs, saved[1:], products[1:], max(sizes)


def _key(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def _bytes(value: Tensor) -> int:
    return value.untyped_storage().nbytes()


# ---- what a run takes
# -----------------------------------------------------------------------------------------------------------


def numbers(weights: Sequence[Weight], ranks: int = 1) -> int:
    """Of the weights' shards on one rank, as fsdp.shard makes them: equal pieces, the last padded."""
    return sum(_shard(weight.shape, ranks) for weight in weights)


def _shard(shape: Sequence[int], ranks: int) -> int:
    axis = fsdp.split_axis(shape, ranks) if shape else 0
    return math.ceil(shape[axis] / ranks) * math.prod(shape) // shape[axis] if shape else 1


def balance(body: Body, ranks: int) -> float:
    """A rank's share of the weights, to an equal share of them."""
    return numbers(body.weights, ranks) * ranks / numbers(body.weights)


def need(body: Body, run: Run, other: Body | None = None) -> dict[str, float]:
    """Bytes of a rank by part, at the moment of a step that takes most; their sum is what a rank needs.
    `other` is a live or cached reference of another architecture. "weights" are shards: the fp32 masters of
    what is trained, and what is frozen; copies of either in --dtype, made to compute with, are "gathered"."""
    return max(_moments(body, run, other or body), key=lambda parts: sum(parts.values()))


def _moments(body: Body, run: Run, other: Body) -> list[dict[str, float]]:
    trained = [w for w in body.weights if w.trained]
    frozen = [w for w in body.weights if not w.trained]
    held = 4 if body.head_trained else run.size  # beside adapters, which leave the head alone
    live = run.reference == "live"
    offloaded = run.offload * run.cuda  # a CPU's would stay in the same memory
    stays, goes = offloaded != "all", offloaded == "all"
    block = max(body.blocks, key=numbers)
    root, of_block = run.size * numbers(body.root), run.size * numbers(block)
    beside = [weight for weight in other.root if weight.shape == other.head[:1]]  # the head's bias
    given, trainable = [w for w in body.root if w.trained], [w for w in block if w.trained]
    gradients = 4.0 * numbers(trained, run.ranks) * stays
    several, last = run.microbatches > 1, run.sync == "last"
    earlier = several * (4.0 * numbers(trained) if last else gradients)
    kept, again = _activations(body, run)
    # hidden states: the reference's of a whole step, the policy's and their gradient
    twins = run.microbatches * (run.reference in TWINS) * other.head[1]
    states = run.size * run.tokens * (twins + 2 * body.head[1])
    always = {
        "weights": (4.0 * numbers(trained, run.ranks) + held * numbers(frozen, run.ranks)) * stays,
        "moments": 8.0 * numbers(trained, run.ranks) * stays,
        "reference": run.size * numbers(other.weights, run.ranks) * (live and not offloaded),
        "cache": run.size * (math.prod(other.head) + numbers(beside)) * (run.reference == "hidden"),
        "staging": 12.0 * numbers(trained, run.ranks) * (run.staged and not run.cuda),  # of a GPU on the host
    }
    roots = root + live * run.size * numbers(other.root)
    matrix = body.head_trained * run.size * math.prod(body.head)  # the gradient of the head
    back = run.size * numbers(trainable) + 4 * numbers(trainable)  # whole, and on its way to its shards
    # on their way from the host and to it: shards of the next block, gradients of the last
    back += goes * (held * numbers(block, run.ranks) + 4 * numbers(trainable, run.ranks))
    # The same of the root. In the embedding's backward, where a tied matrix has the gradients of head and
    # embedding and their sum, it is gathered still; on the way to shards no longer, and to shards of earlier
    # micro-batches new ones are added, which of one rank are what was to be sent.
    tied = sum(weight.shape == body.head for weight in body.root) == 1
    added = (several and not last and run.ranks > 1) / run.ranks
    ends, sent = run.size * numbers(given), 4 * numbers(given) * (1 + added)
    sent += goes * 4 * numbers(given, run.ranks)
    moments = [  # gradients, gathered, activations, head
        (earlier, roots + run.size * numbers(body.blocks[-1]), kept + states, _head(body, run)),
        (earlier + back, roots + 2 * of_block, kept + states + again, matrix),
        (max(gradients, earlier) + ends + 2 * matrix * tied, roots, states, 0.0),
        (max(gradients, earlier) + ends + sent, roots - root, states, 0.0),
    ]
    # On a CPU the end too: the largest weight, gathered and cast, or with what an adapter adds; the heap of
    # the steps is kept (fsdp.py), large blocks, as of the root, are not. Of a GPU that is the host's.
    if not run.cuda:
        largest = 8.0 * max(numbers([weight]) for weight in body.weights)
        moments.append((0.0, 0.0, kept + states + again, 0.0, largest))
    parts = ("gradients", "gathered", "activations", "head", "export")
    return [always | dict(zip(parts, moment)) for moment in moments]


def _activations(body: Body, run: Run) -> tuple[float, float]:
    """(kept from forward to backward, made again and on top in the backward of one block)."""
    count = len(body.blocks)
    again = range(0, {"none": 0}.get(run.checkpointing, count), 2 if run.checkpointing == "selective" else 1)
    products = run.checkpointing == "ops"
    made_again = [body.inputs[k] + products * body.products[k] for k in range(count)]
    kept = sum(made_again[k] if k in again else body.saved[k] for k in range(count))
    # and the gradients of the widest, before it and after it, and a product
    on_top = max((body.saved[k] for k in again), default=0.0) + 3 * body.widest
    return run.tokens * kept, run.tokens * on_top


def _head(body: Body, run: Run) -> float:
    """What vocab.py holds at most: in its forward, or in its backward."""
    if not run.chunks:
        return 0.0
    rows, width = body.head
    matrix = 4.0 * rows * width
    wide = matrix * (run.size < 4 and not run.cuda)  # the fp32 copy of its weights
    room = vocab.CUDA_CHUNK_BYTES if run.cuda else vocab.CHUNK_BYTES
    chunk = 4.0 * rows * min(run.tokens, max(16, room // (4 * rows)))
    twins = run.reference in TWINS
    tiles = 6 * min(chunk, vocab.CUDA_TILE_BYTES if run.cuda else vocab.TILE_BYTES)
    total = matrix * body.head_trained
    forward = (1 + twins) * (wide + chunk)
    backward = (1 + run.drift) * (wide + chunk) + total + (run.size < 4) * chunk * run.size / 4
    return max(forward, backward) + tiles


def holes(body: Body, run: Run) -> float:
    """Bytes of a heap that a CPU's blocks leave behind them: each gathers its weights where a piece of what
    the one before it had is still in use, so that in the end all have had a place of their own. What is
    larger than fsdp.LARGEST is given back."""
    sizes = (run.size * math.prod(weight.shape) for block in body.blocks for weight in block)
    return float(sum(size for size in sizes if size <= fsdp.LARGEST))


def flops(body: Body, run: Run, tokens: float, trained: float, keys: float) -> float:
    """Of a step of `tokens`, `trained` of which meet the head, each of which sees `keys` on average."""
    again = {"none": 0.0, "ops": 0.0, "selective": 0.5, "full": 1.0}[run.checkpointing]
    of_head = 2.0 * math.prod(body.head) * trained * run.chunks
    reference = run.reference in ("live", "adapters")
    backward = 2.0 if body.head_trained else 1.0  # frozen weights have no gradient
    passes = 1 + reference + again + backward
    products = 2 + (run.reference in TWINS) * (1 + run.drift) + backward
    attention = body.attention * keys * tokens
    return (body.flops * tokens + attention) * passes + attention * (2 - backward) + of_head * products


def fewest(body: Body, run: Run, memory: float, other: Body | None = None) -> int | None:
    """The fewest GPUs, a power of 2, of so many GB each on which a run fits; None if it does on none."""
    for ranks in (2**k for k in range(MOST_RANKS.bit_length())):
        parts = need(body, run._replace(ranks=ranks, cuda=True), other)
        if sum(parts.values()) <= memory * 1e9 * (1 - SPARE):
            return ranks
    return None


def bodies(args: argparse.Namespace, objective: Any) -> tuple[Body, Body | None]:
    """Of the policy, and of a reference that is another model."""
    made = [args.model]
    if objective is not None and objective.has_reference and lora.shared(args) is None:
        made += [args.reference] * (args.reference not in (None, args.model))
    trust, dtype = args.trust_remote_code, getattr(torch, args.dtype)
    adapt = [functools.partial(lora.insert, args=args) if lora.wanted(args) else None, None]
    flags = {name: value for name, value in vars(args).items() if name.startswith("lora")}
    found = []
    for path, how in zip(made, adapt):
        settings = loading.settings(path, trust)
        asked = (type(settings), repr(settings.to_dict()), dtype, repr(how and flags))
        if asked not in COUNTED:
            loading.refuse_deeper(path, settings)
            COUNTED[asked] = body(settings, dtype, how, trust)
        found.append(COUNTED[asked])
    if objective is not None and objective.advantages is not None:
        width = found[0].head[1]
        shapes = [(width, width), (width,)] * 2 + [(1, width), (1,)]
        found[0] = found[0]._replace(root=[*found[0].root, *(Weight(shape, True) for shape in shapes)])
    return found[0], (found + [None])[1]


def run_of(args: argparse.Namespace, objective: Any, lengths: Any, ranks: int, cuda: bool) -> Run:
    """The largest micro-batch that the flags and the lengths of groups allow."""
    longest = np.sort(np.asarray(lengths))[::-1][: args.batch_size]
    share = math.ceil(longest.sum() / ranks)
    tokens = max(int(longest[0]), min(args.tokens_per_microbatch, share))
    reference = "none"
    if objective is not None and objective.has_reference:
        reference = "live" if lora.shared(args) is None else "adapters"
        if args.cache_reference:
            reference = "hidden" if args.cache_hidden else "cached"
    return Run(
        tokens, max(1, ranks // args.replicate), math.ceil(share / tokens),
        getattr(torch, args.dtype).itemsize,
        args.activation_checkpointing, reference, bool(objective and objective.through),
        not (objective and objective.scores), cuda, args.micro_batch_sync,
        getattr(args, "offload", None) or "", bool(args.save_async and args.save_every),
    )  # fmt: skip
