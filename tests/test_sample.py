"""Sampling: the prompts are training's, an answer depends on its seed alone, and the text says what was said.

`red:` names a change of the code that turns a test red.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import test_attention
import test_law as law
import torch
import transformers as hf
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

import chat
import encode
import formats
import fsdp
import generation
import judge
import label
import parts
import sample
from generation import Sampling

TINY = ROOT / "examples" / "tiny"
HH = ROOT / "examples" / "hh_test.jsonl"
STOP = [2, *range(100, 1100)]  # an eighth of the vocabulary
SIX = ("llama", "gpt2", "gpt-neox", "gemma2", "qwen3", "opt")


@pytest.fixture(autouse=True)
def no_group():
    """A script that fails leaves its process group behind."""
    yield
    fsdp.finish()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small model whose answers end now and then."""
    where = tmp_path_factory.mktemp("sample") / "model"
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.AutoConfig.from_pretrained(TINY, **sizes, num_key_value_heads=2, head_dim=16)
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    lm.generation_config.eos_token_id = STOP
    lm.save_pretrained(where)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(where)
    return where


def command(saved, out, *flags, data=HH):
    chosen = ["--model", saved, "--data", data, "--out", out, "--dtype", "float32", "--device", "cpu"]
    return [str(part) for part in (*chosen, "--max-new-tokens", 8, "--prompts", 40, *flags)]


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- ids


CONVERSATIONS = [["hello", "the cat"], ["one two", "three", "four five", "user 1234"], ["a\n\nb", "Ünïcödé 🙂"]]


@pytest.mark.parametrize("kind", law.KINDS)
@pytest.mark.parametrize("name", law.FAMILIES)
def test_training_and_sampling_see_the_same_ids(name, kind):
    """What sampling starts from is what training puts before the answer; what training teaches, sampling reads
    back as the very answer. red: the prompt tokenised with special tokens; without `removeprefix(lead)`."""
    made = law.setting(name, kind)
    limits = (made.tokenizer, 999, 500, made.template)
    for said in CONVERSATIONS:
        roles = ("user", "assistant") * len(said)
        turns = [{"role": role, "content": text} for role, text in zip(roles, said)]
        example = formats.Example(turns[:-1], [said[-1]], [1.0], labelled=False)
        found = encode.encode(example, *limits)
        ids = encode.prompt_ids(example, made.tokenizer, 500, made.template)
        if isinstance(found, str):
            assert name == "opening and dropping", found  # leaves nothing of an answer
            continue
        assert ids == found.prompt
        lead = chat.lead(made.tokenizer, turns[:-1], made.template, {})
        read = chat.answer_text(made.tokenizer, ids, found.completions[0], made.template, lead)
        if "<unk>" in law.decoded(made.tokenizer, found.completions[0]):
            continue  # letters that this tokenizer does not know
        thought = "<think>\n\n</think>\n\n"  # which "opening" has already written
        assert read.removeprefix(thought) in (said[-1], f" {said[-1]}" * (kind in law.SPACED)), (read, lead)


def test_a_prompt_that_is_too_long_or_unusable():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    template = chat.chat_template(tokenizer, None)
    long = [{"role": "user", "content": "word " * 99}]
    example = formats.Example(long, ["a"], [1.0])
    found = encode.encode(example, tokenizer, 64, 32, template)
    assert encode.prompt_ids(example, tokenizer, 32, template) == found.prompt and len(found.prompt) == 32
    assert "nothing of the prompt fits" in encode.prompt_ids(example, tokenizer, 3, template)
    rendered = formats.Example([{"role": "user", "content": "<|im_end|>"}], [], [])
    assert "special token" in encode.prompt_ids(rendered, tokenizer, 32, template)
    assert "no token that begins" in encode.prompt_ids(formats.Example([], ["a"], [1.0]), tokenizer, 9, template)


# ---- one answer


def tiny(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(test_attention.CONFIGS[name](), dtype=torch.float32).eval()


@pytest.mark.parametrize("name", SIX)
def test_what_else_is_in_the_batch_changes_no_answer(name):
    """Greedy, against transformers one at a time; sampled, alone against together. red: padding on the right;
    one generator for the whole batch."""
    lm = tiny(name)
    lm.generation_config.repetition_penalty = 9.0  # of the model's own directory: it does not count
    size = lm.config.get_text_config().vocab_size
    draw = torch.Generator().manual_seed(1)
    lengths = (1, 9, 4, 13)
    prompts = [torch.randint(3, size, (n,), generator=draw).tolist() for n in lengths]
    stop, seeds = [5, 7], [11, 12, 13, 14]
    greedy = generation.generate(lm, prompts, seeds, stop, Sampling(12, temperature=0.0))
    lm.generation_config.repetition_penalty = None
    for prompt, found in zip(prompts, greedy):
        whole = lm.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False, max_new_tokens=12, eos_token_id=stop, pad_token_id=0,
        )  # fmt: skip
        whole = whole[0, len(prompt) :].tolist()
        assert found == whole[: -1 if whole[-1] in stop else None]
    for how in (Sampling(12), Sampling(12, temperature=0.7, top_p=0.9, top_k=20)):
        together = generation.generate(lm, prompts, seeds, stop, how)
        alone = [generation.generate(lm, [p], [s], stop, how)[0] for p, s in zip(prompts, seeds)]
        assert together == alone
        assert together != generation.generate(lm, prompts, seeds[::-1], stop, how)
    for ids in (*greedy, *together):
        assert not {*stop} & {*ids} and len(ids) <= 12


def test_tokens_are_drawn_from_the_distribution():
    """Chi-square of 4,000 first tokens against softmax. red: `scores + noise`; log of the noise left out."""
    lm = tiny("llama")
    prompt = [3, 4, 5]
    with torch.no_grad():
        logits = lm(torch.tensor([prompt])).logits[0, -1].double()
    for how in (Sampling(1), Sampling(1, temperature=0.5), Sampling(1, top_k=4), Sampling(1, top_p=0.6)):
        p = (logits / how.temperature).softmax(-1)
        order = p.argsort(descending=True)
        kept = order[: how.top_k or None]
        if how.top_p < 1:
            kept = order[: int((p[order].cumsum(0) < how.top_p).sum()) + 1]
        expected = torch.zeros_like(p)
        expected[kept] = p[kept] / p[kept].sum()
        found = Counter()
        for first in range(0, 4000, 500):
            seeds = range(first, first + 500)
            answers = generation.generate(lm, [prompt] * 500, seeds, [], how)
            found.update(ids[0] for ids in answers)
        counts = torch.tensor([found[id] for id in range(len(p))], dtype=torch.float64)
        assert counts[expected == 0].sum() == 0
        often = 4000 * expected > 5
        rest = ((4000 - counts[often].sum()) - 4000 * (1 - expected[often].sum())) ** 2
        rest = rest / (4000 * (1 - expected[often].sum())).clamp(min=1)
        chi = ((counts - 4000 * expected)[often] ** 2 / (4000 * expected)[often]).sum() + rest
        freedom = int(often.sum())
        assert chi < freedom + 5 * (2 * freedom) ** 0.5 + 5


def test_what_ends_an_answer(saved):
    """The model's own generation_config, else its config, and the end of turn of the template."""
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(saved), AutoTokenizer.from_pretrained(saved)
    lm.generation_config.eos_token_id = 0
    assert generation.stops(lm, tokenizer, chat.chat_template(tokenizer, None)) == [0, 2]
    tokenizer.eos_token = "<|endoftext|>"
    assert generation.stops(lm, tokenizer, chat.chat_template(tokenizer, None)) == [0, 2]
    assert generation.stops(lm, tokenizer, chat.chat_template(tokenizer, "none")) == [0]
    lm.generation_config.eos_token_id = [1, 3]
    assert generation.stops(lm, tokenizer, chat.chat_template(tokenizer, "none")) == [0, 1, 3]


# ---- the script


@pytest.fixture(scope="module")
def whole(saved, tmp_path_factory):
    """The file as one process makes it at once."""
    out = tmp_path_factory.mktemp("whole") / "answers.jsonl"
    sample.main(command(saved, out, "--answers", 2))
    return out


def test_rows(saved, whole, capsys):
    """Ours, readable as answers to the data's own prompts; no stop token in any text. red: kept ids not
    filtered."""
    found = rows(whole)
    assert [row["id"] for row in found] == [f"{i}-{k}" for i in range(40) for k in range(2)]
    asked = [formats.parse(row).prompt for row in rows(HH)[:40]]
    for index, row in enumerate(found):
        assert row["prompt"] == asked[index // 2]
        assert isinstance(formats.parse(row), formats.Example) or not row["completion"].strip()
        assert "<|im_end|>" not in row["completion"] and "<|pad|>" not in row["completion"]
    tokenizer = AutoTokenizer.from_pretrained(saved)
    sizes = [len(tokenizer(row["completion"]).input_ids) for row in found]
    assert min(sizes) < 3 and len({row["completion"] for row in found}) > 40
    before = os.stat(whole).st_mtime_ns
    sample.main(command(saved, whole, "--answers", 2))
    assert "nothing to do" in capsys.readouterr().out and os.stat(whole).st_mtime_ns == before


def test_neither_batches_nor_processes_change_the_file(saved, whole, tmp_path):
    """red: seeds by the place in the batch; a rank's parts numbered by itself."""
    sample.main(command(saved, tmp_path / "small.jsonl", "--answers", 2, "--batch-size", 3))
    assert (tmp_path / "small.jsonl").read_bytes() == whole.read_bytes()
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "sample.py"]
    two += command(saved, tmp_path / "two.jsonl", "--answers", 2)
    done = subprocess.run(two, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two.jsonl").read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir() if "two" in path.name) == [
        "two.jsonl",
        "two.jsonl.args.json",
    ]


def test_killed_it_goes_on(saved, whole, tmp_path):
    """SIGKILL after the first part; then the same command. red: parts written in place; the file written as
    it goes."""
    out = tmp_path / "answers.jsonl"
    argv = command(saved, out, "--answers", 2, "--batch-size", 1)
    process = subprocess.Popen([sys.executable, "sample.py", *argv], cwd=ROOT, stdout=subprocess.DEVNULL)
    limit = time.time() + 120
    while not parts.is_done(str(out), 0) and process.poll() is None and time.time() < limit:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert parts.is_done(str(out), 0) and not out.exists()
    first = (parts.folder(str(out)) / "0.jsonl").stat().st_mtime_ns
    with pytest.raises(SystemExit):  # other flags would be another file
        sample.main(command(saved, out, "--answers", 2, "--seed", 1))
    assert (parts.folder(str(out)) / "0.jsonl").stat().st_mtime_ns == first
    sample.main(argv)
    assert out.read_bytes() == whole.read_bytes() and not parts.folder(str(out)).exists()


def test_plain_text_lends_its_beginning(saved, tmp_path):
    texts = ["This film was quite a good one, with nice actors and more.", "It bored me. Truly it did, all of it."]
    data = tmp_path / "reviews.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * 9), encoding="utf-8")
    out = tmp_path / "o.jsonl"
    sample.main(command(saved, out, "--chat-template", "none", "--prompt-tokens", 8, data=data))
    tokenizer = AutoTokenizer.from_pretrained(saved)
    sizes = set()
    for row, text in zip(rows(out), texts * 9):
        assert text.startswith(row["prompt"])
        sizes.add(len(tokenizer(row["prompt"]).input_ids))
    assert {2, 8} <= sizes <= set(range(2, 9))


def test_tools_and_conversations_go_along(saved, tmp_path):
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "abcd")]
    data = tmp_path / "d.jsonl"
    arguments = {"enable_thinking": False}
    given = [{"messages": turns, "chat_template_kwargs": arguments}, {"prompt": "a"}, {"prompt": "<|im_end|>"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    sample.main(command(saved, tmp_path / "o.jsonl", data=data))
    first, second = rows(tmp_path / "o.jsonl")
    assert first["prompt"] == turns[:3] and first["chat_template_kwargs"] == arguments
    assert second["id"] == "1-0" and second["prompt"] == turns[:1]


def test_alpaca_eval(saved, whole, tmp_path):
    """The file that its judge reads: a JSON list of instruction, output, generator, dataset."""
    out = tmp_path / "outputs.json"
    sample.main(command(saved, out, "--format", "alpaca_eval", "--answers", 2))
    found = json.loads(out.read_text(encoding="utf-8"))
    assert len(found) == 80
    for row, plain in zip(found, rows(whole)):
        assert set(row) == {"instruction", "output", "generator", "dataset"}
        assert row["output"] == plain["completion"] and row["instruction"] == plain["prompt"][-1]["content"]
        assert row["generator"] == saved.name and row["dataset"] == str(HH)


def test_a_conditioned_model_is_asked_for_the_good_token(saved, tmp_path, monkeypatch):
    """red: `good` left out."""
    tokenizer = AutoTokenizer.from_pretrained(saved)
    tokenizer.chat_template += chat.ASK_FOR_GOOD
    lm = AutoModelForCausalLM.from_pretrained(saved)
    tokenizer.add_tokens(list(chat.CONTROL_TOKENS), special_tokens=True)
    lm.resize_token_embeddings(len(tokenizer))
    lm.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    seen = []
    whole = generation.generate
    monkeypatch.setattr(generation, "generate", lambda lm, prompts, *more: seen.extend(prompts) or whole(lm, prompts, *more))
    sample.main(command(tmp_path / "m", tmp_path / "o.jsonl", "--prompts", 2))
    good = tokenizer.convert_tokens_to_ids(chat.CONTROL_TOKENS[0])
    opened = tokenizer.decode(seen[0])
    assert len(seen) == 2 and all(ids[-1] == good and good not in ids[:-1] for ids in seen)
    assert opened.endswith("<|im_start|>assistant\n" + chat.CONTROL_TOKENS[0])
    assert not any(token in row["completion"] for row in rows(tmp_path / "o.jsonl") for token in chat.CONTROL_TOKENS)


def test_an_adapter_is_its_base_model_with_it_merged(saved, tmp_path):
    peft = pytest.importorskip("peft", reason="peft, an extra, is not installed")
    lm = AutoModelForCausalLM.from_pretrained(saved)
    made = peft.get_peft_model(lm, peft.LoraConfig(r=4, target_modules="all-linear", lora_alpha=64))
    torch.manual_seed(0)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    made.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(saved).save_pretrained(tmp_path / "adapter")
    merged = made.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(saved).save_pretrained(tmp_path / "merged")
    found = []
    for name in ("adapter", "merged"):
        sample.main(command(tmp_path / name, tmp_path / f"{name}.jsonl", "--prompts", 4, "--temperature", 0))
        found.append(rows(tmp_path / f"{name}.jsonl"))
    assert found[0] == found[1]
    sample.main(command(saved, tmp_path / "base.jsonl", "--prompts", 4, "--temperature", 0))
    assert rows(tmp_path / "base.jsonl") != found[0]


MISTAKES = {
    "--top-p must be <= 1": ["--top-p", "1.5"],
    "a weight is for training": ["--data", f"{HH}:0.5"],
    "must be a file": ["--out", str(ROOT)],
    "was not made by this program": ["--out", str(HH)],
    "no such model directory": ["--model", "./nowhere"],
    "exceed the 2048 positions": ["--max-new-tokens", "2000"],
    "no prompt in it": ["--max-prompt-length", "2"],
    "vllm is not installed": ["--engine", "vllm"],
    "not one of plain": ["--chat-template", "nowhere.jinja"],
    "must be a whole number": ["--answers", "two"],
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_are_one_line(saved, tmp_path, what, capsys):
    with pytest.raises(SystemExit) as stop:
        sample.main(command(saved, tmp_path / "o.jsonl", *MISTAKES[what]))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and said.startswith("error: ") and what in said
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto is the GPU")
def test_auto_that_is_a_cpu_is_said(saved, tmp_path, capsys):
    """By all that load a model and do not train it. red: a script without precision.device."""
    said = "--device auto: no CUDA device is visible, so on the CPU, in float32\n"
    with pytest.raises(SystemExit):
        sample.main(command(saved, tmp_path / "o.jsonl", "--device", "auto", "--max-prompt-length", 2))
    assert capsys.readouterr().out == said
    for script, flags in (label, ["--data", HH, "--out", tmp_path / "l.jsonl"]), (judge, ["--data", HH, "--against", HH]):
        with pytest.raises(SystemExit):
            script.main([str(part) for part in [*flags, "--by", saved]])
        assert capsys.readouterr().out == said


# ---- during training


def test_samples_during_training_change_nothing(saved, tmp_path):
    """Through FSDP, two processes write what one does, and the weights are those of a run without. red: the
    model left on its own attention, or in evaluation mode; `torch.manual_seed` for the noise."""
    flags = ["--model", saved, "--data", HH, "--eval-data", HH, "--batch-size", 4, "--steps", 4, "--eval-every", 2]
    flags += ["--eval-examples", 4, "--dtype", "float32", "--device", "cpu", "--max-length", 64, "--lr", "3e-2"]
    runs = {"with": (1, 2), "two": (2, 2), "without": (1, 0)}
    for name, (processes, shown) in runs.items():
        argv = [*flags, "--sample-prompts", shown, "--out", tmp_path / name, "--warmup-steps", 0]
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] * (processes == 2)
        line = [sys.executable, *start, "sft.py", *map(str, argv)]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    weights = [(tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("with", "without")]
    assert weights[0] == weights[1]
    texts = {}
    for step in (0, 2, 4):
        texts[step], other = (
            (tmp_path / name / "samples" / f"step-{step}.txt").read_text("utf-8") for name in ("with", "two")
        )
        assert step or texts[step] == other  # later the weights differ by rounding
        assert texts[step].count("======== 2: policy") == 1 and "======== 3" not in texts[step]
    assert texts[0].split("======== 1: policy")[1] != texts[4].split("======== 1: policy")[1]
    assert not (tmp_path / "without" / "samples").exists()
