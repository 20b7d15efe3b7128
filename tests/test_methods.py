"""End to end, method by method: the real scripts on a tiny model against plain transformers.

KTO, BCO, PPO, GRPO, reward models, conditional SFT and the variations of DPO, each by an oracle written from
its definition, on 1 and 2 processes and two budgets; --humanline with every loss that takes it, rows gathered
by prompt, margins of lists, once; every loss of --loss, on 1 and 2 processes; resuming; single responses with
labels; what is refused; and mutations that must not pass.
"""

import json
import math
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import conftest
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_train import ROOT, rows
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import align
import batch
import fsdp
import objective

VOCABULARY = 1024
# Of pairs: w, l the log-ratios of chosen and rejected, nw, nl their lengths, m the margins; and the flags.
PAIR_LOSSES = {
    "dpo": lambda x: -F.logsigmoid(x.beta * (x.w - x.l)),
    "cdpo": lambda x: smoothed(x.beta * (x.w - x.l), 1 - x.epsilon, x.epsilon),
    "robust_dpo": lambda x: smoothed(x.beta * (x.w - x.l), 1 - x.epsilon, -x.epsilon) / (1 - 2 * x.epsilon),
    "odpo": lambda x: -F.logsigmoid(x.beta * (x.w - x.l) - x.m),
    "dpo_norm": lambda x: -F.logsigmoid(x.beta * (x.w / x.nw - x.l / x.nl)),
    "ipo": lambda x: (x.w / x.nw - x.l / x.nl - 1 / (2 * x.tau)) ** 2,
    "hinge": lambda x: (1 - x.beta * (x.w - x.l)).clamp(min=0),
    "exo": lambda x: divergence((x.beta * (x.w - x.l)).sigmoid(), 1 - x.epsilon),
    "nca": lambda x: -F.logsigmoid(x.beta * x.w) - sum(F.logsigmoid(-x.beta * r) / 2 for r in (x.w, x.l)),
    "bco_pair": lambda x: -F.logsigmoid(x.beta * x.w) - F.logsigmoid(-x.beta * x.l),
    "sppo_hard": lambda x: (x.w - 0.5 / x.beta) ** 2 + (x.l + 0.5 / x.beta) ** 2,
    "apo_zero": lambda x: 1 - (x.beta * x.w).sigmoid() + (x.beta * x.l).sigmoid(),
    "apo_down": lambda x: (x.beta * x.w).sigmoid() + 1 - (x.beta * (x.w - x.l)).sigmoid(),
    "discopop": lambda x: modulated(x.beta * (x.w - x.l), x.tau),
}


def smoothed(rho: Tensor, right: float, wrong: float) -> Tensor:
    return -right * F.logsigmoid(rho) - wrong * F.logsigmoid(-rho)


def divergence(q: Tensor, p: float) -> Tensor:
    """Of two coins."""
    return q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()


def modulated(rho: Tensor, tau: float) -> Tensor:
    share = (rho / tau).sigmoid()
    return -(1 - share) * F.logsigmoid(rho) + share * (-rho).exp()


MAX_LENGTH = 76  # every answer fits its own prompt; some do not fit another
LR = 1e-3
EPS = 1e-6
CLIP = 0.05  # below the gradient norms, so that the clip is part of what must agree
VALUE_CLIP = 0.01
BUDGETS = {"one": 100_000, "several": 200}  # tokens per micro-batch


class Kind(NamedTuple):
    loss: str
    rows: str  # the file
    size: int  # --batch-size
    steps: int
    flags: dict[str, Any]  # also the oracle's
    start: str = "policy"  # --model; the other of the two models is the reference


PPO = {"clip": 0.9, "value_weight": 0.5, "kl_weight": 0.2, "entropy_weight": 0.1, "gamma": 0.9}
PPO |= {"max_value_grad_norm": VALUE_CLIP}
HUMANLINE = {"humanline": "true", "log_epsilon_p": -0.1, "log_epsilon_r": 0.05}
KINDS = {
    # from the reference towards the policy the estimate is positive, the other way negative
    "kto": Kind(
        "kto", "mixed", 12, 4, {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.7}, "reference"
    ),
    "kto_back": Kind("kto", "mixed", 12, 1, {"beta": 0.3}),
    "kto_token_max": Kind("kto_token_max", "mixed", 12, 3, {"beta": 0.1, "desirable_weight": 1.3}),
    "bco": Kind("bco", "mixed", 12, 4, {"beta": 0.1}),
    "ppo": Kind("ppo", "mixed", 15, 8, {**PPO, "ppo_epochs": 2}),
    "ppo_scores": Kind("ppo", "lists", 16, 3, {**PPO, "gae_lambda": 0.8, "rewards": "scores"}),
    "grpo": Kind("grpo", "lists", 15, 3, {"beta": 0.04, "epsilon": 0.05}),
    "bradley_terry": Kind("bradley_terry", "pairs", 5, 4, {"center_weight": 0.05}),
    "csft": Kind("csft", "mixed", 5, 4, {"method": "csft"}),
    "dpo_sft": Kind("dpo", "lists", 7, 3, {"beta": 0.1, "pairs": "adjacent", "sft_weight": 0.3}),
    "dpo_humanline": Kind("dpo", "lists", 7, 3, {"beta": 0.1, "pairs": "all", **HUMANLINE}),
    "dpo_sync": Kind("dpo", "pairs", 5, 5, {"beta": 0.1, "sync_reference_every": 2}),
}
EVALUATED = ("kto", "ppo", "bradley_terry")
# --humanline: the first step of every loss that takes it, from a policy beside the reference, where it bites.
CLAMPED = {
    "dpo": {"beta": 0.1},
    "cdpo": {"beta": 0.1, "epsilon": 0.2},
    "robust_dpo": {"beta": 0.1, "epsilon": 0.2},
    "odpo": {"beta": 0.1, "pairs": "all"},
    "dpo_norm": {"beta": 5.0},
    "ipo": {"tau": 0.3},
    "hinge": {"beta": 0.1},
    "exo": {"beta": 0.1, "epsilon": 0.1},
    "nca": {"beta": 0.1},
    "bco_pair": {"beta": 0.1},
    "sppo_hard": {"beta": 0.1},
    "apo_zero": {"beta": 0.1},
    "apo_down": {"beta": 0.1},
    "discopop": {"beta": 0.1, "tau": 0.2},
    "kto": {"beta": 0.1},
    "kto_token_max": {"beta": 0.1},
    "kto_zero": {"beta": 0.1},
    "bco": {"beta": 0.1},
    "apo_zero_unpaired": {"beta": 0.1},
    "ppo": PPO,
    "grpo": {"beta": 0.2, "epsilon": 0.05},
}
TABLES = {"odpo": "margined", "grpo": "lists"}  # else pairs, or mixed
# What runs once, on 1 process.
ONCE = {
    f"clamped {loss}": Kind(
        loss,
        TABLES.get(loss, "pairs" if loss in PAIR_LOSSES else "mixed"),
        9,
        1,
        {**flags, **HUMANLINE},
        "reference" if loss.startswith("kto") else "policy",
    )
    for loss, flags in CLAMPED.items()
}
# Rows of one completion each, gathered by prompt into the lists of which the oracle knows.
GATHERED = {"group_by": "prompt"}
ONCE |= {
    "gathered grpo": Kind("grpo", "gathered", 7, 2, {"beta": 0.04, "epsilon": 0.05, **GATHERED}),
    "gathered dpo": Kind("dpo", "gathered", 5, 2, {"beta": 0.1, "pairs": "all", **GATHERED}),
    "gathered kto": Kind("kto", "gathered", 9, 2, {"beta": 0.3, **GATHERED}, "reference"),
    "gathered bradley_terry": Kind("bradley_terry", "gathered", 5, 2, {"pairs": "all", **GATHERED}),
    "margins of neighbours": Kind("odpo", "margined", 7, 2, {"beta": 0.1, "pairs": "adjacent"}),
    "margins of any two": Kind("bradley_terry", "margined", 7, 2, {"pairs": "all"}),
    "dpo_sync every step": Kind("dpo", "pairs", 5, 4, {"beta": 0.1, "sync_reference_every": 1}),
}
TRUTHS = KINDS | ONCE
# Mutations: the kind, processes, steps, what is replaced in align.py, by what.
OVER_RANKS = "fsdp.sums_over_ranks(tallies)"
# a rank that has a filler alone has counted nothing
THIS_RANK = "{n: sum(t[n] for t in tallies) + torch.tensor([0, 1e-9]).double() for n in tallies[0]}"
ESTIMATE = "kl_estimate=estimate)"
LOCAL = 'kl_estimate=(lambda a, b: a / b)(*tallies.pop(0)["kl_estimate"].float()))'
MEAN, OWN_MEAN = "(f.advantages - ", "(f.advantages - f.advantages.mean() + 0 * "
SPREAD, OWN_SPREAD = "* scale) for f", "/ f.advantages.std(correction=0)) for f"
VALUE_NORM = "(policy.value_head, args.max_value_grad_norm)"
SHARED = 'stats["lengths"])  # (B,)'
SEEN = "given = seen(objective, stats, pack)"
CLAMPED_TOO = SEEN + '; given |= {"token_policy_logps": stats["token_ref_logps"] + given["token_logratios"]}'
SYNC = "(step + 1) % args.sync_reference_every"
COPY, STEP = "fsdp.copy_parameters(policy, reference)", "optimizer.step()\n"
COPY_STEP = f"{COPY}  # the policy before this update, not the one after it\n        {STEP}"
STEP_COPY = f"{STEP}            {COPY}\n"
MUTATIONS = {
    "the KL estimate of a micro-batch": ("kto", 1, 1, ESTIMATE, LOCAL),
    "the KL estimate of a rank": ("kto", 2, 1, OVER_RANKS, THIS_RANK),
    "the KL estimate of the own answers": ("kto", 1, 1, "batch.packs(others, works,", "batch.packs(train, works,"),
    "strangers that are not cut": ("kto", 1, 1, "order), args.max_length)", "order), 9999)"),
    "strangers in the order of the file": ("kto", 1, 1, "prompts, order)", "prompts, range(len(train)))"),
    "no maximum over tokens": ("kto_token_max", 1, 1, "kl_token_max=peaks", "kl_token_max=0 * peaks"),
    "the mean advantage of a micro-batch": ("ppo", 1, 8, MEAN, OWN_MEAN),
    "the spread of the advantages of a micro-batch": ("ppo", 1, 8, SPREAD, OWN_SPREAD),
    "advantages whitened by a rank": ("ppo", 2, 8, OVER_RANKS, THIS_RANK),
    "a critic that trains the body": ("ppo", 1, 8, "value_head(hidden.detach())", "value_head(hidden)"),
    "one clip for policy and critic": ("ppo", 1, 8, VALUE_NORM, "(policy.value_head, args.max_grad_norm)"),
    "phase A before every update": ("ppo", 1, 8, "        if update == 0:", "        if True:"),
    "a mean per rank": ("grpo", 2, 1, "(world_size / number)", "(1 / sum(len(p.ends) for p in packs))"),
    "a delta that stays": ("bco", 1, 4, 'row.get("rewards/mean", 0.0) * many', "0.0 * many"),
    "a delta of the last step": ("bco", 1, 4, "running += torch", "running = torch"),
    "the sum of the chosen answer": ("dpo_sft", 1, 1, SHARED, SHARED.replace(")", " ** 0)", 1)),
    "a log-ratio that is not clamped": ("dpo_humanline", 1, 1, SEEN, "given = stats"),
    "a penalty that is clamped": ("clamped grpo", 1, 1, SEEN, CLAMPED_TOO),
    "an estimate that is not clamped": ("clamped kto", 1, 1, "objective.humanline(logratios)", "logratios"),
    "a reference synced a step late": ("dpo_sync", 1, 5, SYNC, SYNC.replace(" + 1", "")),
    "a reference synced after the update": ("dpo_sync every step", 1, 4, COPY_STEP, STEP_COPY),
    "a score of another token": ("bradley_terry", 1, 1, "pack.ends if ends", "pack.ends - 1 if ends"),
}
RESUMED = {
    "kto": [],
    "ppo": ["--ppo-epochs", 5],
    "bco": [],
    "dpo": ["--sync-reference-every", 2],
    "bradley_terry": [],
}
FORGOTTEN = {  # what a checkpoint must hold besides the policy
    "dpo": ['extra["reference"] = dict(reference.named_parameters())', "pass"],
    "bco": ['{"running": running} if "delta" in objective.needs else {}', "{}"],
}
ALONE = {  # (--loss, file, --batch-size)
    "kto one by one": ("kto", "unary", 1),
    "ppo one by one": ("ppo", "unary", 1),
    "kto of desirable ones": ("kto", "good", 4),
    "kto of undesirable ones": ("kto", "bad", 4),
    "kto_token_max of undesirable ones": ("kto_token_max", "bad", 4),
    "bco of desirable ones": ("bco", "good", 4),
    "ppo of undesirable ones": ("ppo", "bad", 4),
}
WITHOUT_REFERENCE = ("slic", "simpo", "cpo", "orpo")
SEQUENTIAL = ("tdpo1", "tdpo2", "ra_dpo1", "ra_dpo2")
SINGLE = ("apo_zero_unpaired", "bco", "grpo", "kto", "kto_token_max", "kto_zero", "ppo")
WHOLE_STEPS = {1: 8, 2: 3}  # by processes; with a warm-up of 3, the first 3 are the same


# ---- the jobs


def arguments(base: Path, out: Path, table: str, size: int, steps: int, *more: Any) -> list[str]:
    found = [
        "--model", base / "policy", "--data", base / f"{table}.jsonl", "--out", out, "--batch-size", size,
        "--steps", steps, "--lr", LR, "--adam-eps", EPS, "--warmup-steps", 0, "--max-grad-norm", CLIP,
        "--dtype", "float32", "--max-length", MAX_LENGTH, "--device", "cpu", "--log-every", 1000,
        "--activation-checkpointing", "none", "--eval-every", 0, *more,
    ]  # fmt: skip
    if "bradley_terry" not in more:  # which reads whole conversations
        found += ["--max-prompt-length", MAX_LENGTH - 4]
    return [str(part) for part in found]


def of_kind(base: Path, name: str, out: Path, budget: int, *more: Any, mutation: Any = None) -> dict:
    kind = TRUTHS[name]
    flags = ["--tokens-per-microbatch", budget, "--model", base / kind.start]
    flags += [part for key, value in kind.flags.items() for part in (f"--{key.replace('_', '-')}", value)]
    if name in EVALUATED:
        flags += ["--eval-data", base / "held_out.jsonl"]
    if name != "csft":
        flags += ["--loss", kind.loss]
    if kind.loss not in ("csft", "bradley_terry"):
        flags += ["--reference", base / {"policy": "reference", "reference": "policy"}[kind.start]]
    table = "scattered" if "group_by" in kind.flags else kind.rows
    argv = arguments(base, out, table, kind.size, kind.steps, *flags, *more)
    return {"script": "sft.py" if name == "csft" else "align.py", "argv": argv, "mutation": mutation}


def ten_steps(base: Path, loss: str, whole: Path, out: Path) -> list[str]:
    """The flags of a run of ten steps; if it is not the whole one, `out` gets what a kill after the save of
    step 5 leaves, as links to what an earlier job of the launch will have written."""
    if out != whole:
        out.mkdir()
        for name in ("step-5", "metrics.jsonl"):
            (out / name).symlink_to(whole / name)
    more = ["--loss", loss, *RESUMED[loss], "--save-every", 5, "--resume", "auto", "--eval-every", 5]
    more += ["--eval-data", base / "held_out.jsonl"]
    more += [] if loss == "bradley_terry" else ["--reference", base / "reference"]
    return arguments(base, out, "few", 3, 10, *more)


def jobs_of(base: Path, processes: int) -> list[dict]:
    jobs = []
    for name in KINDS:
        for budget, tokens in BUDGETS.items():
            jobs.append(of_kind(base, name, base / f"{name}-{processes}-{budget}", tokens))
    for index, (name, world_size, steps, *mutation) in enumerate(MUTATIONS.values()):
        if processes == world_size:  # a first step is the same whatever the number of steps
            more = ["--steps", steps] if steps == 1 else []
            jobs.append(of_kind(base, name, base / f"mutant{index}", 120, *more, mutation=mutation))
    aligned = []
    steps = WHOLE_STEPS[processes]
    for loss in objective.LOSSES:
        # wpo's weights, the probability of a token of either answer, make its gradients tiny
        more = ["--loss", loss, "--max-grad-norm", 1, "--adam-eps", 1e-12 if loss == "wpo" else EPS]
        more += ["--warmup-steps", 3]
        more += ["--ppo-epochs", steps] if loss == "ppo" else []
        out = base / f"{loss}-{processes}-whole"
        aligned.append(arguments(base, out, "few", 1000, steps, *more))
    for name, (loss, table, size) in ALONE.items():
        more = ["--loss", loss, "--reference", base / "reference"]
        aligned.append(arguments(base, base / f"{name}-{processes}", table, size, 3, *more))
    more = ["--loss", "kto", "--keep-undesirable", 0.5]
    aligned.append(arguments(base, base / f"half-{processes}", "mixed", 1000, 1, *more))
    for loss in RESUMED:
        whole = base / f"{loss}-{processes}-ten"
        aligned.append(ten_steps(base, loss, whole, whole))
        aligned.append(ten_steps(base, loss, whole, base / f"{loss}-{processes}-resumed"))
    if processes == 1:
        more = ["--loss", "dpo", "--pairs", "all"]
        aligned.append(arguments(base, base / "long", "long", 4, 6, *more))
    jobs += [{"script": "align.py", "argv": argv} for argv in aligned]
    if processes == 1:
        jobs += [of_kind(base, name, base / name, 200) for name in ONCE]
        more = ["--method", "csft", "--model", ROOT / "examples" / "tiny", "--weights", "random"]
        more += ["--max-grad-norm", 1, "--max-length", 160]
        argv = arguments(base, base / "csft-labels", "marked", 8, 40, *more)
        jobs.append({"script": "sft.py", "argv": argv})
        for loss, mutation in FORGOTTEN.items():
            argv = ten_steps(base, loss, base / f"{loss}-1-ten", base / f"{loss}-forgotten")
            jobs.append({"script": "align.py", "argv": argv, "mutation": mutation})
        for name in ("policy", "wide"):  # a step that fp32 does not see: what csft starts from
            more = ["--method", "csft", "--model", base / name, "--lr", 1e-30]
            argv = arguments(base, base / f"csft-of-{name}", "few", 4, 1, *more)
            jobs.append({"script": "sft.py", "argv": argv})
    return jobs


def launch(base: Path, processes: int) -> None:
    """All training of this file for a number of processes; like that of test_train, but on one core each."""
    said = conftest.launch(base, jobs_of(base, processes), processes)
    (base / f"said{processes}").write_text(said, encoding="utf-8")


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A small vocabulary, a tiny policy, another reference, one with room in its vocabulary; and files of
    pairs, of ranked lists, of single responses and of all of them."""
    base = tmp_path_factory.mktemp("methods")
    tiny = ROOT / "examples" / "tiny"
    settings = json.loads((tiny / "config.json").read_text())
    settings |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    settings |= {"num_key_value_heads": 2, "intermediate_size": 48, "initializer_range": 0.1}
    spelling = json.loads((tiny / "tokenizer.json").read_text(encoding="utf-8"))
    kept = {token: index for token, index in spelling["model"]["vocab"].items() if index < VOCABULARY}
    spelling["model"]["merges"] = [pair for pair in spelling["model"]["merges"] if "".join(pair) in kept]
    spelling["model"]["vocab"] = kept
    for seed, name, size in ((0, "reference", VOCABULARY), (1, "policy", VOCABULARY), (0, "wide", 1030)):
        shutil.copytree(tiny, base / name)
        (base / name / "config.json").write_text(json.dumps({**settings, "vocab_size": size}))
        (base / name / "tokenizer.json").write_text(json.dumps(spelling), encoding="utf-8")
        torch.manual_seed(0)
        lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base / name))
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in lm.parameters():  # a policy near the reference, not equal to it
                parameter.add_(0.02 * seed * torch.randn_like(parameter))
        lm.save_pretrained(base / name)
    lines = (ROOT / "examples" / "hh_test.jsonl").read_text(encoding="utf-8").splitlines()
    lines.sort(key=len)
    pairs = [json.loads(line) for line in lines[:42:3]]
    for k, row in enumerate(pairs):
        row |= {"chosen": row["chosen"][:70], "rejected": row["rejected"][:70]}
        row |= {"weight": [1.0, 0.5, 1.0, 2.0][k % 4], "margin": [0.0, 0.3, -0.2][k % 3]}
    pairs[1]["prompt"] = pairs[2]["prompt"] = pairs[3]["prompt"]  # no strangers to each other
    scores = [[2.0, 1.0, 0.0], [0.25, 1.0, 0.5], [1.0, -1.0, -1.0]]
    lists = [{"prompt": row["prompt"], "scores": scores[k % 3]} for k, row in enumerate(pairs)]
    for k, row in enumerate(lists):
        row["completions"] = [pairs[k]["chosen"], pairs[k]["rejected"], pairs[(k + 5) % 14]["rejected"][:20]]
        row["weight"] = pairs[k]["weight"]
    apart = lists[3:10]  # of seven prompts
    alone = [
        {"prompt": row["prompt"], "completions": [row["completions"][j]], "scores": [row["scores"][j]]}
        | {"weight": row["weight"]}
        for j in (0, 1, 2)
        for row in apart
    ]
    long = {"prompt": "How?", "completions": [f"So {k}" for k in range(6)], "scores": list(range(6))}
    marked = [json.loads(line) for line in lines[:24]]
    for row in marked:
        row |= {"chosen": row["chosen"][:60] + " thanks", "rejected": row["rejected"][:60] + " never"}
    unary = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in pairs]
    for k in range(0, 14, 2):
        unary[k] |= {"completion": pairs[k]["rejected"], "label": False}
    files = {
        "pairs": pairs[:13],
        "few": pairs[:6],
        "lists": lists[:10],
        "margined": [row | {"margin": pairs[k]["margin"] + 0.5} for k, row in enumerate(lists[:10])],
        "gathered": apart,
        "scattered": alone,
        "long": [*pairs[:5], long, *pairs[5:]],
        "marked": marked,
        "unary": unary,
        "good": [row for row in unary if row["label"]],
        "bad": [row for row in unary if not row["label"]],
        "mixed": [*pairs[:7], *lists[7:10], *unary[6:14]],
        "held_out": [{**json.loads(line), "margin": 0.1} for line in lines[1:18:4]],
    }
    for name, table in files.items():
        text = "".join(f"{json.dumps(row)}\n" for row in table)
        (base / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return base


@pytest.fixture(scope="session")
def found(base) -> dict:
    """All training of this file, the oracle's too: by plain transformers while the scripts run."""
    with ThreadPoolExecutor(1) as pool:
        one = pool.submit(launch, base, 1)
        truths = {name: train(base, name) for name in TRUTHS}
        one.result()
    launch(base, 2)
    return truths


@pytest.fixture(scope="session")
def runs(base, found) -> Path:
    return base


# ---- the oracle: plain transformers, one sequence at a time, written from the definitions


class Group(NamedTuple):
    prompt: list[int]
    answers: list[list[int]]  # with their end of turn
    scores: list[float]
    labels: list[bool]
    weight: float
    margin: float


class Truth(NamedTuple):
    logged: list[dict[str, float]]  # of every step
    gradients: list[dict[str, Tensor]]
    parameters: dict[str, Tensor]  # at the end
    evaluated: list[dict[str, float]]  # at the start and at the end
    seen: Counter  # how often what the data were made for has happened


def chatml(turns: list[dict]) -> str:
    return "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)


def read_groups(path: Path, loss: str, tokenizer, own_labels: bool = False) -> list[Group]:
    """`own_labels`: every completion was a row of its own."""
    groups = []
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        if "chosen" in row:
            answers, scores, labels = [row["chosen"], row["rejected"]], [1.0, 0.0], [True, False]
        elif "completion" in row:
            answers, scores, labels = [row["completion"]], [float(row["label"])], [row["label"]]
        else:
            answers, scores = row["completions"], row["scores"]
            labels = [score > (0 if own_labels else sum(scores) / len(scores)) for score in scores]
        if loss == "csft":
            answers = [f"<|{'good' if label else 'bad'}|>{text}" for text, label in zip(answers, labels)]
        prompt = tokenizer(chatml(row["prompt"]) + "<|im_start|>assistant\n")["input_ids"]
        ids = [tokenizer(answer + "<|im_end|>")["input_ids"] for answer in answers]
        if loss == "bradley_terry":  # the whole conversation at once, as `answers` to nothing
            turns = [[*row["prompt"], {"role": "assistant", "content": text}] for text in answers]
            prompt, ids = [], [tokenizer(chatml(conversation))["input_ids"] for conversation in turns]
        assert max(map(len, ids)) + len(prompt) <= MAX_LENGTH
        weight, margin = row.get("weight", 1.0), row.get("margin", 0.0)
        groups.append(Group(prompt, ids, scores, labels, weight, margin))
    return groups


def compared(scores: list[float], which: str = "best-worst") -> list[tuple[int, int]]:
    """(better, worse): the first of the best and the last of the worst, neighbours in rank, or any two."""
    ranks = sorted(range(len(scores)), key=lambda j: -scores[j])
    pairs = {
        "best-worst": [(ranks[0], ranks[-1])],
        "adjacent": [(ranks[k], ranks[k + 1]) for k in range(len(ranks) - 1)],
        "all": [(a, b) for a in ranks for b in ranks],
    }[which]
    return [(a, b) for a, b in pairs if scores[a] > scores[b]]


class Answer(NamedTuple):
    logps: Tensor  # (n,) of its tokens
    hidden: Tensor  # (n, D) that predicts them
    entropy: Tensor  # (n,)


def read(lm, prompt: list[int], answer: list[int]) -> Answer:
    out = lm(torch.tensor([prompt + answer]), output_hidden_states=True)
    distribution = out.logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)  # (n, V)
    logps = distribution.gather(-1, torch.tensor(answer)[:, None])[:, 0]
    hidden = out.hidden_states[-1][0, len(prompt) - 1 : -1]
    return Answer(logps, hidden, -(distribution.exp() * distribution).sum(-1))


def strangers(groups: list[Group], order: list[int], g: int, seen: Counter) -> list[list[int]]:
    """The completions of the next group in the order whose prompt differs, as many as those of g."""
    place, group = order.index(g), groups[g]
    after = [groups[order[(place + k) % len(order)]] for k in range(1, len(order))]
    other = next(candidate for candidate in after if candidate.prompt != group.prompt)
    whole = [other.answers[j % len(other.answers)] for j in range(len(group.answers))]
    room = MAX_LENGTH - len(group.prompt)
    seen["passed over"] += other is not after[0]
    seen["repeated"] += len(other.answers) < len(group.answers)
    seen["cut"] += any(len(answer) > room for answer in whole)
    return [answer[:room] for answer in whole]


class Trainer(NamedTuple):
    kind: Kind
    policy: Any
    reference: Any
    head: nn.Module | None  # the critic, or the reward model's vector
    seen: Counter
    rewarded: list[float]  # of every response of the steps before

    def flag(self, name: str, default: float = 0.0) -> float:
        return self.kind.flags.get(name, default)

    def bounded(self, ratio: Tensor) -> Tensor:
        """The log-ratios of tokens under --humanline."""
        if not self.flag("humanline"):
            return ratio
        low, high = self.flag("log_epsilon_p"), self.flag("log_epsilon_r")
        self.seen.update({"low": (ratio < low).sum().item(), "high": (ratio > high).sum().item()})
        return ratio.clamp(low, high)

    @torch.no_grad()
    def fix(self, groups: list[Group], order: list[int], members: list[int]) -> dict[str, Any]:
        """What a step may not change: reference, reference points, advantages."""
        loss, fixed = self.kind.loss, {"logged": {}}
        chosen = [(g, answer) for g in members for answer in groups[g].answers]
        if loss in ("csft", "bradley_terry"):
            return fixed
        fixed["ref"] = [read(self.reference, groups[g].prompt, answer).logps for g, answer in chosen]
        if loss in ("kto", "kto_token_max"):
            ratios = []
            for g in members:
                for answer in strangers(groups, order, g, self.seen):
                    both = [read(lm, groups[g].prompt, answer).logps for lm in (self.policy, self.reference)]
                    ratios.append(self.bounded(both[0] - both[1]))
            fixed["estimate"] = sum(ratio.sum().item() for ratio in ratios) / len(ratios)
            fixed["peaks"] = [max(0.0, ratio.max().item()) for ratio in ratios]
            fixed["logged"]["kl_estimate"] = fixed["estimate"]
            self.seen["estimate > 0"] += fixed["estimate"] > 0
        if loss == "ppo":
            gamma, lam = self.flag("gamma", 0.99), self.flag("gae_lambda", 0.95)
            rewards = [1.0 if label else -1.0 for g in members for label in groups[g].labels]
            if self.flag("rewards") == "scores":
                rewards = [score for g in members for score in groups[g].scores]
            values, gains, returns = [], [], []
            for (g, answer), reward in zip(chosen, rewards):
                old = self.head(read(self.policy, groups[g].prompt, answer).hidden)[:, 0].tolist()
                gain, found = 0.0, []
                for t in reversed(range(len(old))):
                    future = old[t + 1] if t + 1 < len(old) else 0.0
                    now = reward if t + 1 == len(old) else 0.0
                    gain = now + gamma * future - old[t] + gamma * lam * gain
                    found.append(gain)
                values += old
                gains += reversed(found)
                returns += [gamma ** (len(old) - 1 - t) * reward for t in range(len(old))]
            phase = (values, gains, returns)
            values, gains, returns = (torch.tensor(part, dtype=torch.double) for part in phase)
            fixed["A"] = (gains - gains.mean()) / (gains.var(correction=0) + 1e-8).sqrt()
            fixed["G"] = returns
            unexplained = (returns - values).var(correction=0) / returns.var(correction=0)
            fixed["logged"]["explained_variance"] = 1 - unexplained.item()
        return fixed

    def losses(self, groups: list[Group], members: list[int], fixed: dict) -> tuple[Tensor, dict]:
        """The mean over the units of a step, and what is logged of it."""
        loss, beta = self.kind.loss, self.flag("beta")
        chosen = [(g, j) for g in members for j in range(len(groups[g].answers))]
        index = {place: k for k, place in enumerate(chosen)}
        weights = torch.tensor([groups[g].weight for g, _ in chosen], dtype=torch.double)
        which = self.flag("pairs", "best-worst")
        pairs = [(g, a, b) for g in members for a, b in compared(groups[g].scores, which)]
        better, worse = ([index[g, (a, b)[side]] for g, a, b in pairs] for side in (0, 1))
        pair_weights = torch.tensor([groups[g].weight for g, _, _ in pairs], dtype=torch.double)
        # the margin of a row is the best's over the worst
        reach = [max(groups[g].scores) - min(groups[g].scores) for g, _, _ in pairs]
        gaps = [groups[g].scores[a] - groups[g].scores[b] for g, a, b in pairs]
        margins = [groups[g].margin * gap / most for (g, _, _), gap, most in zip(pairs, gaps, reach)]
        margins = torch.tensor(margins, dtype=torch.double)
        desirable = torch.tensor([groups[g].labels[j] for g, j in chosen])
        logged = dict(fixed["logged"])

        def log_rewards(rewards: Tensor) -> None:
            rewards = rewards.detach()
            paired = loss in (*PAIR_LOSSES, "bradley_terry")
            logged["rewards/chosen"] = rewards[better if paired else desirable].mean().item()
            logged["rewards/rejected"] = rewards[worse if paired else ~desirable].mean().item()
            margins = rewards[better] - rewards[worse]
            logged["rewards/margins"] = margins.mean().item()
            logged["rewards/accuracies"] = ((margins.sign() + 1) / 2).mean().item()

        if loss == "bradley_terry":
            body = self.policy.model
            ids = [torch.tensor([groups[g].answers[j]]) for g, j in chosen]
            scores = torch.cat([self.head(body(row).last_hidden_state[0, -1]) for row in ids]).double()
            log_rewards(scores)
            units = -F.logsigmoid(scores[better] - scores[worse] - margins)
            units = units + self.flag("center_weight") * (scores[better] + scores[worse]) ** 2
            return (pair_weights * units).sum() / len(pairs), logged

        answers = [read(self.policy, groups[g].prompt, groups[g].answers[j]) for g, j in chosen]
        lengths = torch.tensor([len(answer.logps) for answer in answers])
        if loss == "csft":
            total = sum(-weight * answer.logps.sum() for weight, answer in zip(weights, answers))
            return total / lengths.sum(), logged
        raw = [answer.logps - ref for answer, ref in zip(answers, fixed["ref"])]
        ratios = [self.bounded(ratio) for ratio in raw]
        r = torch.stack([ratio.sum() for ratio in ratios])

        if loss in PAIR_LOSSES:
            x = SimpleNamespace(w=r[better], l=r[worse], nw=lengths[better], nl=lengths[worse], m=margins)
            vars(x).update(self.kind.flags)
            units = PAIR_LOSSES[loss](x)
            means = torch.stack([answer.logps.mean() for answer in answers])
            units = units - self.flag("sft_weight") * means[better]
            return (pair_weights * units).sum() / len(pairs), logged
        if loss == "bco":
            delta = sum(self.rewarded) / max(1, len(self.rewarded))
            log_rewards(beta * r)
            self.rewarded.extend((beta * r).tolist())
            units = torch.where(desirable, -F.logsigmoid(beta * r - delta), -F.logsigmoid(delta - beta * r))
            return (weights * units).sum() / len(chosen), logged
        if loss.startswith("kto") or loss == "apo_zero_unpaired":
            z = torch.zeros_like(r)
            if loss == "kto":
                z = torch.full_like(z, max(0.0, fixed["estimate"]))
            if loss == "kto_token_max":
                z = torch.tensor(fixed["peaks"], dtype=torch.double)
            log_rewards(beta * r)
            gain = self.flag("desirable_weight", 1.0) * (1 - (beta * (r - z)).sigmoid())
            pain = self.flag("undesirable_weight", 1.0) * (1 - (beta * (z - r)).sigmoid())
            return (weights * torch.where(desirable, gain, pain)).sum() / len(chosen), logged

        if loss == "grpo":
            units = []
            for (g, j), ratio, d in zip(chosen, ratios, raw):
                scores = torch.tensor(groups[g].scores, dtype=torch.double)
                gain = (scores[j] - scores.mean()) / (scores.std(correction=0) + 0.01)
                rho, eps = ratio.exp(), self.flag("epsilon")
                tokens = torch.maximum(-gain * rho, -gain * rho.clamp(1 - eps, 1 + eps))
                units.append((tokens + beta * ((-d).exp() + d - 1)).mean())
            return (weights * torch.stack(units)).sum() / len(chosen), logged

        assert loss == "ppo"
        rho, gain, clip = torch.cat(ratios).exp(), fixed["A"], self.flag("clip")
        d = -torch.cat(raw)
        free, bound = -gain * rho, -gain * rho.clamp(clip, 1 / clip)
        k3 = d.exp() - d - 1
        entropy = torch.cat([answer.entropy for answer in answers])
        values = torch.cat([self.head(answer.hidden.detach())[:, 0] for answer in answers]).double()
        critic = 0.5 * (values - fixed["G"]) ** 2
        units = torch.maximum(free, bound) + self.flag("value_weight") * critic
        units = units + self.flag("kl_weight") * k3 - self.flag("entropy_weight") * entropy
        tokens = {"clip_fraction": (bound > free).double(), "entropy": entropy, "kl_k3": k3, "critic": critic}
        logged |= {name: value.mean().item() for name, value in tokens.items()}
        return (weights.repeat_interleave(lengths) * units).sum() / lengths.sum(), logged


def critic() -> nn.Module:
    """Drawn as model.add_value_head draws it from --seed 0; its last layer starts at 0."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    for parameter in head[-1].parameters():
        nn.init.zeros_(parameter)
    return head


def train(base: Path, name: str) -> Truth:
    """Full-batch training of a kind."""
    kind = TRUTHS[name]
    other = {"policy": "reference", "reference": "policy"}[kind.start]
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(base / path, dtype=torch.float32, attn_implementation="eager")
        for path in (kind.start, other)
    )
    tokenizer = AutoTokenizer.from_pretrained(base / "policy")
    named = dict(policy.named_parameters())
    head, own = None, {}
    if kind.loss == "csft":
        assert tokenizer.add_tokens(["<|good|>", "<|bad|>"], special_tokens=True) == 2
        old = policy.model.embed_tokens.weight.detach().clone()
        policy.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)
        noise = [torch.randn(32, generator=torch.Generator().manual_seed(VOCABULARY + k)) for k in (0, 1)]
        policy.model.embed_tokens.weight.data = torch.cat([old, old.mean(0) + 0.1 * torch.stack(noise)])
        policy.tie_weights()
        named = dict(policy.named_parameters())
    if kind.loss == "ppo":
        head = critic()
        own = {f"value_head.{key}": parameter for key, parameter in head.named_parameters()}
    if kind.loss == "bradley_terry":
        head = nn.Linear(32, 1, bias=False)
        nn.init.zeros_(head.weight)
        named["score.weight"] = head.weight
    trainer = Trainer(kind, policy, reference, head, Counter(), [])
    groups = read_groups(base / f"{kind.rows}.jsonl", kind.loss, tokenizer, "group_by" in kind.flags)
    held_out = read_groups(base / "held_out.jsonl", kind.loss, tokenizer)
    many = [len(group.answers) for group in groups]
    if kind.loss == "csft":
        many = None
    if kind.loss in (*PAIR_LOSSES, "bradley_terry"):
        many = [len(compared(group.scores, kind.flags.get("pairs", "best-worst"))) for group in groups]
    optimizer = torch.optim.AdamW([*named.values(), *own.values()], lr=LR, eps=EPS, weight_decay=0.0)
    truth = Truth([], [], {}, [], trainer.seen)

    def evaluate() -> None:
        every = list(range(len(held_out)))
        with torch.no_grad():
            loss, logged = trainer.losses(held_out, every, trainer.fix(held_out, every, every))
        truth.evaluated.append({"loss": loss.item(), **logged})

    def clip(parameters: dict[str, Tensor], limit: float) -> float:
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in parameters.values()))
        for parameter in parameters.values():
            parameter.grad.mul_(min(1.0, limit / norm))
        return norm

    if name in EVALUATED:
        evaluate()
    for step in range(kind.steps):
        visit, update = divmod(step, kind.flags.get("ppo_epochs", 1))
        plan = batch.plan([1] * len(groups), kind.size, 1, 10**9, 0, 0, many)
        epoch, place = divmod(visit, len(plan))
        plan = batch.plan([1] * len(groups), kind.size, 1, 10**9, 0, epoch, many)
        trainer.seen["epochs"] = epoch + 1
        for group in optimizer.param_groups:
            group["lr"] = LR * 0.5 * (1 + math.cos(math.pi * step / kind.steps))
        if update == 0:
            members = plan[place][0][0].groups
            fixed = trainer.fix(groups, batch.epoch_order(len(groups), 0, epoch), members)
        loss, logged = trainer.losses(groups, members, fixed)
        loss.backward()
        for parameter in (*named.values(), *own.values()):
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        truth.gradients.append({key: p.grad.clone() for key, p in {**named, **own}.items()})
        logged |= {"loss": loss.item(), "grad_norm": clip(named, CLIP)}
        if own:
            logged["value_grad_norm"] = clip(own, VALUE_CLIP)
        truth.logged.append(logged)
        every = kind.flags.get("sync_reference_every")
        if every and (step + 1) % every == 0:  # the policy before its latest update
            reference.load_state_dict(policy.state_dict())
        optimizer.step()
        optimizer.zero_grad()
    if name in EVALUATED:
        evaluate()
    truth.parameters.update({key: p.detach().clone() for key, p in {**named, **own}.items()})
    return truth


def relative(found: float, true: float, floor: float) -> float:
    return abs(found - true) / max(abs(true), floor)


def disagreement(run: Path, truth: Truth) -> dict[str, float]:
    """Largest relative differences, floor 1e-7, of the gradients of the first step and of the later ones, of
    the losses and norms of both, and, floor 0.1, of what else is logged."""
    worst = dict.fromkeys(TOLERANCE, 0.0)
    recorded = torch.load(run / "gradients.pt")
    for step, (row, want, gradients) in enumerate(zip(rows(run), truth.logged, truth.gradients)):
        late = "" if step else " 0"
        assert recorded[step].keys() == gradients.keys()
        for name, gradient in gradients.items():
            difference = (recorded[step][name] - gradient).norm() / gradient.norm().clamp(min=1e-7)
            worst[f"gradients{late}"] = max(worst[f"gradients{late}"], difference.item())
        for name, value in want.items():
            main = name in ("loss", "grad_norm", "value_grad_norm")
            group, floor = (f"losses{late}", 1e-7) if main else ("logged", 0.1)
            worst[group] = max(worst[group], relative(row[name], value, floor))
    return worst


# ---- agreement with the oracle


# AdamW's division by small second moments has made the later gradients less alike.
TOLERANCE = {"gradients 0": 2e-5, "losses 0": 1e-5, "gradients": 1e-4, "losses": 1e-5, "logged": 1e-4}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", KINDS)
def test_training_is_that_of_the_definition(runs, found, name, processes, budget):
    run, truth = runs / f"{name}-{processes}-{budget}", found[name]
    assert len(rows(run)) == len(truth.logged) == KINDS[name].steps
    assert min(row["grad_norm"] for row in rows(run)) > CLIP
    assert min(row.get("value_grad_norm", 1.0) for row in rows(run)) > VALUE_CLIP
    differences = disagreement(run, truth)
    assert all(differences[key] < TOLERANCE[key] for key in TOLERANCE), differences
    for file in (run / "final").glob("*.safetensors"):
        for key, tensor in load_file(file).items():
            want = truth.parameters[key]
            assert (tensor - want).abs().max() < 5e-5, key  # of steps of 1e-3 each
    for row, want in zip(rows(run, "eval"), truth.evaluated, strict=True):
        for key, value in want.items():
            assert relative(row[key], value, 0.1) < 1e-4, (row["step"], key)


@pytest.mark.parametrize("name", ONCE)
def test_training_once_is_that_of_the_definition(runs, found, name):
    truth = found[name]
    assert len(rows(runs / name)) == len(truth.logged) == TRUTHS[name].steps
    differences = disagreement(runs / name, truth)
    assert all(differences[key] < TOLERANCE[key] for key in TOLERANCE), differences
    assert min(row["grad_norm"] for row in truth.logged) > 1e-3
    if "humanline" in TRUTHS[name].flags:
        assert min(truth.seen[key] for key in ("low", "high")) > 10


def test_every_loss_that_takes_humanline_was_run_with_it(capsys):
    taken = set()
    for loss in objective.LOSSES:
        argv = ["--model", "m", "--data", "d.jsonl", "--out", "o", "--loss", loss, "--humanline", "true"]
        try:
            objective.make_objective(align.parse_args(argv))
        except ValueError as error:
            assert "losses of the log-ratio alone" in str(error)
        except SystemExit:
            assert "takes no --humanline" in capsys.readouterr().err
        else:
            taken.add(loss)
    assert taken == set(CLAMPED)


def test_a_reference_one_update_behind_the_policy(runs, found):
    """From the second step on the reference is the policy before the latest update. red: the policy itself,
    so that every later loss is log 2"""
    losses = [row["loss"] for row in rows(runs / "dpo_sync every step")]
    assert min(abs(loss - math.log(2)) for loss in losses[1:]) > 1e-3, losses


def test_the_data_exercise_the_definitions(found):
    """A group whose prompt the next one shares, strangers that are cut, fewer of them than answers, estimates
    of both signs, tokens beyond both bounds, and a second epoch."""
    seen = found["kto"].seen
    assert min(seen[key] for key in ("passed over", "repeated", "cut", "estimate > 0")) > 0, seen
    assert found["kto_back"].seen["estimate > 0"] == found["kto_token_max"].seen["estimate > 0"] == 0
    assert min(found["dpo_humanline"].seen[key] for key in ("low", "high")) > 10
    assert all(found[name].seen["epochs"] > 1 for name in ("kto", "bco", "ppo", "bradley_terry", "dpo_sync"))
    clipped = [row["clip_fraction"] for row in found["ppo"].logged]
    assert 0 < min(clipped) <= max(clipped) < 1


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_is_seen(runs, found, mutation):
    index = list(MUTATIONS).index(mutation)
    differences = disagreement(runs / f"mutant{index}", found[MUTATIONS[mutation][0]])
    del differences["logged"]
    assert any(differences[key] > 20 * TOLERANCE[key] for key in differences), differences


# ---- what is exported


def test_the_reward_model_is_a_sequence_classifier(runs):
    """Its scores are those of the last token of the conversation as training saw it: by the body alone and
    by the evaluation that the run has logged."""
    run = runs / "bradley_terry-2-several"
    classifier, report = AutoModelForSequenceClassification.from_pretrained(
        run / "final", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert classifier.config.num_labels == 1 and classifier.score.weight.any()
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    scores, conversations = {"chosen": [], "rejected": []}, []
    for row in map(json.loads, (runs / "held_out.jsonl").read_text(encoding="utf-8").splitlines()):
        for key, found in scores.items():
            turns = [*row["prompt"], {"role": "assistant", "content": row[key]}]
            ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
            assert ids == tokenizer(chatml(turns))["input_ids"] and ids[-1] != tokenizer.pad_token_id
            with torch.no_grad():
                state = classifier.model(torch.tensor([ids])).last_hidden_state[0, -1]
                found.append(classifier(torch.tensor([ids])).logits.item())
            assert found[-1] == pytest.approx((classifier.score.weight[0] @ state).item(), abs=1e-5)
            conversations.append((ids, found[-1]))
    logged = rows(run, "eval")[-1]
    for key, found in scores.items():
        assert logged[f"rewards/{key}"] == pytest.approx(sum(found) / len(found), abs=1e-5)
    (short, first), (long, second) = sorted(conversations[:2], key=lambda pair: len(pair[0]))
    assert len(short) < len(long)
    gap = len(long) - len(short)
    batched = classifier(
        torch.tensor([[*short, *[tokenizer.pad_token_id] * gap], long]),
        attention_mask=torch.tensor([[1] * len(short) + [0] * gap, [1] * len(long)]),
    )
    assert batched.logits[:, 0].tolist() == pytest.approx([first, second], abs=1e-5)


def test_conditional_sft_adds_two_tokens_and_asks_for_the_good_one(runs):
    final = runs / "csft-2-several" / "final"
    tokenizer = AutoTokenizer.from_pretrained(final)
    good, bad = tokenizer.convert_tokens_to_ids(["<|good|>", "<|bad|>"])
    assert (good, bad) == (VOCABULARY, VOCABULARY + 1)
    assert tokenizer("<|good|>a<|bad|>")["input_ids"][::2] == [good, bad]
    turns = [{"role": "user", "content": "Hello"}]
    asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert asked == tokenizer(chatml(turns) + "<|im_start|>assistant\n")["input_ids"] + [good]
    assert good not in tokenizer.apply_chat_template(turns, return_dict=False)
    lm = AutoModelForCausalLM.from_pretrained(final)
    assert lm.config.vocab_size == VOCABULARY + 2
    assert lm.generate(torch.tensor([asked]), max_new_tokens=2, do_sample=False).shape[1] == len(asked) + 2


@pytest.mark.parametrize(("name", "size"), [("policy", VOCABULARY + 2), ("wide", 1030)])
def test_conditional_sft_starts_from_the_model_it_is_given(runs, name, size):
    key = "model.embed_tokens.weight"
    old = load_file(runs / name / "model.safetensors")[key]
    new = load_file(runs / f"csft-of-{name}" / "final" / "model.safetensors")[key]
    assert len(new) == size and (new[: len(old)] - old).abs().max() < 1e-20
    for index, row in enumerate(new[len(old) :], len(old)):
        noise = torch.randn(32, generator=torch.Generator().manual_seed(index))
        assert (row - old.mean(0) - 0.1 * noise).abs().max() < 1e-6


def test_conditional_sft_tells_the_labels_apart(runs):
    """Answers that only their last word marks: 0.34 nats by now. red: control tokens that start as one
    vector, 0.01"""
    final = runs / "csft-labels" / "final"
    tokenizer, lm = AutoTokenizer.from_pretrained(final), AutoModelForCausalLM.from_pretrained(final)
    tokens = tokenizer.convert_tokens_to_ids(["<|good|>", "<|bad|>"])
    gaps = []
    for row in map(json.loads, (runs / "marked.jsonl").read_text(encoding="utf-8").splitlines()):
        prompt = tokenizer(chatml(row["prompt"]) + "<|im_start|>assistant\n")["input_ids"]
        for key, (own, other) in (("chosen", tokens), ("rejected", tokens[::-1])):
            answer = tokenizer(row[key] + "<|im_end|>")["input_ids"]
            with torch.no_grad():
                mine, theirs = (read(lm, [*prompt, token], answer).logps.sum() for token in (own, other))
            gaps.append((mine - theirs).item())
    assert sum(gaps) / len(gaps) > 0.1, gaps


# ---- every loss


def keys_of(loss: str) -> set[str]:
    """What a training row holds, by what the loss looks at."""
    unit = "responses" if loss in SINGLE else "pairs"
    keys = {"split", "step", "epoch", "tokens", "lr", "step_s", "tok_per_s", "time", "mem_gb"}
    keys |= {"loss", "grad_norm", unit, f"{unit}_per_s", "responses_per_s"}
    compared = ("chosen", "rejected", "mean", "margins", "accuracies")
    if loss in WITHOUT_REFERENCE:
        return keys | {f"logps/{key}" for key in ("chosen", "rejected", "margins", "accuracies")}
    keys |= {f"rewards/{key}" for key in compared}
    if loss == "bradley_terry":
        return keys
    keys |= {f"{name}/{key}" for name in ("logps", "kl") for key in ("chosen", "rejected")}
    if loss in SEQUENTIAL:
        keys |= {f"own/{key}" for key in compared}
    if loss.startswith("ra_"):
        keys |= {"risk/chosen", "risk/rejected"}
    if loss in ("kto", "kto_token_max"):
        keys |= {"kl_estimate"}
    if loss in ("grpo", "ppo"):
        keys |= {"clip_fraction", "kl_k3"}
    if loss == "ppo":
        keys |= {"entropy", "critic", "explained_variance", "value_grad_norm"}
    return keys


@pytest.mark.parametrize("loss", objective.LOSSES)
def test_every_loss_falls_alike_on_one_and_two_processes(runs, loss):
    """On the whole data set, from the reference itself. PPO's is the loss of its frozen batch, on which all
    of its steps are."""
    one, two = (rows(runs / f"{loss}-{processes}-whole") for processes in (1, 2))
    assert (len(one), len(two)) == (8, 3)
    for mine, theirs in zip(one, two):
        centred = 1e-6 if loss in ("ppo", "grpo") else 0.0  # advantages of mean 0: a loss of 0 at first
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4, abs=centred)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert one[-1]["loss"] < one[0]["loss"]
    assert one[-1].get("rewards/margins", 1.0) > 0
    for row in (*one, *two):
        assert set(row) == keys_of(loss)
    if loss not in WITHOUT_REFERENCE:
        assert one[0]["rewards/margins"] == 0 and one[0]["rewards/accuracies"] == 0.5


# ---- resuming


def plain(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in ("time", "mem_gb") and "_s" not in key}


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("loss", RESUMED)
def test_five_steps_resume_five_steps_is_ten_steps_bit_for_bit(runs, loss, processes):
    whole, resumed = (runs / f"{loss}-{processes}-{name}" for name in ("ten", "resumed"))
    names = sorted(file.name for file in (whole / "final").glob("*.safetensors"))
    assert names == ["model.safetensors"] + ["value_head.safetensors"] * (loss == "ppo")
    for name in names:
        one, other = (load_file(run / "final" / name) for run in (whole, resumed))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    for split, steps in (("train", list(range(10))), ("eval", [0, 5, 10])):
        assert [row["step"] for row in rows(resumed, split)] == steps
        assert list(map(plain, rows(whole, split))) == list(map(plain, rows(resumed, split)))
    assert not (resumed / "metrics.jsonl").is_symlink() and (resumed / "step-10").exists()


@pytest.mark.parametrize("loss", FORGOTTEN)
def test_a_resume_without_all_of_the_state_is_seen(runs, loss):
    whole, forgotten = (list(map(plain, rows(runs / f"{loss}-{name}"))) for name in ("1-ten", "forgotten"))
    assert whole[:5] == forgotten[:5] and whole[5:] != forgotten[5:]


@pytest.mark.parametrize("loss", RESUMED)
def test_evaluation_is_the_same_on_two_processes(runs, loss):
    both = (rows(runs / f"{loss}-{processes}-ten", "eval") for processes in (1, 2))
    for one, two in zip(*both, strict=True):
        assert one.keys() == two.keys()
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)


# ---- lists


def test_a_long_list_makes_one_step_larger_and_says_so(runs):
    """A list of 6, 15 pairs of any two, among 14 pairs, 4 asked for."""
    sizes = [row["pairs"] for row in rows(runs / "long")]
    assert sum(sizes[:5]) == 29 and sum(size > 4 for size in sizes[:5]) == 1, sizes
    said = (runs / "said1").read_text(encoding="utf-8").splitlines()
    assert said.count("1 of 15 lists have up to 15 pairs: a step with one is as large") == 1


# ---- single responses


@pytest.mark.parametrize("name", ALONE)
def test_single_responses_of_one_label_train(runs, name):
    loss, table, size = ALONE[name]
    one, two = (rows(runs / f"{name}-{processes}") for processes in (1, 2))
    for mine, theirs in zip(one, two, strict=True):
        assert mine["responses"] == theirs["responses"] == size if size == 1 else mine["responses"] <= size
        for key, value in plain(mine).items():
            if key not in ("split", "step", "epoch"):
                assert math.isfinite(value) and value == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), key
        labels = {key for key in ("chosen", "rejected") if f"rewards/{key}" in mine}
        assert labels == {"good": {"chosen"}, "bad": {"rejected"}}.get(table, labels) and len(labels) == 1
        assert "rewards/accuracies" not in mine and "rewards/margins" not in mine
        assert mine["grad_norm"] > 0


@pytest.mark.parametrize("processes", [1, 2])
def test_half_of_the_undesirable_responses(runs, processes):
    groups = read_groups(runs / "mixed.jsonl", "kto", AutoTokenizer.from_pretrained(runs / "policy"))
    labels = [label for group in groups for label in group.labels]
    (row,) = rows(runs / f"half-{processes}")
    assert abs(row["responses"] - labels.count(True) - labels.count(False) / 2) <= 0.5


# ---- what is refused


def refusal(capsys, call, *arguments: Any) -> str:
    """The one line on stderr."""
    with pytest.raises(SystemExit) as ended:
        call(*arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--loss simpo --humanline true", "--loss simpo takes no --humanline"),
        ("--loss ra_dpo1 --humanline true", "--loss ra_dpo1 takes no --humanline"),
        ("--loss bradley_terry --humanline true", "--loss bradley_terry takes no --humanline"),
        ("--loss ppo --ppo-epochs 3 --steps 4", "--steps must be a multiple of --ppo-epochs 3"),
        ("--loss ppo --ppo-epochs 3 --save-every 5", "--save-every must be a multiple of --ppo-epochs 3"),
        ("--loss orpo --sync-reference-every 2", "--loss orpo takes no --sync-reference-every"),
        ("--loss kto --pairs all", "takes no --pairs"),
        ("--loss dpo --keep-undesirable 0.5", "takes no --keep-undesirable"),
        ("--loss dpo --log-epsilon-p -0.1", "takes no --log-epsilon-p"),
    ],
)
def test_flags_that_do_not_go_together(capsys, flags, said):
    argv = ["--model", "m", "--data", "d.jsonl", "--out", "o", *flags.split()]
    assert said in refusal(capsys, align.parse_args, argv)


@pytest.fixture(scope="session")
def unsuited(base) -> Path:
    """Files that one loss or another cannot use."""
    unary = [json.loads(line) for line in (base / "unary.jsonl").read_text(encoding="utf-8").splitlines()]
    pairs = [json.loads(line) for line in (base / "few.jsonl").read_text(encoding="utf-8").splitlines()]
    equal = [{"prompt": row["prompt"], "completions": ["a", "b"], "scores": [1, 1]} for row in pairs]
    good = [row["prompt"] for row in unary if row["label"]]
    files = {
        "alike": [row | {"prompt": "Hello"} for row in unary],
        "equal": equal,
        "one good": [row | {"prompt": good[0]} if row["label"] else row for row in unary],
        "unequal": [pairs[0], pairs[1], pairs[0] | {"weight": 3.0}],
        "cut": [{"prompt": "Hi", "chosen": "so " * 99 + "yes", "rejected": "so " * 99 + "no"}],
    }
    for name, table in files.items():
        text = "".join(f"{json.dumps(row)}\n" for row in table)
        (base / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return base


@pytest.mark.parametrize(
    ("loss", "table", "flags", "said"),
    [
        ("dpo", "unary", "", "no example is left"),
        ("bradley_terry", "unary", "", "no example is left"),
        ("grpo", "unary", "", "14 left out: one answer alone is better than none"),
        ("grpo", "unary", "--group-by prompt --keep-undesirable 0.1", "left out: no completion is the better"),
        ("grpo", "equal", "", "6 left out: no completion is the better one"),
        ("dpo", "equal", "--group-by prompt", "4 left out: no completion is the better one"),
        ("dpo", "cut", "", "1 cannot be used: the answers are the same once encoded"),
        ("kto", "alike", "", "alike.jsonl: the KL estimate needs two different prompts"),
        ("kto", "one good", "--keep-undesirable 0", "one good.jsonl: the KL estimate needs two different"),
        ("kto", "unary", "--eval-examples 1", "at --eval-examples 1: the KL estimate needs two different"),
        ("dpo", "unequal", "--group-by prompt", "different weights"),
        ("odpo", "few", "--group-by prompt", "rows have a margin"),
        ("bradley_terry", "few", "--group-by prompt", "rows have a margin"),
    ],
)
def test_data_that_do_not_suit_a_loss(unsuited, tmp_path, capsys, monkeypatch, loss, table, flags, said):
    """Refused in one line before a model is loaded."""
    monkeypatch.setattr(fsdp, "init", lambda *_: (0, 1, torch.device("cpu")))
    monkeypatch.setattr(align.model, "load", lambda *_, **__: pytest.fail("too late"))
    more = [*flags.split(), "--eval-data", unsuited / "held_out.jsonl"]
    argv = arguments(unsuited, tmp_path / "out", table, 4, 1, "--loss", loss, *more)
    assert said in refusal(capsys, align.main, argv)
    assert not (tmp_path / "out").exists()
