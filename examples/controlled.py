"""A world where the truth is known: what a method gains, and what it risks, for its drift.

    bash run.sh controlled                 everything: 15 methods, 4 betas, 5 seeds; two hours of one core
    bash run.sh controlled --quick         6 methods, 2 betas, one seed: under 5 minutes
    python examples/controlled.py --methods dpo ra_dpo1_cvar_0.1 --betas 0.3 --seeds 0 1

Sentences are three clauses "subject manner verb object". Each word is worth something on its own, bold
manners (a quarter of all) 0.5 to 0.9, the verbs "breaks" and "opens" and the objects "boat" and "door" most
of their kind. But a bold manner, one of these verbs and one of these objects in a row are a ruin, which
costs 10: one sentence in fifty. By its mean a bold word still pays, by the worst 5 % of sentences it does
not. Whoever raises the good words one by one multiplies the chance of a ruin; the way out is to learn the
phrase, of which few pairs speak, or to keep to calm manners or to other objects.

What should be seen. Of two sentences the better one is preferred with probability sigmoid(r1 - r2): a
preference is one bit, so a cost of 10 weighs hardly more than one of 4, and no loss can see how bad the
worst is. Risk-averse methods are averse to something else: to *drift*, x(v) = log pi_ref(v) - log pi(v),
large where the policy has taken mass away, and their risk of x is largest where it has taken most. That can
help here: calm words and modest objects keep their mass. It can also hurt: the last word of a ruin is the
very token to suppress, and a small x protects it. If Ra-DPO is a remedy, then at the same KL(policy ||
reference) its lower tail lies above dpo's and its P(ruin) below, the more so the smaller the confidence
level. If the curves fall together, or cross, the risk of drift says nothing about the risk of reward.

Each seed has its own SFT model, samples, preferences and order of training. What is measured, on sentences
drawn from the policy (those of all methods with the same random numbers): mean reward; its lower tail, the
mean of the worst 5 %; the share of meetings won against the reference's sentences on the same topic;
P(ruin), the sum over the positions before any ruin of the probability that the next word makes one, exact
given the words before, so its noise is far below that of counting; KL(policy || reference), the sum of the
exact KL of each position, nats a sentence; and of the held-out pairs accuracy and KL(reference || policy),
as align.py logs them. `ideal` is pi_ref exp(r / beta) / Z, the best mean there is at its KL, from weighted
sentences of the reference.

A row is written to --results when its run is done, and a row that is there is not run again; models lie in
--out. Beside the results come the figure (PNG, SVG) and the table (Markdown). One process, one core.
"""

import argparse
import contextlib
import json
import math
import os
import random
import shutil
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any, Callable, Iterable, NamedTuple, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import align  # noqa: E402
import config  # noqa: E402
import frontier  # noqa: E402
import generation  # noqa: E402
import scoring  # noqa: E402
import sft  # noqa: E402

QUICK = ("dpo", "kto", "tdpo2", "ra_dpo1_cvar_0.1", "ra_dpo2_cvar_0.98", "ra_dpo2_cvar_0.1")
BETAS = (0.03, 0.1, 0.3, 1.0)
STRONG = 3.0  # of these too, where others have drifts that theirs do not lie around
STRONGLY = ("dpo", "tdpo1", "ra_dpo1_cvar_0.98", "ra_dpo1_cvar_0.1")
QUICK_BETAS = (0.1, 0.3)
IDEAL_BETAS = (0.5, 0.7, 1.0, 1.5, 2.0, 4.0)
SEEDS = 5
HELD_OUT = 400  # pairs
LR = 3e-4  # at 1e-3 dpo forgets where sentences end
UNARY = 2  # responses of a pair: kto's batches count those

TOPICS = "river market garden harbour winter school forest journey".split()
SUBJECTS = "farmer sailor teacher trader child painter baker soldier singer stranger".split()
CALM = "gently slowly quietly kindly plainly softly".split()
BOLD = {"boldly": (0.12, 0.5), "wildly": (0.08, 0.7), "madly": (0.05, 0.9)}  # share of all manners, worth
VERBS = "takes brings finds holds sells moves builds shares breaks opens".split()
OBJECTS = "bread stone wood water gold cloth salt fish grain wine lamp rope tool song boat door".split()
RISKY_VERBS, RISKY_OBJECTS = VERBS[-2:], OBJECTS[-2:]
COST = 10.0
CLAUSES = 3
LENGTH = 5 * CLAUSES + 1  # tokens: four words a clause, "and" between, a full stop, the end
END, PAD, UNKNOWN = "<|end|>", "<|pad|>", "<|unknown|>"
WORDS = [END, PAD, UNKNOWN, "a", "about", ":", "and", ".", *TOPICS, *SUBJECTS, *CALM, *BOLD, *VERBS, *OBJECTS]
WORTH = {word: worth for word, (_, worth) in BOLD.items()}
WORTH |= {word: 0.3 * (2 * place / (len(VERBS) - 1) - 1) for place, word in enumerate(VERBS)}
WORTH |= {word: 0.4 * (2 * place / (len(OBJECTS) - 1) - 1) for place, word in enumerate(OBJECTS)}
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}about {{ m.content }} : "
    "{% else %}{{ m.content }}" + END + "{% endif %}{% endfor %}"
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(WORDS), "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.05, "tie_word_embeddings": True,
    "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1, "dtype": "float32",
}  # fmt: skip
COMMON = (
    "--dtype float32 --activation-checkpointing none --max-length 32 --max-prompt-length 8 "
    "--log-every 1000000 --tokens-per-microbatch 16384 --eval-every 0 --device cpu"
)


class Sentences(NamedTuple):
    """What a model says: token ids, and the topic of each."""

    ids: list[list[int]]  # without the end
    topics: list[int]
    rewards: np.ndarray  # (n,)


# ---- the world
# ---------------------------------------------------------------------------------------------------------


def sentence(topic: int, draw: random.Random) -> list[str]:
    """Words on a topic, as SFT sees them: the topic decides which subjects are frequent."""
    words = []
    shares = [share for share, _ in BOLD.values()]
    shares += [(1 - sum(shares)) / len(CALM)] * len(CALM)
    for clause in range(CLAUSES):
        subject = SUBJECTS[(topic + int(draw.expovariate(0.5))) % len(SUBJECTS)]
        manner = draw.choices([*BOLD, *CALM], shares)[0]
        words += ["and"] * (clause > 0) + [subject, manner, draw.choice(VERBS), draw.choice(OBJECTS)]
    return [*words, "."]


def ruins(words: Sequence[str]) -> int:
    """How many there are in a sentence."""
    rows = zip(words, words[1:], words[2:])
    return sum(one in BOLD and two in RISKY_VERBS and three in RISKY_OBJECTS for one, two, three in rows)


def reward(words: Sequence[str]) -> float:
    """The sum of what its words are worth, less what its ruins cost."""
    return sum(WORTH.get(word, 0.0) for word in words) - COST * ruins(words)


def prompt(topic: int) -> list[int]:
    """Ids."""
    return [WORDS.index(word) for word in ("about", TOPICS[topic], ":")]


def text(ids: Sequence[int]) -> str:
    """Of ids."""
    return " ".join(WORDS[id] for id in ids)


def write_start(folder: Path) -> None:
    """The model's directory: its configuration, and a tokenizer of one token a word. No weights."""
    folder.mkdir(parents=True, exist_ok=True)
    made = Tokenizer(models.WordLevel({word: id for id, word in enumerate(WORDS)}, unk_token=UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # words with a space between
    made.add_special_tokens([END, PAD, UNKNOWN])
    told = {"eos_token": END, "pad_token": PAD, "unk_token": UNKNOWN}
    told["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer.json").write_text(made.to_str(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(told), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSONL; the file gets its name when it is whole."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(beside, path)


def preferences(found: Sentences, seed: int) -> list[dict[str, Any]]:
    """Two sentences each, those that follow each other; the first is chosen with probability sigmoid of the
    difference of their rewards (Bradley-Terry)."""
    draw, rows = random.Random(seed), []
    for one in range(0, len(found.ids), 2):
        difference = found.rewards[one] - found.rewards[one + 1]
        pair = [text(ids) for ids in found.ids[one : one + 2]]
        pair = pair if draw.random() < 1 / (1 + math.exp(-difference)) else pair[::-1]
        rows.append({"prompt": TOPICS[found.topics[one]], "chosen": pair[0], "rejected": pair[1]})
    return rows


# ---- runs
# ---------------------------------------------------------------------------------------------------------


def script(main: Callable, command: str, out: Path, **paths: Path) -> None:
    """A script in this process, for starting one takes as long as its training; what it says goes to
    out.log."""
    flags = []
    for name, path in {**paths, "out": out}.items():
        flags += [f"--{name}".replace("_", "-"), str(path)]
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)  # of a run that was killed
    with open(f"{out}.log", "w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        main([*command.split(), *COMMON.split(), *flags])


def load(folder: Path) -> Any:
    """A model that a script has written."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def speak(lm: Any, number: int, seed: int) -> Sentences:
    """Sentences of a model, two in a row on the same topic. The random numbers are those of the seed."""
    topics = [one // 2 % len(TOPICS) for one in range(number)]
    ids = []
    for start in range(0, number, 1000):
        some = range(start, min(start + 1000, number))
        prompts, seeds = [prompt(topics[one]) for one in some], [seed * 10_000_019 + one for one in some]
        ids += generation.generate(lm, prompts, seeds, [WORDS.index(END)], generation.Sampling(LENGTH))
    return Sentences(ids, topics, np.array([reward([WORDS[id] for id in said]) for said in ids]))


@torch.no_grad()
def logprobs(lm: Any, found: Sentences) -> tuple[Tensor, Tensor, Tensor]:
    """Of what was said: log-probabilities (n, T, V) at its positions, the end's among them; the ids (n, T);
    which positions there are (n, T)."""
    width = max(map(len, found.ids)) + 1
    ids = torch.full((len(found.ids), width), WORDS.index(END))  # (n, T)
    there = torch.zeros_like(ids, dtype=torch.bool)  # (n, T)
    for row, said in enumerate(found.ids):
        ids[row, : len(said)] = torch.tensor(said)
        there[row, : len(said) + 1] = True
    asked = torch.tensor([prompt(topic) for topic in found.topics])  # (n, P)
    logits = lm(torch.cat([asked, ids], 1)).logits[:, asked.shape[1] - 1 : -1]  # (n, T, V)
    return logits.log_softmax(-1), ids, there


def measure(policy: Any, reference: Any, own: Sentences, others: Sentences) -> dict[str, float]:
    """Of a policy's own sentences against those of the reference; the units are in the docstring above."""
    bold, verbs, objects = (
        torch.tensor([word in kind for word in WORDS]) for kind in (BOLD, RISKY_VERBS, RISKY_OBJECTS)
    )  # (V,) each
    kl, ruined = [], []
    for start in range(0, len(own.ids), 1000):
        some = Sentences(*(part[start : start + 1000] for part in own))
        mine, ids, there = logprobs(policy, some)
        theirs, _, _ = logprobs(reference, some)
        drift = (mine.exp() * (mine - theirs)).sum(-1)  # (n, T)
        risky = torch.zeros_like(there)  # (n, T) one of the objects would make a ruin here
        risky[:, 2:] = bold[ids[:, :-2]] & verbs[ids[:, 1:-1]]
        made = (risky & objects[ids]).long()  # (n, T)
        risky &= there & (made.cumsum(1) == made)  # the first of a sentence
        kl += torch.where(there, drift, 0.0).sum(1).tolist()
        ruined += (mine.exp() @ objects.float() * risky).sum(1).tolist()
    return {
        "reward": float(own.rewards.mean()),
        "tail": scoring.lower_tail(own.rewards),
        "ruin": 100 * fmean(ruined),
        "bold": fmean(sum(WORDS[id] in BOLD for id in said) for said in own.ids),
        "win": win_rate(own, others),
        "kl": fmean(kl),
    }


def win_rate(own: Sentences, others: Sentences) -> float:
    """The share of meetings on the same topic that `own` wins, ties half; each topic counts alike."""
    rates = []
    for topic in set(own.topics):
        mine, theirs = (found.rewards[np.array(found.topics) == topic] for found in (own, others))
        theirs = np.sort(theirs)
        below, upto = (np.searchsorted(theirs, mine, side) for side in ("left", "right"))
        rates.append(float((below + upto).mean() / 2 / len(theirs)))
    return fmean(rates)


def ideal(found: Sentences, beta: float) -> dict[str, float]:
    """pi_ref exp(r / beta) / Z by weighting the reference's sentences."""
    weights = np.exp((found.rewards - found.rewards.max()) / beta)
    weights *= len(weights) / weights.sum()
    ruined = np.array([ruins([WORDS[id] for id in said]) > 0 for said in found.ids])
    return {
        "reward": float((weights * found.rewards).mean()),
        "tail": scoring.lower_tail(found.rewards, weights),
        "ruin": 100 * float((weights * ruined).mean()),
        "kl": float((weights * np.log(np.maximum(weights, 1e-300))).mean()),
    }


def prepare(out: Path, seed: int, args: argparse.Namespace) -> Path:
    """The SFT model of a seed and its preferences, in a directory that gets its name when it is whole."""
    place = out / f"seed-{seed}"
    if place.is_dir():
        return place
    beside = out / f".seed-{seed}"
    shutil.rmtree(beside, ignore_errors=True)
    draw = random.Random(seed)
    write_start(beside / "start")
    topics = [draw.randrange(len(TOPICS)) for _ in range(args.sentences)]
    rows = ({"prompt": TOPICS[topic], "completion": " ".join(sentence(topic, draw))} for topic in topics)
    write_rows(beside / "sentences.jsonl", rows)
    how = f"--weights random --batch-size 64 --epochs 4 --lr 3e-3 --warmup-steps 20 --seed {seed}"
    paths = {"model": beside / "start", "data": beside / "sentences.jsonl", "token_cache": out / "tokens"}
    script(sft.main, how, beside / "sft", **paths)
    lm = load(beside / "sft" / "final")
    for name, number, place_of_seed in (("train", args.pairs, 1), ("test", HELD_OUT, 2)):
        found = speak(lm, 2 * number, 10 * seed + place_of_seed)
        write_rows(beside / f"{name}.jsonl", preferences(found, seed))
    os.replace(beside, place)
    return place


def run(method: str, beta: float, seed: int, place: Path, out: Path, steps: int) -> dict[str, float]:
    """Align from the SFT model of a seed; what align.py says of the held-out pairs at the end."""
    batch = 32 * (UNARY if method == "kto" else 1)
    how = f"{frontier.METHODS[method]} --beta {beta:g} --steps {steps} --batch-size {batch} --seed {seed}"
    how += f" --lr {LR:g} --warmup-steps 20 --eval-examples {HELD_OUT}"
    paths = {"model": place / "sft" / "final", "token_cache": place.parent / "tokens"}
    paths |= {"data": place / "train.jsonl", "eval_data": place / "test.jsonl"}
    script(align.main, how, out, **paths)
    last = json.loads((out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    wanted = {"accuracy": "rewards/accuracies", "kl_chosen": "kl/chosen", "kl_rejected": "kl/rejected"}
    return {name: last[key] for name, key in wanted.items() if key in last}


def fill(args: argparse.Namespace, settings: dict[str, int]) -> None:
    """Run what is missing: seed by seed, so that what is there can be compared at any time."""
    there = frontier.read(args.results, settings)
    for seed in args.seeds:
        wanted = [(method, beta, seed) for method, beta in args.runs]
        wanted = [key for key in wanted if key not in there]
        if not wanted:
            continue
        place = prepare(args.out, seed, args)
        reference = load(place / "sft" / "final")
        others = speak(reference, args.samples, 10 * seed + 3)
        if ("reference", None, seed) not in there:
            many = speak(reference, 10 * args.samples, 10 * seed + 5)
            rows = [{"method": "ideal", "beta": beta} | ideal(many, beta) for beta in IDEAL_BETAS]
            own = speak(reference, args.samples, 10 * seed + 4)
            rows.append({"method": "reference", "beta": None} | measure(reference, reference, own, others))
            for row in rows:
                frontier.add(args.results, row | {"seed": seed} | settings)
        for method, beta, _ in wanted:
            began, out = time.perf_counter(), place / f"{method}-{beta:g}"
            row = {"method": method, "beta": beta, "seed": seed, **settings}
            row |= run(method, beta, seed, place, out, args.steps) | {"seconds": time.perf_counter() - began}
            policy = load(out / "final")
            row |= measure(policy, reference, speak(policy, args.samples, 10 * seed + 4), others)
            frontier.add(args.results, row | frontier.where())
            shutil.rmtree(out)
            said = "  ".join(f"{name} {row[name]:.3f}" for name in ("reward", "tail", "ruin", "kl"))
            config.tell(f"seed {seed}  {method}  beta {beta:g}:  {said}  {row['seconds']:.0f} s")


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """As Markdown: at equal drift, all means, and drifts seed by seed."""
    accuracy = {"accuracy": frontier.MEASURES["accuracy"]}
    drifts = {key: f"{frontier.MEASURES[key][0]}, times" for key in ("kl", "kl_chosen")}
    trained = [row for row in rows if "accuracy" in row]
    paired = [frontier.differences(trained, accuracy, base, drifts) for base in frontier.BASES]
    return "\n\n".join(filter(None, [frontier.at_equal_drift(rows), frontier.table(rows), *paired]))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    here = Path(__file__).resolve().parent.parent
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    made.error = lambda message: config.fail(message)
    add = made.add_argument
    # fmt: off
    add("--quick", action="store_true", help="six methods, two betas, one seed, of the same settings")
    add("--methods", nargs="+", choices=frontier.METHODS, default=None, help="None: all, or six with --quick")
    add("--betas", nargs="+", type=config.positive, default=None, help=f"None: {BETAS}, and {STRONG} of some")
    add("--seeds", nargs="+", type=config.count_or_zero, default=None, help=f"None: 0 to {SEEDS - 1}")
    add("--sentences", type=config.count, default=8000, help="of SFT")
    add("--pairs", type=config.count, default=2000, help="preferences trained on")
    add("--steps", type=config.count, default=100, help="of an alignment run, 32 pairs each")
    add("--samples", type=config.count, default=2000, help="sentences that are measured")
    add("--out", type=Path, default=here / "runs" / "controlled", help="models and preferences")
    add("--results", type=Path, default=here / "bench/results/controlled.jsonl", help="rows")
    # fmt: on
    args = made.parse_args(argv)
    args.methods = args.methods or list(QUICK if args.quick else frontier.METHODS)
    betas = args.betas or (QUICK_BETAS if args.quick else BETAS)
    args.runs = [(method, beta) for beta in betas for method in args.methods]
    if not args.betas and not args.quick:
        args.runs += [(method, STRONG) for method in args.methods if method in STRONGLY]
    args.seeds = args.seeds or ([0] if args.quick else list(range(SEEDS)))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    settings = {key: getattr(args, key) for key in ("sentences", "pairs", "steps", "samples")}
    args.out /= "-".join(map(str, settings.values()))
    with config.user_errors():
        args.results.parent.mkdir(parents=True, exist_ok=True)
        fill(args, settings)
        rows = list(frontier.read(args.results, settings).values())
        said = tables(rows)
        args.results.with_suffix(".md").write_text(said + "\n", encoding="utf-8")
        frontier.figure(rows, args.results)
    config.tell(said)


if __name__ == "__main__":
    main()
