"""Packed groups against plain transformers: separate, right-padded sequences through its own eager attention.

Everything runs in fp64; what is left of the difference (1e-7 in gradients) are transformers' casts to fp32
inside norms. Weights are drawn wide and no parameter is left at 0 or 1, so that biases, norms, windows and
caps all matter. A comment `red:` names a one-line change of attention.py or model.py that turns a test red.
"""
import contextlib
import functools
import inspect
import sys
import types

import pytest
import torch
import torch.nn.attention.varlen
import transformers as hf
from torch.nn.utils.rnn import pad_sequence

import attention
import batch
import encode
import model
import vocab

VOCABULARY = 97
POSITIONS = 64  # of the models, and --max-length
WINDOW = 4  # shorter than most sequences below
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
COMMON = SIZES | TOKENS | {"intermediate_size": 48, "initializer_range": 0.3}
GROUPED = COMMON | {"num_key_value_heads": 2}
WINDOWED = GROUPED | {"sliding_window": WINDOW}
GEMMA = WINDOWED | {"head_dim": 8, "query_pre_attn_scalar": 4}
OPT = SIZES | TOKENS | {"ffn_dim": 48, "init_std": 0.3}
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**GROUPED),
    "mistral": lambda: hf.MistralConfig(**WINDOWED),
    "qwen2": lambda: hf.Qwen2Config(**GROUPED),
    "qwen2, window": lambda: hf.Qwen2Config(**WINDOWED, use_sliding_window=True, max_window_layers=1),
    "qwen3": lambda: hf.Qwen3Config(**GROUPED, head_dim=8),
    "gemma": lambda: hf.GemmaConfig(**GROUPED, head_dim=8),
    "gemma2": lambda: hf.Gemma2Config(**GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3": lambda: hf.Gemma3TextConfig(**GEMMA, layer_types=["sliding_attention", "full_attention"]),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**COMMON),
    "gpt2": lambda: hf.GPT2Config(**SIZES, **TOKENS, initializer_range=0.3),
    "opt": lambda: hf.OPTConfig(**OPT, word_embed_proj_dim=32),
    "opt, projected": lambda: hf.OPTConfig(**OPT, word_embed_proj_dim=16, do_layer_norm_before=False),
    "phi": lambda: hf.PhiConfig(**GROUPED),  # a bias on the head
    "phi3": lambda: hf.Phi3Config(**GROUPED),
    "phi3, window": lambda: hf.Phi3Config(**WINDOWED),
    "olmo2": lambda: hf.Olmo2Config(**GROUPED),
    "smollm3": lambda: hf.SmolLM3Config(**GROUPED, no_rope_layers=[1, 0]),
    "granite": lambda: hf.GraniteConfig(**GROUPED, logits_scaling=0.5, attention_multiplier=0.9),
}
ARCHITECTURE = pytest.mark.parametrize("name", CONFIGS)


def make_groups():
    """Prompts of 7, 1, 6 and 0 tokens with 2, 1, 3 and 2 completions; some tokens are not trained."""
    g = torch.Generator().manual_seed(5)

    def draw(count):
        return torch.randint(3, VOCABULARY, (count,), generator=g).tolist()

    groups = []
    for prompt, lengths in [(7, [9, 3]), (1, [3]), (6, [2, 8, 1]), (0, [4, 3])]:
        trained = [[index > 0 or prompt > 0 for index in range(length)] for length in lengths]
        trained[0][1:2] = [False]
        scores = [float(-length) for length in lengths]
        groups.append(encode.Encoded(draw(prompt), [draw(length) for length in lengths], trained, scores))
    return groups


GROUPS = make_groups()
PACK = batch.pack(GROUPS)
LENGTH = PACK.ids.shape[1]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other make tiny products ten times slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def softmax_in_fp64(monkeypatch):
    """Eager attention asks for a softmax in fp32. There fp64's least number is -inf, and a row whose whole
    window is padding becomes NaN, then, as 0 * NaN, everything else."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda scores, dim, dtype=None: softmax(scores, dim))


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """(architecture, seed) -> plain: transformers' model, eager attention; packed: model.load of it."""

    @functools.cache
    def made(name, seed):
        torch.manual_seed(seed)
        plain = hf.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").eval()
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        where = tmp_path_factory.mktemp("model")
        plain.save_pretrained(where)
        packed = model.load(str(where), torch.float64, POSITIONS)
        return types.SimpleNamespace(plain=plain.double(), packed=packed)

    return made


def padded():
    """Every completion behind its own copy of the prompt, padded on the right: ids, mask, labels (R, L)."""
    rows = []
    labels = []
    for group in GROUPS:
        for completion, trained in zip(group.completions, group.trained):
            answer = [token if wanted else -100 for token, wanted in zip(completion, trained)]
            rows.append(torch.tensor(group.prompt + completion))
            labels.append(torch.tensor([-100] * len(group.prompt) + answer))
    mask = [torch.ones_like(row) for row in rows]
    return pad_sequence(rows, True, 9), pad_sequence(mask, True, 0), pad_sequence(labels, True, -100)


def hidden_of(packed, pack=PACK, positions=None, groups=None):
    positions = pack.positions if positions is None else positions
    layout = attention.layout(groups or pack.groups)
    return packed(pack.ids, positions, layout, torch.arange(pack.ids.shape[1]))  # (T, D)


def plain_hidden(lm):
    """The padded batch's last hidden states in the order of the packed row."""
    ids, mask, _ = padded()
    states = lm.base_model(input_ids=ids, attention_mask=mask).last_hidden_state  # (R, L, D)
    rows = iter(states)
    parts = []
    for prompt, lengths in PACK.groups:
        for index, length in enumerate(lengths):
            row = next(rows)
            parts.append(row[prompt if index else 0 : prompt + length])  # the prompt once
    return torch.cat(parts)  # (T, D)


def error(actual, expected):
    """Largest difference relative to the largest entry."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@ARCHITECTURE
def test_states_statistics_and_gradients_equal_padded_batches(build, name):
    # red: positions.extend(range(begin, ...)); `window` for `window - 1` keys; cap or scaling not passed on
    policy, reference = build(name, 0), build(name, 1)
    ids, mask, labels = padded()
    chosen = labels[:, 1:] != -100  # (R, L - 1)
    target = labels[:, 1:][chosen][:, None]  # (N, 1)
    logps = policy.plain(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)[chosen]  # (N, V)
    layout = attention.layout(PACK.groups)
    with torch.no_grad():
        ref_logps = reference.plain(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)[chosen]
        ref_states = reference.packed(PACK.ids, PACK.positions, layout, PACK.predict)  # (N, D)
        assert error(hidden_of(policy.packed), plain_hidden(policy.plain)) < 1e-10
    picked = [values.gather(-1, target)[:, 0] for values in (logps, ref_logps)]  # (N,) each
    expected = vocab.Tokens(*picked, (ref_logps.exp() * (ref_logps - logps)).sum(-1))
    assert expected.logps.std() > 0.3 and expected.kl.mean() > 0.03  # far from uniform and from the reference

    states = policy.packed(PACK.ids, PACK.positions, layout, PACK.predict)  # (N, D)
    ref = (ref_states, reference.packed.head)
    actual = vocab.token_statistics(states, policy.packed.head, PACK.targets, ref, through="kl", chunk_size=5)
    for statistic in ("logps", "ref_logps", "kl"):
        assert error(getattr(actual, statistic), getattr(expected, statistic)) < 1e-10, statistic

    coefficient = torch.linspace(-1, 2, len(target), dtype=torch.float64)
    for pair, tokens in ((policy.plain, expected), (policy.packed, actual)):
        pair.zero_grad()
        (coefficient * tokens.logps + (1 - coefficient) * tokens.kl).sum().backward()
    wanted = {key: parameter.grad for key, parameter in policy.plain.named_parameters()}
    found = {key: parameter.grad for key, parameter in policy.packed.lm.named_parameters()}
    assert wanted.keys() == found.keys()
    floor = 1e-9 * max(gradient.norm() for gradient in wanted.values())  # softmax ignores a key bias: 0
    for key, gradient in wanted.items():
        assert (found[key] - gradient).norm() < 1e-6 * gradient.norm() + floor, key


@ARCHITECTURE
@torch.no_grad()
def test_the_comparison_sees_wrong_positions_and_siblings(build, name):
    pair = build(name, 0)
    expected = plain_hidden(pair.plain)
    running = hidden_of(pair.packed, positions=torch.arange(LENGTH)[None])
    siblings = hidden_of(pair.packed, groups=[(prompt, [sum(answers)]) for prompt, answers in PACK.groups])
    one_segment = hidden_of(pair.packed, groups=[(0, [LENGTH])])
    for mutant in (running, siblings, one_segment):
        assert error(mutant, expected) > 1e-2


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mistral", {"sliding_window": WINDOW + 1}),
        ("mistral", {"sliding_window": WINDOW - 1}),
        ("phi3, window", {"sliding_window": None}),
        ("gemma3", {"sliding_window": None}),
        ("gemma3", {"sliding_window": WINDOW}),  # also in the layer of full attention
        ("gemma2", {"softcap": None}),
        ("gemma2", {"scaling": None}),
        ("granite", {"scaling": None}),
    ],
    ids=str,
)
@torch.no_grad()
def test_the_comparison_sees_windows_caps_and_scales(build, name, change):
    pair = build(name, 0)

    def mutant(*args, **kwargs):
        return attention.attend(*args, **{**kwargs, **change})

    hf.AttentionInterface.register(attention.NAME, mutant)
    try:
        states = hidden_of(pair.packed)
    finally:
        hf.AttentionInterface.register(attention.NAME, attention.attend)
    assert error(states, plain_hidden(pair.plain)) > 1e-3


@ARCHITECTURE
@torch.no_grad()
def test_a_group_alone_equals_the_group_among_others(build, name):
    # red: positions that go on through the row (gpt2, opt); keys that miss the group's `start`
    packed = build(name, 0).packed
    alone = torch.cat([hidden_of(packed, batch.pack([group])) for group in GROUPS])
    assert error(alone, hidden_of(packed)) < 1e-10


def test_gpt_neo_is_refused(tmp_path):
    # red: model.load without packing.check: GPT-Neo's own attention code ignores the layout
    config = hf.GPTNeoConfig(hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global"], 2]])
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="GPTNeoForCausalLM does not work with packed attention") as refusal:
        model.load(str(tmp_path), torch.float32, POSITIONS)
    assert "\n" not in str(refusal.value)


# The function alone: random queries and keys, and the rule of the design written as one (T, T) mask.

ROWS = {
    "one": [(5, [4])],
    "pairs": [(7, [9, 3]), (1, [3, 8])],
    "mixed": [(4, [2]), (6, [2, 8, 1]), (0, [3]), (3, [1, 1])],
}
SETTINGS = [(None, None), (1, None), (4, None), (7, None), (100, None), (None, 1.5), (4, 1.5)]  # window, cap
ROW = pytest.mark.parametrize("row", ROWS)
SETTING = pytest.mark.parametrize(("window", "cap"), SETTINGS)


def random_heads(groups, seed=0):
    """query (1, 4, T, 8), key and value (1, 2, T, 8)"""
    tokens = sum(prompt + sum(lengths) for prompt, lengths in groups)
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, tokens, 8, generator=g, dtype=torch.float64) for heads in (4, 2, 2)]


def softmax_attention(query, key, value, visible, scaling, cap):
    """query (1, H, n, E), key and value (1, Hkv, m, E), visible (n, m) -> (1, H, n, E)"""
    key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], 1) for states in (key, value))
    scores = torch.einsum("bhqe,bhke->bhqk", query, key) * scaling
    scores = scores if not cap else cap * torch.tanh(scores / cap)
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value


def who_sees_whom(groups, window):
    """q sees k: same group, k in the prompt or q's completion, 0 <= position_q - position_k < window."""
    tokens = []  # (group, completion or None for the prompt, position)
    for g, (prompt, lengths) in enumerate(groups):
        tokens += [(g, None, p) for p in range(prompt)]
        tokens += [(g, c, prompt + p) for c, length in enumerate(lengths) for p in range(length)]
    visible = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for q, (group, completion, position) in enumerate(tokens):
        for k, (other, part, place) in enumerate(tokens):
            near = 0 <= position - place < (window or 10**9)
            visible[q, k] = near and group == other and part in (None, completion)
    return visible


@ROW
@SETTING
def test_attend_is_the_rule(row, window, cap):
    # red: tril() without the diagonal; is_causal for a second completion; triu(... + 2); no tanh
    query, key, value = random_heads(ROWS[row])
    layout = attention.layout(ROWS[row])
    out, _ = attention.attend(None, query, key, value, None, attention.Sealed(layout), 0.7, 0.0, window, cap)
    expected = softmax_attention(query, key, value, who_sees_whom(ROWS[row], window), 0.7, cap)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-12, atol=1e-12)


def varlen(q, k, v, query_offsets, key_offsets, left, scaling, cap):
    """What the kernels document: causal, aligned at the bottom right, `left` keys before the query; one head
    size, a multiple of 8."""
    assert q.shape[2] == k.shape[2] == v.shape[2] and q.shape[2] % 8 == 0
    parts = []
    for s in range(len(query_offsets) - 1):
        (first, last), (start, stop) = query_offsets[s : s + 2].tolist(), key_offsets[s : s + 2].tolist()
        n, m = last - first, stop - start
        distance = (torch.arange(n)[:, None] + m - n) - torch.arange(m)[None]  # (n, m)
        visible = (distance >= 0) & ((left < 0) | (distance <= left))
        segment = (t.transpose(0, 1)[None] for t in (q[first:last], k[start:stop], v[start:stop]))
        parts.append(softmax_attention(*segment, visible, scaling, cap)[0].transpose(0, 1))
    return torch.cat(parts)  # (T, H, E)


@pytest.mark.parametrize("backend", ["flash-attn", "torch"])
@ROW
@SETTING
def test_varlen_kernels_fed_by_the_layout_equal_the_loop(monkeypatch, backend, row, window, cap):
    """_varlen with its kernel replaced by the emulation; torch's real signature must accept the call."""
    # red: key_offsets from query_sizes; `left = window`; keys without the prompt of a second completion
    signature = inspect.signature(torch.nn.attention.varlen.varlen_attn)

    def flash(q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, window_size, softcap):
        assert causal and window_size[1] == 0
        assert (max_q, max_k) == (cu_q.diff().max(), cu_k.diff().max())
        return varlen(q, k, v, cu_q, cu_k, window_size[0], softmax_scale, softcap)

    def torch_varlen(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        assert given.get("enable_gqa", True) and given["window_size"][1] == 0
        return varlen(*args[:5], given["window_size"][0], given["scale"], None)

    module = types.SimpleNamespace(flash_attn_varlen_func=flash) if backend == "flash-attn" else None
    monkeypatch.setitem(sys.modules, "flash_attn", module)  # None makes the import fail
    monkeypatch.setattr(attention, "_flash_attn", functools.cache(attention._flash_attn.__wrapped__))
    monkeypatch.setattr(attention, "varlen_attn", torch_varlen)
    query, key, value = random_heads(ROWS[row])
    layout = attention.layout(ROWS[row])
    assert layout.query_offsets.dtype == layout.key_offsets.dtype == torch.int32
    if backend == "torch" and cap is not None:
        with pytest.raises(ValueError, match="flash-attn"):
            attention._varlen(query, key, value, layout, 0.7, window, cap)
        return
    for wide, narrow in ((8, 8), (6, 3)):  # and values narrower than keys, as in latent attention
        parts = (query[..., :wide], key[..., :wide], value[..., :narrow])
        heads = [states.detach().requires_grad_() for states in parts]
        expected, _ = attention.attend(None, *heads, None, attention.Sealed(layout), 0.7, 0.0, window, cap)
        out = attention._varlen(*heads, layout, 0.7, window, cap)
        torch.testing.assert_close(out, expected)
        upstream = torch.randn_like(out)
        wanted = torch.autograd.grad(expected, heads, upstream)
        torch.testing.assert_close(torch.autograd.grad(out, heads, upstream), wanted)


def test_gradients_of_a_prompts_copies_add_up_in_fp32():
    # red: index_select in its place, whose gradients stay at 256 after the first
    states = torch.zeros(1, 1, 8, dtype=torch.bfloat16, requires_grad=True)
    copies = attention._Gathered.apply(states, torch.zeros(300, dtype=torch.long))
    copies.backward(torch.ones_like(copies))
    assert states.grad.unique().tolist() == [300]


CONFIGURED = {  # what CUDA's kernels cannot do in 16 bits, and a part of what is said
    "wide": ({"head_dim": 512}, "heads of 512"),
    "wide values": ({"head_dim": 64, "v_head_dim": 264}, "heads of 264"),
    "latent": ({"qk_nope_head_dim": 192, "qk_rope_head_dim": 128}, "heads of 320"),
    "no head_dim": ({"hidden_size": 1200}, "heads of 300"),
    "soft-cap": ({"attn_logit_softcapping": 50.0}, "flash-attn"),
    "plain": ({"head_dim": 100, "hidden_size": 4096}, None),
}


@pytest.mark.parametrize("name", CONFIGURED)
def test_what_no_kernel_computes_is_refused_when_a_model_is_chosen(monkeypatch, name):
    # red: the head's size alone; the refusal on a CPU too, or in fp32
    monkeypatch.setattr(attention, "_flash_attn", lambda: None)
    settings, said = CONFIGURED[name]
    text = types.SimpleNamespace(**{"hidden_size": 64, "num_attention_heads": 4} | settings)
    config = types.SimpleNamespace(get_text_config=lambda: text)
    attention.refuse(config, "cpu", torch.bfloat16)
    attention.refuse(config, "cuda", torch.float32)
    with pytest.raises(ValueError, match=said) if said else contextlib.nullcontext():
        attention.refuse(config, "cuda", torch.bfloat16)


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 4, 9])
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_tiles_change_nothing(monkeypatch, rows, window, cap):
    # red: `reach` of the segment's first query for all tiles; keys of a tile that begin at 0 in spite of `hidden`
    groups = [(7, [9, 3]), (0, [11]), (1, [3, 8, 2])]
    upstream = None
    found = []
    for size in (256, rows):
        monkeypatch.setattr(attention, "TILE_ROWS", size)
        heads = [states.detach().requires_grad_() for states in random_heads(groups)]
        out, _ = attention.attend(None, *heads, None, attention.Sealed(attention.layout(groups)), 0.7, 0.0, window, cap)
        upstream = torch.randn_like(out) if upstream is None else upstream
        found.append([out, *torch.autograd.grad(out, heads, upstream)])
    for whole, tiled in zip(*found):
        torch.testing.assert_close(tiled, whole, rtol=1e-10, atol=1e-12)
    assert len(list(attention._tiles(attention.layout(groups), 4, window))) > 6


@pytest.mark.parametrize("name", ["layout", "dropout", "s_aux", "attention_mask", "encoder"])
def test_attend_refuses_what_it_cannot_do(name):
    query, key, value = random_heads(ROWS["one"])
    module = types.SimpleNamespace(is_causal=name != "encoder")
    right = {"attention_mask": None, "layout": attention.Sealed(attention.layout(ROWS["one"]))}
    wrong = {"layout": None, "dropout": 0.1, "s_aux": torch.ones(4), "attention_mask": torch.ones(1, 1, 9, 9)}
    with pytest.raises(ValueError, match=r"^[^\n]*$"):
        attention.attend(module, query, key, value, **right | {k: wrong[k] for k in wrong if k == name})
