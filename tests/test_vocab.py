"""The chunked head against a plain (N, V) head in autograd, and against finite differences."""

import functools
import math

import pytest
import torch

import risk
import vocab

MEASURES = {
    "kl": risk.kl,
    "cvar": functools.partial(risk.cvar, confidence_level=0.7),
    "erm": functools.partial(risk.erm, risk_aversion=0.8),
    "published": functools.partial(risk.published, confidence_level=0.8),
}


def case(n=7, d=5, v=23, dtype=torch.float64, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    hidden = normal(n, d).requires_grad_()
    weight = normal(v, d).requires_grad_()
    offset = normal(v).requires_grad_() if bias else None
    ref = (normal(n, d), vocab.Head(normal(v, d), normal(v) if bias else None))
    targets = torch.randint(0, v, (n,), generator=g)
    return hidden, weight, offset, ref, targets


def plain(hidden, head, targets, ref, measure):
    """The same statistics with full logits and autograd; the measure's weights held fixed, as d risk / d x =
    q."""

    def logits(h, head):
        z = (h @ head.weight.T + (0 if head.bias is None else head.bias)) * head.scale
        return head.softcap * torch.tanh(z / head.softcap) if head.softcap else z

    logps = logits(hidden, head).log_softmax(-1)
    ref_logps = logits(*ref).log_softmax(-1)
    cost = ref_logps - logps
    q = measure(cost, ref_logps.exp()).weights
    value = measure(cost, ref_logps.exp()).value
    drift = (q * cost).sum(-1)
    drift = drift + (value - drift).detach()  # erm's value is not sum q x, its gradient is
    pick = targets[:, None]
    kl = (ref_logps.exp() * cost).sum(-1)
    return logps.gather(-1, pick)[:, 0], ref_logps.gather(-1, pick)[:, 0], kl, drift


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("name", MEASURES)
def test_gradients_by_finite_differences(name, chunk):
    hidden, weight, bias, ref, targets = case()

    def run(hidden, weight, bias):
        head = vocab.Head(weight, bias, 4.0, 0.7)
        reference = (ref[0], ref[1]._replace(softcap=4.0, scale=0.7))
        out = vocab.token_statistics(hidden, head, targets, reference, MEASURES[name], "risk", chunk)
        return out.logps, out.risk

    # red when the softcap's slope, the head's scale or sum(q) is left out of the backward
    assert torch.autograd.gradcheck(run, (hidden, weight, bias), eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("chunk", [2, 100])
def test_added_rows_are_those_of_the_weight_and_nothing_reaches_what_they_stand_in(chunk):
    # red: own.zero_() or through_added left out; the slope of grad_added's part left out
    hidden, weight, bias, ref, targets = case()
    rows = torch.randn(2, weight.shape[1], dtype=torch.float64).requires_grad_()
    targets[:3] = torch.tensor([10, 11, 12])
    whole = weight.index_copy(0, torch.tensor([11, 12]), rows)
    leaves = (hidden, weight, bias, rows)
    found = []
    for head in (vocab.Head(weight, bias, 4.0, 0.7, rows, 11), vocab.Head(whole, bias, 4.0, 0.7)):
        out = vocab.token_statistics(hidden, head, targets, ref, MEASURES["cvar"], "risk", chunk)
        loss = (out.logps - 2 * out.risk) @ torch.linspace(-1, 2, len(targets), dtype=torch.float64)
        found.append((out.logps, out.ref_logps, out.kl, out.risk, *torch.autograd.grad(loss, leaves)))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
    assert found[0][-1].norm() > 0.1 and not found[0][5][11:13].any()


@pytest.mark.parametrize("through", [None, "kl", "risk"])
@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_plain_head(name, through, softcap, bias):
    hidden, weight, offset, ref, targets = case(n=11, v=40, bias=bias, seed=3)
    ref = (ref[0], ref[1]._replace(softcap=softcap))
    head = vocab.Head(weight, offset, softcap)
    got = vocab.token_statistics(hidden, head, targets, ref, MEASURES[name], through, 4)
    want = plain(hidden, head, targets, ref, MEASURES[name])
    for mine, theirs in zip(got, want):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    assert got.ref_logps.requires_grad is False
    coefficient = torch.linspace(-1, 1, 11, dtype=torch.float64)
    drift = {None: 0, "kl": 2, "risk": 3}[through]
    inputs = [t for t in (hidden, weight, offset) if t is not None]
    grads = []
    for values in (got, want):
        total = (values[0] * coefficient).sum()
        if drift:
            total = total + (values[drift] * coefficient.flip(0)).sum()
        grads.append(torch.autograd.grad(total, inputs))
    for mine, theirs in zip(*grads):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


def test_only_the_named_drift_has_a_gradient():
    hidden, weight, bias, ref, targets = case()
    for through in (None, "kl", "risk"):
        out = vocab.token_statistics(
            hidden, vocab.Head(weight, bias), targets, ref, MEASURES["cvar"], through
        )
        assert (out.kl.requires_grad, out.risk.requires_grad) == (through == "kl", through == "risk")
    with pytest.raises(ValueError, match="needs a reference"):
        vocab.token_statistics(hidden, vocab.Head(weight, bias), targets, None, None, "kl")
    with pytest.raises(ValueError, match="measure"):
        vocab.token_statistics(hidden, vocab.Head(weight, bias), targets, ref, None, "risk")


def test_frozen_head_gets_no_gradient_and_no_reference_means_none():
    hidden, weight, bias, _, targets = case()
    out = vocab.token_statistics(hidden, vocab.Head(weight.detach(), bias.detach()), targets)
    assert out.ref_logps is None and out.kl is None and out.risk is None
    out.logps.sum().backward()
    assert hidden.grad is not None and weight.grad is None and bias.grad is None


@pytest.mark.parametrize("tile", [1, 3, 8])
@pytest.mark.parametrize("chunk", range(1, 9))
def test_chunk_and_tile_change_nothing(chunk, tile, monkeypatch):
    """Red when a tile that ends a chunk reaches into the next."""
    hidden, weight, bias, ref, targets = case(n=8, dtype=torch.float64)
    head = vocab.Head(weight, bias)
    results = []
    for size, rows in ((chunk, tile), (8, 8)):
        monkeypatch.setattr(vocab, "TILE_BYTES", rows * weight.shape[0] * weight.element_size())
        out = vocab.token_statistics(hidden, head, targets, ref, MEASURES["cvar"], "risk", size)
        grads = torch.autograd.grad(
            (out.logps * out.risk.detach()).sum() + out.risk.sum(), (hidden, weight, bias)
        )
        results.append([*out, *grads])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("through", [None, "risk"])
def test_a_second_backward_pass_gives_the_same_gradients(through):
    """Red when what the first pass has freed is not made again."""
    hidden, weight, bias, ref, targets = case()
    out = vocab.token_statistics(hidden, vocab.Head(weight, bias), targets, ref, MEASURES["cvar"], through, 3)
    total = out.logps.sum() + (out.risk.sum() if through else 0.0)
    leaves = (hidden, weight, bias)
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    assert out.logps.grad_fn.projections is None  # copies of the weights end with the backward pass
    assert all(torch.equal(one, other) for one, other in zip(first, torch.autograd.grad(total, leaves)))


def test_no_positions_at_all():
    """A mismatched answer of one token to an empty prompt has none to train."""
    hidden, weight, bias, ref, _ = case(n=2)
    empty = hidden[:0]
    nothing = torch.zeros(0, dtype=torch.long)
    reference = (ref[0][:0], ref[1])
    out = vocab.token_statistics(
        empty, vocab.Head(weight, bias), nothing, reference, MEASURES["cvar"], "risk"
    )
    assert [len(series) for series in out[:4]] == [0, 0, 0, 0]
    (out.logps.sum() + out.risk.sum()).backward()
    assert not weight.grad.any() and not bias.grad.any()


@pytest.mark.parametrize("name", ["kl", "cvar", "erm", "published"])
def test_permuting_the_vocabulary_changes_nothing(name):
    hidden, weight, bias, ref, targets = case(v=24)
    measure = MEASURES[name]
    if name == "published":
        measure = functools.partial(risk.published, confidence_level=0.8, split=False)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    inverse = order.argsort()
    results = []
    for permutation, wanted in ((torch.arange(24), targets), (order, inverse[targets])):
        head = vocab.Head(weight[permutation], bias[permutation])
        reference = (ref[0], vocab.Head(ref[1].weight[permutation], ref[1].bias[permutation]))
        out = vocab.token_statistics(hidden, head, wanted, reference, measure, "risk", 3)
        results.append([*out, *torch.autograd.grad(out.risk.sum() + out.logps.sum(), (hidden, weight, bias))])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_operands_against_fp64(dtype):
    """The same operand values in fp64: only products and sums may differ. bf16 logits would err by 3e-2."""
    n, d, v = 40, 64, 3000
    g = torch.Generator().manual_seed(5)
    weight = (torch.randn(v, d, generator=g) / math.sqrt(d)).to(dtype)
    ref_hidden = torch.randn(n, d, generator=g) * 3
    hidden = (ref_hidden + 0.02 * torch.randn(n, d, generator=g)).to(dtype)
    ref_hidden = ref_hidden.to(dtype)
    targets = torch.randint(0, v, (n,), generator=g)
    results = []
    for wide in (dtype, torch.float64):
        h = hidden.to(wide).requires_grad_()
        w = weight.to(wide).requires_grad_()
        reference = (ref_hidden.to(wide), vocab.Head(weight.to(wide)))
        out = vocab.token_statistics(h, vocab.Head(w), targets, reference, MEASURES["cvar"], "risk", 16)
        out_dtype = torch.float64 if wide == torch.float64 else torch.float32
        assert all(part.dtype == out_dtype for part in out if part is not None)
        grads = torch.autograd.grad((out.logps - out.risk).sum(), (h, w))
        assert grads[0].dtype == wide
        results.append(([part.detach().double() for part in out[:4]], [grad.double() for grad in grads]))
    (low, low_grads), (exact, exact_grads) = results
    for mine, theirs in zip(low, exact):
        assert (mine - theirs).abs().max() < 5e-6 * max(1.0, theirs.abs().max())
    for mine, theirs in zip(low_grads, exact_grads):
        # cvar's weights jump where two costs tie within rounding, so fp32 cannot be held to its own rounding
        bound = 3e-4 if dtype == torch.float32 else 1e-2
        assert (mine - theirs).norm() < bound * theirs.norm()


def test_same_weights_give_exact_zeros():
    hidden, weight, bias, _, targets = case(n=30, d=16, v=500, dtype=torch.float32)
    head = vocab.Head(weight, bias)
    reference = (hidden.detach().clone(), vocab.Head(weight.detach().clone(), bias.detach().clone()))
    for name in ("kl", "cvar", "erm", "published"):
        out = vocab.token_statistics(hidden, head, targets, reference, MEASURES[name], "risk", 7)
        assert torch.equal(out.logps, out.ref_logps)
        assert out.kl.abs().max() == 0
        assert out.risk.abs().max() == 0, name


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_no_vocabulary_axis_outlives_a_chunk(mode):
    """What save_for_backward keeps, and every tensor that an operation makes, is smaller than two chunks of
    logits."""
    n, d, v, chunk = 64, 4, 1000, 4
    hidden, weight, bias, ref, targets = case(n=n, d=d, v=v, dtype=torch.float32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for part in torch.utils._pytree.tree_leaves(out):
                if isinstance(part, torch.Tensor):
                    largest = max(largest, part.numel())
            return out

    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        if mode == "forward":
            with Watch():
                out = vocab.token_statistics(
                    hidden, vocab.Head(weight, bias), targets, ref, MEASURES["cvar"], "risk", chunk
                )
        else:
            out = vocab.token_statistics(
                hidden, vocab.Head(weight, bias), targets, ref, MEASURES["cvar"], "risk", chunk
            )
    if mode == "backward":
        with Watch():
            (out.logps + out.risk).sum().backward()
    assert largest <= max(2 * chunk * v, v * d)  # red when the logits of all n positions exist at once
    assert max(saved) <= v * d


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_entropy_and_its_gradient(chunk):
    """H = -sum_v pi log pi by full logits; red: drop the entropy's term in backward."""
    hidden, weight, bias, ref, targets = case()
    head = vocab.Head(weight, bias, 4.0, 0.7)
    found = vocab.token_statistics(hidden, head, targets, chunk_size=chunk, entropy=True)
    z = 4.0 * torch.tanh((hidden @ weight.T + bias) * 0.7 / 4.0)
    truth = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)
    assert (found.entropy - truth).abs().max() < 1e-12
    upstream = torch.linspace(-1, 1, len(truth), dtype=torch.float64)
    leaves = (hidden, weight, bias)
    mine = torch.autograd.grad((found.entropy * upstream).sum(), leaves)  # logps unused: no gradient given
    theirs = torch.autograd.grad((truth * upstream).sum(), leaves)
    for one, other in zip(mine, theirs):
        assert (one - other).abs().max() < 1e-12
    without = vocab.token_statistics(hidden, head, targets, ref, MEASURES["cvar"], "risk", chunk)
    both = vocab.token_statistics(hidden, head, targets, ref, MEASURES["cvar"], "risk", chunk, True)
    assert without.entropy is None
    assert torch.equal(without.risk, both.risk)
