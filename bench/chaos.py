"""Faults at random moments of tiny trainings: does the same command with --resume auto end bit for bit as if
nothing had happened?

    python bench/chaos.py [--kills 50] [--seed 0] [--loss sft dpo dpo_async ra_dpo1 kto ppo] [--ranks 1 2]

Each training runs undisturbed once, then again with faults (FAULTS), two to five of them, each followed by
the same command. Compared at its end: every file of final/, every tensor of the last checkpoint (weights,
AdamW, random states), the rows of metrics.jsonl but for what a clock or the memory says. A full disk may cost
the last checkpoint and rows, which are counted. Exit code 1 on a difference.

Imports dominate so small a run: this process has made them, and ranks are forked from it and joined by hand.
Where the fault is one of torchrun's, it is a real torchrun that starts them.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch  # noqa: E402

import align  # noqa: E402
import checkpoint  # noqa: E402
import metadata  # noqa: E402
import sft  # noqa: E402
import signals  # noqa: E402

torch.set_num_threads(1)
KINDS = {
    "sft": [],
    "dpo": ["--loss", "dpo"],
    "dpo_async": ["--loss", "dpo", "--save-async", "true"],
    "ra_dpo1": ["--loss", "ra_dpo1"],
    "kto": ["--loss", "kto"],
    "ppo": ["--loss", "ppo", "--ppo-epochs", "2"],
}
STEPS, SAVE_EVERY = 12, 2
CLOCKED = ("time", "mem_gb", "step_s", "_per_s")  # what ends so in a row is not compared
FAULTS = ("kill all", "kill one", "term all", "term one", "full disk", "kill torchrun's", "term torchrun")
DAMAGES = ("none", "none", "truncated", "flipped", "deleted")
WAIT = 60  # seconds after which a process that has not ended counts as hanging


def prepare(base: Path) -> None:
    """A model of 0.3 million weights and 40 pairs of unequal lengths."""
    shutil.copytree(ROOT / "examples" / "tiny", base / "model")
    path = base / "model" / "config.json"
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    small |= {"head_dim": 16, "intermediate_size": 32}
    path.write_text(json.dumps(json.loads(path.read_text()) | small))
    answers = [(f"yes {k}" * (k % 4 + 1), f"no {k}") for k in range(40)]
    rows = [
        {"prompt": f"q{k}" * (k % 3 + 1), "chosen": chosen, "rejected": rejected}
        for k, (chosen, rejected) in enumerate(answers)
    ]
    (base / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(base: Path, kind: str, out: Path) -> list[str]:
    argv = [f"{ROOT}/{'sft' if kind == 'sft' else 'align'}.py", *KINDS[kind], "--weights", "random"]
    argv += ["--model", base / "model", "--data", base / "pairs.jsonl", "--eval-data", base / "pairs.jsonl"]
    argv += ["--eval-examples", "8", "--eval-every", "4", "--token-cache", base / "cache", "--out", out]
    argv += ["--steps", STEPS, "--save-every", SAVE_EVERY, "--batch-size", "6", "--lr", "1e-3"]
    argv += ["--tokens-per-microbatch", "64", "--warmup-steps", "0", "--max-length", "64"]
    argv += ["--device", "cpu", "--resume", "auto"]
    return [str(part) for part in argv]


# ---- processes
# -----------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def fork(argv: list[str], ranks: int, log: Path) -> list[int]:
    """The ranks of a training, forked; their process numbers."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    found = []
    for rank in range(ranks):
        if pid := os.fork():
            found.append(pid)
            continue
        code = 1
        try:
            os.environ |= group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            with open(log, "a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            signals.listen()
            (sft if Path(argv[0]).stem == "sft" else align).main(argv[1:])
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)
    return found


def launch(argv: list[str], ranks: int, log: Path) -> subprocess.Popen:
    """The same by torchrun."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    with open(log, "a") as file:
        return subprocess.Popen([*start, *argv], stdout=file, stderr=file, cwd=ROOT)


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def alive(pid: int) -> bool:
    try:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
    except ChildProcessError:  # a child of torchrun's
        pass
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def tell(pids: list[int], number: int) -> None:
    for pid in pids:
        if alive(pid):
            os.kill(pid, number)


def end(pids: list[int], impatient: bool) -> bool:
    """Wait for all of them; where one may have died, as torchrun does: the others get SIGTERM, twice. Did all
    end by themselves or by that?"""
    deadline, told = time.time() + WAIT, 0
    while any(left := [pid for pid in pids if alive(pid)]):
        if impatient and len(left) < len(pids) and told < 2:
            tell(left, signal.SIGTERM)
            told += 1
            time.sleep(0.3)
        if time.time() > deadline:
            tell(left, signal.SIGKILL)
            time.sleep(0.5)
            return False
        time.sleep(0.01)
    return True


# ---- faults
# -----------------------------------------------------------------------------------------------------------


def rows(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b'"split": "train"') if path.exists() else 0


def moment(dice: random.Random, out: Path, pids: list[int]) -> str:
    """Wait for a random moment of a training: of its start, of a step, of a save, of the export."""
    where = dice.choice(("start", "step", "step", "save", "save", "save", "end"))
    if where == "start":
        time.sleep(dice.uniform(0, 3))
        return where
    target = dice.randrange(rows(out), STEPS + 1) if where != "end" else STEPS
    ready = {
        "step": lambda: rows(out) >= target,
        "save": lambda: rows(out) >= target - 1 and any(out.glob(".tmp-step-*")),
        "end": lambda: rows(out) >= STEPS,
    }[where]
    while not ready() and any(alive(pid) for pid in pids):
        time.sleep(0.001)
    time.sleep(dice.choice((0, 1)) * dice.uniform(0, 0.1 if where == "save" else 0.3))
    return where


def fill_disk(dice: random.Random, pids: list[int], out: Path) -> None:
    """No file of one rank, or of all, grows beyond a size, for one save or so."""
    limit = dice.choice((100, 20_000, 500_000))
    chosen = pids if dice.random() < 0.5 else [dice.choice(pids)]
    before = rows(out)
    for size in (limit, resource.RLIM_INFINITY):
        for pid in chosen:
            if alive(pid):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        while size == limit and rows(out) < before + SAVE_EVERY and any(map(alive, pids)):
            time.sleep(0.01)
            if time.time() % 5 < 0.01:  # rows may be what does not fit
                break


def damage(dice: random.Random, out: Path) -> str:
    """Truncate, change or delete a file of the newest checkpoint."""
    found = checkpoint.complete(out)
    how = dice.choice(DAMAGES) if found else "none"
    if how == "none":
        return ""
    path = dice.choice(sorted(found[0].iterdir()))
    content = bytearray(path.read_bytes())
    if how == "deleted" or not content:
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: dice.randrange(len(content))])
    else:
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        path.write_bytes(content)
    return f", then {found[0].name}/{path.name} {how}"


def fault(dice: random.Random, argv: list[str], ranks: int, out: Path, log: Path) -> tuple[str, str, bool]:
    """Start a training and disturb it: (which fault, when, did its processes end)."""
    alone = [name for name in FAULTS[:5] if "one" not in name]
    kind = dice.choice(FAULTS[:5] * 3 + FAULTS[5:] if ranks > 1 else alone)
    if "torchrun" in kind:
        child = launch(argv, ranks, log)
        while not (pids := children(child.pid)) or len(pids) < ranks:
            time.sleep(0.05)
        when = moment(dice, out, pids)
        number = signal.SIGKILL if kind.startswith("kill") else signal.SIGTERM
        tell([dice.choice(pids)] if kind.startswith("kill") else [child.pid], number)
        try:
            child.wait(WAIT)
        except subprocess.TimeoutExpired:
            tell(pids, signal.SIGKILL)
            child.wait()
            return kind, when, False
        return kind, when, end(pids, True)
    pids = fork(argv, ranks, log)
    when = moment(dice, out, pids)
    if kind == "full disk":
        fill_disk(dice, pids, out)
        return kind, when, end(pids, True)
    number = signal.SIGKILL if kind.startswith("kill") else signal.SIGTERM
    tell(pids if kind.endswith("all") else [dice.choice(pids)], number)
    return kind, when, end(pids, True)


# ---- what must be equal
# -----------------------------------------------------------------------------------------------------------


def outcome(out: Path) -> dict[str, str]:
    """Digests of what a finished run leaves, by the name of a thing."""
    found = {path.name: digest(path.read_bytes()) for path in sorted((out / "final").iterdir())}
    step = out / f"step-{STEPS}"
    if step.exists():
        saved = metadata.read(step).state_dict_metadata
        state = {name: torch.empty(it.size, dtype=it.properties.dtype) for name, it in saved.items()}
        checkpoint._read(step, state, no_dist=True)
        found |= {f"{step.name} {name}": digest(v.numpy().tobytes()) for name, v in sorted(state.items())}
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    kept = [{key: value for key, value in row.items() if not key.endswith(CLOCKED)} for row in lines]
    return found | {f"row {row['step']} {row['split']}": json.dumps(row, sort_keys=True) for row in kept}


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def undisturbed(base: Path, kind: str, ranks: int, out: Path) -> dict[str, str]:
    log = out.with_suffix(".log")
    if not end(fork(command(base, kind, out), ranks, log), False) or not (out / "final").exists():
        raise SystemExit(f"{kind} on {ranks} ranks does not end by itself: {log.read_text()[-3000:]}")
    return outcome(out)


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--kills", type=int, default=50, help="faults in all")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--loss", nargs="+", choices=KINDS, default=list(KINDS))
    made.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    args = made.parse_args()
    dice, base = random.Random(args.seed), Path(tempfile.mkdtemp(prefix="chaos-"))
    prepare(base)
    print("| run | ranks | faults, and what came between them | result |\n|---|---|---|---|", flush=True)
    wanted, done, wrong = {}, Counter(), 0
    began = time.time()
    for number, (kind, ranks) in enumerate(itertools.cycle(itertools.product(args.loss, args.ranks))):
        if sum(done.values()) >= args.kills:
            break
        if (kind, ranks) not in wanted:
            wanted[kind, ranks] = undisturbed(base, kind, ranks, base / f"{kind}-{ranks}")
        out = base / f"run-{number}"
        argv, log, story, ended = command(base, kind, out), out.with_suffix(".log"), [], True
        for _ in range(dice.randint(2, 5)):
            name, when, by_itself = fault(dice, argv, ranks, out, log)
            ended = ended and by_itself
            done[name] += 1
            story.append(f"{name} ({when}){damage(dice, out) if not (out / 'final').exists() else ''}")
            if (out / "final").exists():
                break
        ended = end(fork(argv, ranks, log), True) and ended
        found, should = outcome(out) if (out / "final").exists() else {}, wanted[kind, ranks]
        lost = []  # what a full disk may cost: the last checkpoint, and rows of the log
        if any(told.startswith("full disk") for told in story):
            lost = [name for name in should if name.startswith(("row ", f"step-{STEPS} ")) and name not in found]
        should = {name: value for name, value in should.items() if name not in lost}
        other = sorted(name for name in {*found, *should} if found.get(name) != should.get(name))
        said = "equal" if not other else f"{len(other)} differ, first {other[0]}" if found else "not finished"
        said += "" if ended else ", a process hung"
        # who lost one says how, and torchrun how it was told
        peers = any(" one" in told or "torchrun" in told for told in story)
        said += ", a traceback" if "Traceback" in log.read_text() and not peers else ""
        wrong += said != "equal"
        rows_lost = sum(name.startswith("row ") for name in lost)
        but = f", but for {rows_lost} rows" * bool(rows_lost and found)
        print(f"| {kind} | {ranks} | {'; '.join(story)} | {said}{but} |", flush=True)
        if said == "equal":
            shutil.rmtree(out, ignore_errors=True)
    told = ", ".join(f"{count} x {name}" for name, count in done.most_common())
    seconds = time.time() - began
    print(f"\n{sum(done.values())} faults ({told}), {seconds:.0f} s, {wrong} runs that differ", flush=True)
    if wrong:
        sys.exit(f"kept: {base}")
    shutil.rmtree(base)


if __name__ == "__main__":
    main()
