"""Is packed attention exact for an architecture? Asked of a clone of it that is small and has no weights of
its own: a model of 8B and a window of 4,096 take as long as a tiny one.

The clone is of the same class: one layer of every kind that the configuration makes, heads as wide as they
are but few, few experts, a small vocabulary; a window becomes one of WINDOW tokens if training reaches beyond
it, else one beyond the rows here. Every parameter is random, biases and norms too, so that no path is dead.
Packed, two groups of two completions each must

    leak nothing    d states of a segment / d embeddings of any other but its own prompt is 0, exactly: what
                    mixes tokens outside attention (a convolution, a recurrence) shows however weak it is
    be the same     log-probabilities of the whole vocabulary equal those of four plain sequences: positions,
                    window, soft-caps, head bias, scale

in fp32 on a CPU, and again in the dtype and on the device of the training where these are others.
"""

import contextlib
import copy
from typing import Any, Callable, Iterator, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

import attention
import loading
import vocab

# Of the spread of log-probabilities. fp32: of every token; rounding stays under 1e-4 of it. 16 bits: of the
# median token of a completion, for rounding sends one or the other to another expert; rounding under 0.03.
TOLERANCE, TOLERANCE_16 = 1e-3, 1e-1
WINDOW = 6
GROUPS = [(9, [5, 4]), (3, [4, 6])]  # prompt, completions; one prompt beyond WINDOW, one within
LONGEST = 14
MOST = 100_000_000  # parameters of a clone: two seconds
PASSED: set[tuple] = set()  # what `check` was asked
# What makes a model wide, what else makes it large, and the most that a clone has of it; other names of these
# are transformers' business (attribute_map). Whatever is not here stays, the size of a head above all, for
# rotary tables and kernels depend on it.
LARGE = {
    "vocab_size": 64, "vocab_size_per_layer_input": 64, "intermediate_size": 64, "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64, "ffn_dim": 64, "n_inner": 64, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "top_k_experts": 2, "n_group": 2,
    "topk_group": 1,
}  # fmt: skip
WINDOWS = ("sliding_window", "attention_chunk_size")


class _Segment(NamedTuple):
    rows: slice  # its own tokens of the row
    prompt: slice  # its group's prompt, which it sees too


@torch.enable_grad()  # an export asks for a model without
def check(
    path: str,
    config: Any,
    max_length: int,
    wrap: Callable[[nn.Module], Any],
    trust_remote_code: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> None:
    """Raises ValueError, in one line, unless packed attention is exact for models of `config`, at rows of
    `max_length`; `wrap` makes a LanguageModel of transformers' model, as it will train. Reads no weights and
    leaves the stream of random numbers as it was. Asks once in a process: a reference is of its kind."""
    asked = (repr(config.to_dict() | {"_name_or_path": ""}), max_length, wrap, dtype, str(device))
    if asked in PASSED and not trust_remote_code:
        return
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        with torch.random.fork_rng(devices=[]):  # a constructor may draw a buffer
            model, plain = _clone(path, config, max_length, wrap, trust_remote_code)
        refusal = f"{path}: {type(model.lm).__name__} does not work with packed attention"
        _refuse_strangers(refusal, model)
        _compare(refusal, model, plain, TOLERANCE)
        if dtype != torch.float32 or torch.device(device).type != "cpu":
            for parameter in model.parameters():  # buffers stay fp32, as under FSDP
                parameter.data = parameter.data.to(dtype)
            # a tower for images has no memory
            model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
            model.lm.set_attn_implementation("eager")
            wide = dtype == torch.float32
            _compare(refusal, model, _plain(model.lm), TOLERANCE if wide else TOLERANCE_16)
        PASSED.add(asked)
    finally:
        transformers_logging.set_verbosity(before)


def _clone(
    path: str, config: Any, max_length: int, wrap: Callable[[nn.Module], Any], trust_remote_code: bool
) -> tuple[Any, Tensor]:
    """The clone and its own log-probabilities; one that shrinks less where a smaller one does not run."""
    why = None
    for narrow, few in ((True, True), (True, False), (False, True), (False, False)):
        try:
            small = _shrunk(config, max_length, narrow)
            with loading.without_memory():
                lm = AutoModelForCausalLM.from_config(
                    small, dtype=torch.float32, trust_remote_code=trust_remote_code
                )
            if few:
                _keep_one_layer_of_each_kind(lm)
            _fill(lm)
            before = _floats(lm)
            model = wrap(lm)
            with _with_noise(lm, [key for key, value in _floats(lm).items() if value != before[key]]):
                return model, _plain(lm)
        except Exception as error:  # a dozen types, of assertions to shapes
            why = why or (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    raise ValueError(f"{path}: no small model of its kind runs, to check packed attention on: {why}")


def _floats(lm: nn.Module) -> dict[tuple[str, str], float]:
    """What the modules of a model have of numbers that are not whole, by their names and its own."""
    named = lm.named_modules()
    return {(n, key): x for n, module in named for key, x in vars(module).items() if isinstance(x, float)}


@contextlib.contextmanager
def _with_noise(lm: nn.Module, off: list[tuple[str, str]]) -> Iterator[None]:
    """A model in evaluation mode, with much of what its training has set to 0: what is noise changes nothing
    there, and what is more (the threshold of a router, by the name of jitter) everything."""
    kept = _floats(lm)
    lm.eval()
    for name, key in off:
        setattr(lm.get_submodule(name), key, 1.0)
    try:
        yield
    finally:
        for name, key in off:
            setattr(lm.get_submodule(name), key, kept[name, key])
        lm.train()


def _shrunk(config: Any, max_length: int, narrow: bool) -> Any:
    """A copy of a configuration with few of everything; `narrow` cuts heads too, and the width with them."""
    whole = copy.deepcopy(config)
    small = whole.get_text_config()
    for part in (whole, small):
        part._attn_implementation = None
    heads = getattr(small, "num_attention_heads", None)
    if narrow and heads:
        groups = getattr(small, "num_key_value_heads", None) or heads
        size = vars(small).get("head_dim") or small.hidden_size // heads
        few = min(groups, 2)
        small.num_attention_heads = few * min(heads // groups, 2)
        if getattr(small, "num_key_value_heads", None):
            small.num_key_value_heads = few
        small.hidden_size = small.num_attention_heads * size
        if hasattr(small, "word_embed_proj_dim"):  # OPT's: another width, or the same
            other = small.word_embed_proj_dim != config.get_text_config().hidden_size
            small.word_embed_proj_dim = small.hidden_size // 2 if other else small.hidden_size
    for name, most in LARGE.items():
        own = getattr(small, name, None)
        if isinstance(own, int):
            setattr(small, name, min(own, most))
        elif isinstance(own, list):  # of all layers
            setattr(small, name, [min(each, most) for each in own])
    for name in WINDOWS:
        if window := getattr(small, name, None):
            setattr(small, name, WINDOW if window < max_length else max(window, LONGEST))
    if (getattr(small, "max_position_embeddings", None) or LONGEST) < LONGEST:
        small.max_position_embeddings = LONGEST
    for part in (whole, small):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(part, name, None) is not None:
                setattr(part, name, 0)
    return whole


def _keep_one_layer_of_each_kind(lm: nn.Module) -> None:
    """Of the stack of layers, and of what the configuration lists by layer, in place. Layers are of a kind if
    they have the same modules, shapes and settings. The configuration's count stays, for other shapes may
    come from it."""
    config = lm.config.get_text_config()
    count = config.num_hidden_layers
    listed = {
        name: value for name, value in vars(config).items() if isinstance(value, list) and len(value) == count
    }
    for stack in lm.get_decoder().modules():
        if isinstance(stack, nn.ModuleList) and len(stack) == count:
            kinds: dict[Any, int] = {}
            for index, layer in enumerate(stack):
                kinds.setdefault((_kind(layer), str([value[index] for value in listed.values()])), index)
            kept = sorted(kinds.values())
            for index in reversed(range(count)):
                if index not in kept:
                    del stack[index]
            for name, value in listed.items():
                setattr(config, name, [value[index] for index in kept])
            return


def _kind(layer: nn.Module) -> Any:
    return str(
        [
            (
                name,
                type(module).__name__,
                [
                    (key, value)
                    for key, value in vars(module).items()
                    if isinstance(value, (bool, int, float, str)) and "idx" not in key
                ],
                [(key, value.shape) for key, value in module.named_parameters(recurse=False)],
            )
            for name, module in layer.named_modules()
        ]
    )


def _fill(lm: nn.Module) -> None:
    """Numbers for all parameters of the text: of a matrix so that what it gives is about as large as what it
    is given, of a norm around 1. Ties hold."""
    size = sum(parameter.numel() for parameter in lm.get_decoder().parameters())
    if size > MOST:
        raise ValueError(f"the smallest has {size} parameters")
    generator = torch.Generator().manual_seed(0)
    made: dict[int, nn.Parameter] = {}
    for part in (lm.get_decoder(), lm.get_output_embeddings()):
        for module in part.modules():
            for name, old in module.named_parameters(recurse=False):
                if old.is_meta and id(old) not in made:
                    new = torch.randn(old.shape, generator=generator)
                    if old.dim() > 1:
                        new *= min(old.shape[-2:]) ** -0.5
                    else:
                        new = 0.2 * new + ("weight" in name)
                    made[id(old)] = nn.Parameter(new)
                module._parameters[name] = made.get(id(old), old)


def _refuse_strangers(refusal: str, model: Any) -> None:
    """Raises ValueError for layers that are no units of sharding and of checkpointing: beside transformers'
    blocks a body has embeddings, norms and single products."""
    if not model.blocks:
        raise ValueError(f"{refusal}: none of its layers is one of transformers' GradientCheckpointingLayer")
    inside = {module for block in model.blocks for module in block.modules()}
    for name, module in model.lm.get_decoder().named_modules():
        if module not in inside and [*module.named_parameters(recurse=False)]:
            kind = type(module).__name__
            if not isinstance(module, (nn.Embedding, nn.Linear)) and not any(
                part in kind for part in ("Norm", "Embedding")
            ):
                where = f"{name or 'the body'}, a {kind}"
                raise ValueError(f"{refusal}: parameters of {where}, lie outside its layers")


def _rows() -> tuple[Tensor, Tensor, list[_Segment]]:
    """ids (1, T), positions (1, T), and the segments: of each group its prompt and its completions."""
    segments, positions, start = [], [], 0
    for prompt, completions in GROUPS:
        shared = slice(start, start + prompt)
        segments.append(_Segment(shared, shared))
        positions += range(prompt)
        start += prompt
        for length in completions:
            segments.append(_Segment(slice(start, start + length), shared))
            positions += range(prompt, prompt + length)
            start += length
    ids = torch.randint(1, 64, (1, start), generator=torch.Generator().manual_seed(0))
    return ids, torch.tensor([positions]), segments


@torch.no_grad()
def _plain(lm: nn.Module) -> list[Tensor]:
    """Of every completion, its prompt before it, the model's own log-probabilities (tokens + 1, V)."""
    ids, _, segments = _rows()
    ids = ids[0].to(lm.get_output_embeddings().weight.device) % lm.config.get_text_config().vocab_size
    return [
        lm(torch.cat([ids[prompt], ids[rows]])[None], use_cache=False)
        .logits[0, prompt.stop - prompt.start - 1 :]
        .float()
        .log_softmax(-1)
        for rows, prompt in segments
        if rows != prompt
    ]


def _compare(refusal: str, model: Any, plain: list[Tensor], tolerance: float) -> None:
    """Raises ValueError for a leak, or for log-probabilities that differ. Leaves the model on packed
    attention."""
    ids, positions, segments = _rows()
    head = model.lm.get_output_embeddings().weight
    count = model.lm.config.get_text_config().vocab_size
    inputs = []

    def keep(module: nn.Module, given: Any, states: Tensor) -> Tensor:
        inputs.append(states.detach().requires_grad_())
        return inputs[0]

    hook = model.lm.get_input_embeddings().register_forward_hook(keep)
    try:
        model.lm.set_attn_implementation(attention.NAME)
        row = (ids % count, positions, *attention.layout(GROUPS))
        ids, positions, *parts = (p.to(head.device) if isinstance(p, Tensor) else p for p in row)
        layout = attention.Layout(*parts)
        states = model(ids, positions, layout, torch.arange(ids.shape[1], device=head.device))  # (T, D)
        _refuse_leaks(states, inputs[0], segments)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{refusal}: {str(error).splitlines()[0]}") from error
    finally:
        hook.remove()
    completions = [segment for segment in segments if segment.rows != segment.prompt]
    for own, (rows, prompt) in zip(plain, completions):
        found = torch.cat([states[prompt.stop - 1 : prompt.stop], states[rows]]).detach()  # (tokens + 1, D)
        targets = torch.arange(count, device=head.device).repeat(len(found))
        logps = vocab.token_statistics(found.repeat_interleave(count, 0), model.head, targets).logps
        errors = (logps.view(-1, count) - own).abs().amax(-1)  # (tokens + 1,)
        error = (errors.max() if tolerance == TOLERANCE else errors.median()).item()
        if not error < tolerance * own.std().item():
            raise ValueError(f"{refusal}: log-probabilities differ from its own by {error:.1e} nats")


def _refuse_leaks(states: Tensor, inputs: Tensor, segments: list[_Segment]) -> None:
    """Raises ValueError unless each segment's states depend on its own tokens and its prompt's alone."""
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(1)).to(states)
    for rows, prompt in segments:
        total = (states * weights)[rows].sum()
        (slopes,) = torch.autograd.grad(total, inputs, retain_graph=True)  # (1, T, D)
        reached = (slopes[0] != 0).any(-1)  # (T,)
        if not (reached[rows].any() and reached[prompt].any()):
            raise ValueError("states do not depend on their prompt")
        reached[rows] = reached[prompt] = False
        if reached.any():
            raise ValueError("tokens of one sequence reach another outside attention (its layers mix tokens)")
