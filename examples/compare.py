"""Methods compared on a real model and real preferences: SmolLM2-135M on the HH harmless sample, with seeds.

    bash run.sh compare            the whole plan: short dialogues, fp32, 20 steps; hours, on two cores too
    bash run.sh compare --jobs 2   two runs at a time, with OMP_NUM_THREADS=1 a core each: 3.5 hours on two
    bash run.sh compare --large    any dialogue, cut at 256 tokens, 100 steps: for a GPU; --jobs 12 share it
    bash run.sh compare --quick    three methods, one seed, a few steps: that it runs, nothing else
    python examples/compare.py --methods dpo tdpo2 --seeds 0 1 --model DIR

Stopped, the same command goes on.

In this order, each piece skipped where its row is in --results:

    1. the training rows are split by what a dialogue begins with into train and dev; SFT on the chosen
       answers of train. Of train, dev and test only dialogues of at most so many characters, whole
    2. each method at beta 0.1, the first seed, half of the steps, at three learning rates: the rate is the
       one with the least -log sigma(0.1 margin) on dev, dpo's own loss: a proper score of preferences, the
       same for all methods, that needs fewer pairs than an accuracy does to tell two rates apart. Drifts of
       methods at different rates are drifts of rates; dev has them all at the same ones
    3. each method at its rate, beta 0.1: five seeds of dpo, tdpo1, tdpo2 and ra_dpo1_cvar_0.97, three of
       the rest
    4. dpo, tdpo2 and ra_dpo1_cvar_0.97 at other betas, with one seed, for a frontier

All from the same SFT model with the same number of steps and pairs a step, 10 % of them warm-up. The
reference's hidden states are computed once and kept (--cache-reference, --cache-hidden: every method logs
its drift). What each training logged is kept beside --results, for plot.py: within the first epoch a step's
batch was not seen before, so that these are held-out too. Whatever a model was trained with, it is measured
alike, in fp32, on the test rows: reward = log pi(y) - log pi_ref(y), so that accuracies compare;
KL(reference || policy), and the CVaR of the next token's log-ratio at the worst 5 %, in nats, summed over
the answer. Of each pair its margin and KL are kept, for intervals over pairs. The standard error of an
accuracy of 120 pairs is 0.045, of 360 0.026, that of a difference between two models on the same pairs is
smaller. A seed is an order of the data; the model and the rows do not change, so the spread over seeds is
not that over samples of preferences.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import align  # noqa: E402
import config  # noqa: E402
import drift  # noqa: E402
import frontier  # noqa: E402
import numpy as np  # noqa: E402
import plot  # noqa: E402
import precision  # noqa: E402
import sft  # noqa: E402

KNOWN_REWARD_ONLY = ("ra_dpo2_cvar_0.98", "ra_dpo2_cvar_0.1")
METHODS = {name: flags for name, flags in frontier.METHODS.items() if name not in KNOWN_REWARD_ONLY}
MAIN = ("dpo", "tdpo1", "tdpo2", "ra_dpo1_cvar_0.97")
SWEPT = ("dpo", "tdpo2", "ra_dpo1_cvar_0.97")
DRAWN = ("kto", *MAIN, "ra_dpo1_cvar_0.5", "ra_dpo1_cvar_0.1", "ra_dpo2_cvar_0.97")  # over training
BETA = 0.1
OTHER_BETAS = (0.03, 0.3, 1.0)
DEV = 8  # one prompt of so many
PAIRS = 8  # of a step
LENGTHS = "--max-length 256 --max-prompt-length 128"
TRAINED = f"{LENGTHS} --activation-checkpointing none --tokens-per-microbatch 4096"
ALIGNED = f"{TRAINED} --cache-hidden true"
WHOLE = {  # what a plan is where no flag says it
    "methods": tuple(METHODS), "seeds": (0, 1, 2, 3, 4), "betas": OTHER_BETAS, "rates": (1e-5, 2e-5, 4e-5),
    "steps": 20, "sft_steps": 40, "rows": None, "characters": 400, "eval_pairs": 120, "dtype": "float32",
}  # fmt: skip
LARGE = WHOLE | {"rates": (5e-6, 1e-5, 2e-5), "steps": 100, "sft_steps": 200, "characters": None}
LARGE |= {"eval_pairs": 360, "dtype": precision.usual("auto")}
QUICK = WHOLE | {"methods": SWEPT, "seeds": (0,), "betas": (), "rates": (2e-5,), "sft_steps": 20}
QUICK |= {"eval_pairs": 64}
LABELS = ("loss", "risk", "confidence_level", "risk_aversion", "beta", "lr", "seed", "steps")  # of a curve
JUDGED = f"--loss dpo --beta {BETA} --cache-hidden true {LENGTHS} --steps 0 --dtype float32"  # on dev
LOGGED = {  # of align.py -> of a row
    "loss": "nll",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "kl/chosen": "kl_chosen",
    "kl/rejected": "kl_rejected",
}
CURVES = ("split", "step", *LOGGED, "risk/chosen", "risk/rejected", "grad_norm")  # kept of a training
COLUMNS = {
    "accuracy": ("held-out accuracy", ".3f"),
    "margin": ("margin, nats", ".3f"),
    "kl_chosen": ("KL chosen", ".3f"),
    "kl_rejected": ("KL rejected", ".3f"),
    "balance": ("KL chosen / rejected", ".3f"),
    "gain": ("margin / root KL", ".3f"),
    "cvar_chosen": ("next-token CVaR 5 % chosen", ".2f"),
    "cvar_rejected": ("rejected", ".2f"),
    "lr": ("learning rate", ".0e"),
    "seconds": ("seconds a run", ".0f"),
}
PAIRED = {"accuracy": COLUMNS["accuracy"]}
RATIOS = {
    key: f"{COLUMNS[key][0].removesuffix(', nats')}, times"
    for key in ("kl_chosen", "kl_rejected", "balance", "margin", "gain")
}
DRAWN_ANEW = 4000
DRIFTS = (0.1, 0.3)  # nats of chosen answers, of the rows of dev
PANELS = [("accuracy", "held-out accuracy"), ("margin", "margin, nats")]  # of the frontier
PANELS += [("cvar_rejected", "next-token CVaR 5 % rejected answers")]
DEV_PANELS = [("nll", "-log sigma(0.1 margin), dev"), ("margin", "margin, nats"), ("accuracy", "accuracy")]


def split(out: Path, rows: int | None, characters: int | None) -> None:
    """test.jsonl, and train.jsonl and dev.jsonl of the first so many training rows, with dialogues of at most
    so many characters: those that begin alike, of which one may go on where another ends, are in one part."""
    if (out / "train.jsonl").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[str]] = {"test": [], "dev": [], "train": []}  # train is written last
    for name, limit in (("test", None), ("train", rows)):
        source = ROOT / "examples" / f"hh_{name}.jsonl"
        for line in source.read_text(encoding="utf-8").splitlines()[:limit]:
            row = json.loads(line)
            begins = json.dumps(row["prompt"][0])
            held = name == "train" and int(hashlib.sha256(begins.encode()).hexdigest(), 16) % DEV == 0
            answers = [len(row[answer]) for answer in ("chosen", "rejected")]
            size = sum(len(turn["content"]) for turn in row["prompt"]) + max(answers)
            if characters is None or size <= characters:
                parts["dev" if held else name].append(line + "\n")
    for name, lines in parts.items():
        beside = out / f".{name}.tmp"
        beside.write_text("".join(lines), encoding="utf-8")
        beside.replace(out / f"{name}.jsonl")


def named(paths: dict[str, Path]) -> list[str]:
    """As flags."""
    return [word for name, path in paths.items() for word in (f"--{name.replace('_', '-')}", str(path))]


def script(main: Callable, command: str, out: Path, **paths: Path) -> dict[str, Any]:
    """A script in this process, to its end, going on where it was killed; the last row that it logged. What
    it says goes to out.log."""
    flags = [*command.split(), "--out", str(out), "--resume", "auto", *named(paths)]
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{out}.log", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        main(flags)
    return json.loads((out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])


def settings(args: argparse.Namespace, steps: int, judged: str) -> dict[str, Any]:
    """What rows must have in common to be compared."""
    shared = {"model": args.model.name, "rows": args.rows, "characters": args.characters}
    shared |= {"sft_steps": args.sft_steps, "dtype": args.dtype}  # of training
    return shared | {"steps": steps, "judged": judged, "eval_pairs": args.eval_pairs}


def named_for(key: tuple[str, float, int], rate: float, steps: int) -> str:
    """The folder of a run."""
    method, beta, seed = key
    return f"{method}-{beta:g}-{rate:g}-{seed}-{steps}"


def run(key: tuple[str, float, int], rate: float, steps: int, judged: str, args: argparse.Namespace) -> None:
    """One alignment run and its measure on the rows `judged`, as a row of results; its model is deleted."""
    method, beta, seed = key
    told = settings(args, steps, judged) | {"lr": rate}
    if key in frontier.read(args.results, told):
        return
    began, out = time.perf_counter(), args.out / named_for(key, rate, steps)
    start, cache = args.out / "sft" / "final", args.out / "reference"
    batch = PAIRS * (2 if method == "kto" else 1)  # it counts responses
    how = f"{METHODS[method]} --beta {beta:g} --lr {rate:g} --steps {steps}"
    how += f" --warmup-steps {max(1, steps // 10)} --batch-size {batch}"
    saved = 50 if args.jobs == 1 else 0  # runs at a time are short ones, and would fill a disk
    how += f" --seed {seed} {ALIGNED} --save-every {saved} --log-every {max(1, steps // 20)}"
    how += f" --dtype {args.dtype}"
    script(align.main, how, out / "run", model=start, data=args.out / "train.jsonl", cache_reference=cache)
    row = {"method": method, "beta": beta, "seed": seed} | told
    final, rows = out / "run" / "final", args.out / f"{judged}.jsonl"
    if judged == "dev":
        paths = {"model": final, "reference": start, "cache_reference": cache}
        paths |= {"data": rows, "eval_data": rows}
        how = f"{JUDGED} --eval-examples {args.eval_pairs}"
        found = script(align.main, how, out / "measured", **paths)
        row |= {name: found[key] for key, name in LOGGED.items()}
        row["margin"] /= BETA
    else:
        states = args.out / f"test_{args.eval_pairs}.pt"
        found = next(drift.measured([str(final)], str(start), str(rows), args.eval_pairs, 256, states))
        row |= of_pairs(found) | {"drift": drift.summary(found.tokens)}
        keep_curve(out / "run", args.results.with_suffix("") / out.name)
    row["seconds"] = time.perf_counter() - began
    frontier.add(args.results, row | frontier.where())  # last: with it the run counts as done
    shutil.rmtree(out)
    said = "  ".join(f"{name} {row[name]:.3f}" for name in LOGGED.values() if name in row)
    said += f"  {row['seconds']:.0f} s"
    config.tell(f"{method}  beta {beta:g}  lr {rate:g}  seed {seed}  {judged}:  {said}")


def keep_curve(run: Path, kept: Path) -> None:
    """What a training logged, for plot.py: CURVES of each step, and LABELS of its flags."""
    kept.mkdir(parents=True, exist_ok=True)
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    curve = [{key: step[key] for key in CURVES if key in step} for step in map(json.loads, lines)]
    text = "".join(json.dumps(frontier.rounded(step)) + "\n" for step in curve)
    (kept / "metrics.jsonl").write_text(text, encoding="utf-8")
    flags = json.loads((run / "args.json").read_text(encoding="utf-8"))
    told = json.dumps({name: flags[name] for name in LABELS if flags.get(name) is not None})
    (kept / "args.json").write_text(told + "\n", encoding="utf-8")


def of_pairs(found: drift.Measured) -> frontier.Row:
    """Means over pairs, and what intervals over pairs need: of each its margin and the KL of both answers."""
    margins = found.logratios[0] - found.logratios[1]  # (B,)
    row = {"accuracy": np.mean((np.sign(margins) + 1) / 2), "margin": margins.mean()}
    for name, values in (("kl", found.kl), ("cvar", found.cvar)):
        row |= {f"{name}_{answers}": part.mean() for answers, part in zip(("chosen", "rejected"), values)}
    each = {"margins": margins, "kls": found.kl.mean(axis=0)}
    shown = {name: [float(f"{value:.4g}") for value in values] for name, values in each.items()}
    return {name: float(value) for name, value in row.items()} | {"pairs": shown}


def fill(args: argparse.Namespace) -> None:
    """The reference's values of all rows, before several runs at a time read them."""
    train, dev = (args.out / f"{name}.jsonl" for name in ("train", "dev"))
    hows = [f"{METHODS[name]} {ALIGNED}" for name in {"dpo", "kto", "tdpo2"} & set(args.methods)]
    wanted = [(how, {"data": train}) for how in hows] + [(JUDGED, {"data": dev, "eval_data": dev})]
    always = {"model": args.out / "sft" / "final", "out": args.out / "filled"}
    always["cache_reference"] = args.out / "reference"
    for how, paths in wanted:
        how += f" --cache-reference-only true --eval-examples {args.eval_pairs}"
        align.main([*how.split(), *named(paths | always)])


def runs(
    wanted: Iterable[tuple[tuple, float]], steps: int, judged: str, args: argparse.Namespace
) -> None:
    """Each (key, rate), --jobs of them at a time, in processes of their own."""
    if args.jobs == 1:
        for key, rate in wanted:
            run(key, rate, steps, judged, args)
        return
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        waited = [pool.submit(run, key, rate, steps, judged, args) for key, rate in dict.fromkeys(wanted)]
        try:
            for one in waited:
                one.result()
        finally:
            pool.shutdown(cancel_futures=True)


def half(steps: int) -> int:
    """Of the runs on dev."""
    return max(1, steps // 2)


def rows_at(args: argparse.Namespace, steps: int, judged: str) -> dict[float, dict[tuple, frontier.Row]]:
    """Learning rate, the smallest first, -> the rows of frontier.read."""
    told = settings(args, steps, judged)
    return {rate: frontier.read(args.results, told | {"lr": rate}) for rate in sorted(args.rates)}


def chosen_rates(args: argparse.Namespace) -> dict[str, float]:
    """Of each method the learning rate with the least nll on dev, of equals the smallest."""
    if len(args.rates) == 1:
        return dict.fromkeys(args.methods, args.rates[0])
    first = args.seeds[0]
    wanted = [((method, BETA, first), rate) for method in args.methods for rate in sorted(args.rates)]
    runs(wanted, half(args.steps), "dev", args)
    found = rows_at(args, half(args.steps), "dev")
    scores = {m: {rate: found[rate][m, BETA, first]["nll"] for rate in found} for m in args.methods}
    return {method: min(score, key=score.get) for method, score in scores.items()}


def plan(args: argparse.Namespace) -> Iterable[tuple[str, float, int]]:
    """(method, beta, seed) of step 3 seed by seed, so that what is there can be compared, and of step 4."""
    for index, seed in enumerate(args.seeds):
        for method in args.methods:
            if method in MAIN or index < 3:
                yield method, BETA, seed
    for beta in args.betas:
        for method in args.methods:
            if method in SWEPT:
                yield method, beta, args.seeds[0]


def tables(rows: Sequence[frontier.Row], dev: Sequence[frontier.Row] = ()) -> str:
    """As Markdown: means over seeds, differences from frontier.BASES seed by seed, and what rates do on dev.

    balance = KL chosen / KL rejected, which the gradient through a drift moves; gain = margin / root of their
    mean: a short step has a margin as long as it is and a KL of its square, so a method that is dpo with a
    shorter step has dpo's gain."""
    rows = [row | derived(row) for row in rows]
    compared = [frontier.differences(rows, PAIRED, base, RATIOS) for base in frontier.BASES]
    compared += [over_pairs(rows, base) for base in frontier.BASES]
    return "\n\n".join(filter(None, [frontier.table(rows, COLUMNS), *compared, by_rate(dev)]))


def derived(row: frontier.Row) -> frontier.Row:
    """Balance and, of a row with a margin, gain: see tables."""
    mean = (row["kl_chosen"] + row["kl_rejected"]) / 2
    found = {"balance": row["kl_chosen"] / row["kl_rejected"]}
    return found | ({"gain": row["margin"] / mean**0.5} if "margin" in row else {})


def over_pairs(rows: Sequence[frontier.Row], base: str) -> str:
    """As Markdown: quotients to `base` at BETA with intervals over the test pairs: of the means over the
    seeds that both have, with pairs drawn anew, the same for both and all seeds; the middle 95 % of
    DRAWN_ANEW draws."""
    found: dict[str, dict] = {}
    for row in rows:
        if row["beta"] == BETA and "pairs" in row:
            each = np.array([row["pairs"]["margins"], row["pairs"]["kls"]])  # (2, B)
            found.setdefault(row["method"], {})[row["seed"]] = each
    heads = [RATIOS["margin"], "mean KL, times", RATIOS["gain"]]
    lines = [f"| method, to {base}, over pairs | seeds | pairs | {' | '.join(heads)} |", "|---" * 6 + "|"]
    for method in [name for name in METHODS if name in found and name != base and base in found]:
        seeds = found[method].keys() & found[base].keys()
        if not seeds:
            continue
        ours, theirs = (np.mean([found[name][seed] for seed in seeds], axis=0) for name in (method, base))
        number = ours.shape[1]
        drawn = np.random.default_rng(0).integers(number, size=(DRAWN_ANEW, number))
        drawn = np.concatenate([np.arange(number)[None], drawn])  # as they are, first
        margin, kl = ours[:, drawn].mean(axis=2) / theirs[:, drawn].mean(axis=2)  # (1 + DRAWN_ANEW,) each
        cells = []
        for values in (margin, kl, margin / np.sqrt(kl)):
            low, high = np.quantile(values[1:], (0.025, 0.975))
            cells.append(f"{values[0]:.2f} ({low:.2f} to {high:.2f})")
        lines.append(f"| {method} | {len(seeds)} | {number} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def by_rate(dev: Sequence[frontier.Row], keys: Sequence[str] = ("nll", "kl_chosen")) -> str:
    """As Markdown: of one seed, each method at each learning rate, the least nll in bold, and its margin at the
    same drift, by lines over the root of KL."""
    rates = sorted({row["lr"] for row in dev})
    titles = {"nll": "-log sigma"} | {key: head.removesuffix(", nats") for key, (head, _) in COLUMNS.items()}
    heads = [f"{titles[key]}, at {rate:g}" for key in keys for rate in rates]
    heads += [f"margin at KL {drift:g}" for drift in DRIFTS]
    lines = [f"| method | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for method in METHODS:
        found = {row["lr"]: row for row in dev if row["method"] == method}
        if not rates or found.keys() != set(rates):
            continue
        cells = [f"{found[rate][key]:.3f}" for key in keys for rate in rates]
        if keys[0] == "nll":
            least = min(range(len(rates)), key=lambda index: found[rates[index]]["nll"])
            cells[least] = f"**{cells[least]}**"
        for drift in DRIFTS:
            there = frontier.on_curve(found.values(), method, "margin", drift, "kl_chosen")
            cells.append("".join(f"{value:.3f}" for value in there.values()))
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def curves(rows: Sequence[frontier.Row], kept: Path, path: Path) -> None:
    """What training logged at BETA, by keep_curve in `kept`, mean and band over seeds: PNG and SVG."""
    runs = {}
    for row in sorted(rows, key=lambda row: list(METHODS).index(row["method"])):
        if row["method"] in DRAWN and row["beta"] == BETA:
            key = row["method"], BETA, row["seed"]
            runs[f"{row['method']}-{row['seed']}"] = plot.read(kept / named_for(key, row["lr"], row["steps"]))
    for form in ("png", "svg"):
        plot.draw(runs, path.with_suffix(f".{form}"))


def draw(rows: Sequence[frontier.Row], dev: Sequence[frontier.Row], first: int, kept: Path, path: Path) -> None:
    """All figures beside `path`, from the rows of test and of dev; `first` is the seed that has all betas."""
    against = ("kl_chosen", "sequential KL, chosen answers, nats")
    frontier.figure([row for row in rows if row["seed"] == first], path, PANELS, against)
    by_rates = [row | {"beta": row["lr"]} for row in dev]  # lines through rates
    frontier.figure(by_rates, path.with_name(f"{path.stem}_rates.png"), DEV_PANELS, against)
    curves(rows, kept, path.with_name(f"{path.stem}_curves.png"))
    drift.figure(tails(rows, first), path.with_name(f"{path.stem}_drift.png"))


def tails(rows: Sequence[frontier.Row], first: int) -> dict[str, dict[str, Any]]:
    """Method -> how drift spreads over tokens (drift.summary), of one seed at BETA."""
    return {row["method"]: row["drift"] for row in rows if (row["seed"], row["beta"]) == (first, BETA)}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    made.error = lambda message: config.fail(message)
    add = made.add_argument
    # fmt: off
    which = made.add_mutually_exclusive_group().add_argument
    which("--quick", action="store_true", help="three methods, one seed, one rate, one beta, few steps")
    which("--large", action="store_true", help="for a GPU: dialogues of any length, more steps")
    add("--methods", nargs="+", choices=METHODS, default=None, help="None: all, or three with --quick")
    add("--seeds", nargs="+", type=config.count_or_zero, default=None, help="None: 0 to 4")
    add("--betas", nargs="*", type=config.positive, default=None, help=f"None: {OTHER_BETAS}")
    add("--rates", nargs="+", type=config.positive, default=None, help="to choose from; None: 1e-5 to 4e-5")
    add("--steps", type=config.count, default=None, help=f"of {PAIRS} pairs; None: 20, large 100")
    add("--sft-steps", type=config.count, default=None, help="None: 40, large 200, quick 20")
    add("--rows", type=config.count, default=None, help="of training; None: all")
    add("--characters", type=config.count, default=None, help="of a dialogue; None: 400, large any")
    add("--eval-pairs", type=config.count, default=None, help="measured; None: 120, large 360, quick 64")
    add("--jobs", type=config.count, default=1, help="runs at a time, on one device")
    add("--model", type=Path, default=ROOT / "models" / "smollm2", help="examples/get_smollm2.py makes it")
    add("--out", type=Path, default=None, help="models, caches; None: runs/compare")
    add("--results", type=Path, default=None, help="None: bench/results/compare.jsonl, compare_large")
    # fmt: on
    args = made.parse_args(argv)
    for name, value in (QUICK if args.quick else LARGE if args.large else WHOLE).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.out = args.out or ROOT / "runs" / "compare"
    holds = (args.model.name, args.rows or "all", args.characters or "any", args.sft_steps, args.dtype)
    args.out /= "-".join(map(str, holds))
    kept = args.out if args.quick else ROOT / "bench" / "results"
    args.results = args.results or kept / ("compare_large.jsonl" if args.large else "compare.jsonl")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with config.user_errors():
        args.results.parent.mkdir(parents=True, exist_ok=True)
        split(args.out, args.rows, args.characters)
        how = f"--steps {args.sft_steps} --batch-size {PAIRS} --lr 1e-5 --warmup-steps 20 {TRAINED}"
        how += f" --dtype {args.dtype}"
        if not (args.out / "sft" / "final").is_dir():
            script(sft.main, how, args.out / "sft", model=args.model, data=args.out / "train.jsonl")
        if args.jobs > 1:
            fill(args)
        rates = chosen_rates(args)
        runs([(key, rates[key[0]]) for key in plan(args)], args.steps, "test", args)
        found = rows_at(args, args.steps, "test")
        rows = [row for rate in found for row in found[rate].values() if rates.get(row["method"]) == rate]
        dev = [row for some in rows_at(args, half(args.steps), "dev").values() for row in some.values()]
        said = tables(rows, dev)
        args.results.with_suffix(".md").write_text(said + "\n", encoding="utf-8")
    config.tell(said)
    draw(rows, dev, args.seeds[0], args.results.with_suffix(""), args.results)


if __name__ == "__main__":
    main()
