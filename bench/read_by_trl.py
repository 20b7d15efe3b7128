"""Are label.py's files what TRL reads? Trains one step with TRL's own trainers on them.

    python bench/read_by_trl.py [--venv DIR]

Answers of the bundled HH sample are labelled by a function of their length, written as pairs and as labelled
answers (--layout trl), with turns and as plain text, and given to TRL's DPOTrainer and KTOTrainer as they are,
through `load_dataset("json")`, in the environment of bench/parity.py. Compared are the ids that DPOTrainer makes
of each pair with those of encode.py, but for white space that the template writes after the end of a turn, which
TRL trains and we do not. Prints a Markdown table; exits 1 where something differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
FILES = {"pairs, turns": "dpo", "pairs, text": "dpo", "labels, turns": "kto", "labels, text": "kto"}
SCORER = "def shorter(prompt, completion):\n    return -len(completion)\n"


def write(folder: Path) -> dict[str, str]:
    """The files, and a tiny model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    import label

    tiny = ROOT / "examples" / "tiny"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny)).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder / "model")
    hh = [json.loads(line) for line in (ROOT / "examples" / "hh_train.jsonl").open(encoding="utf-8")][:16]
    (folder / "scorer.py").write_text(SCORER)
    sys.path.insert(0, str(folder))
    found = {}
    for name, kind in FILES.items():
        rows = []
        for number, row in enumerate(hh):
            prompt = row["prompt"][-1]["content"] if "text" in name else row["prompt"]
            for place, key in enumerate(("chosen", "rejected")):
                rows.append({"id": f"{number}-{place}", "prompt": prompt, "completion": f" {row[key]}"})
        answers = folder / f"{name}.answers.jsonl"
        answers.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        found[name] = str(folder / f"{name}.jsonl")
        how = ["--pairs", "best-worst"] if kind == "dpo" else ["--layout", "trl"]
        label.main(["--data", str(answers), "--by", "scorer:shorter", "--out", found[name], *how])
    return found


def ours(model: str, file: str, plain: bool) -> list[list[list[int]]]:
    """Prompt, chosen and rejected ids of each row."""
    from transformers import AutoTokenizer

    import chat
    import data
    import encode

    tokenizer = AutoTokenizer.from_pretrained(model)
    template = chat.chat_template(tokenizer, "none" if plain else None)
    examples = [encode.encode(example, tokenizer, 4096, 2048, template) for example in data.load(file, "train")[0]]
    return [[example.prompt, *example.completions] for example in examples]


def equal(theirs: list[list[int]], own: list[list[int]], model: str) -> bool:
    from transformers import AutoTokenizer

    tails = [ids[len(mine) :] for ids, mine in zip(theirs, own, strict=True)]
    begin = all(ids[: len(mine)] == mine for ids, mine in zip(theirs, own))
    return begin and not "".join(AutoTokenizer.from_pretrained(model).batch_decode(tails)).strip()


def child(job: dict) -> None:
    """In TRL's environment."""
    import trl
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = {}
    for name, file in job["files"].items():
        rows = load_dataset("json", data_files=file, split="train", cache_dir=f"{job['folder']}/cache")
        kto = FILES[name] == "kto"
        if kto:
            from trl.experimental.kto import KTOConfig as config
            from trl.experimental.kto import KTOTrainer as trainer
        else:
            config, trainer = trl.DPOConfig, trl.DPOTrainer
        settings = {"max_steps": 1, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none"}
        settings |= {"output_dir": f"{job['folder']}/out", "save_strategy": "no", "logging_steps": 1, "max_length": 2048}
        run = trainer(
            model=AutoModelForCausalLM.from_pretrained(job["model"]),
            args=config(**settings, disable_tqdm=True),
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(job["model"]),
        )
        run.train()
        made = run.train_dataset
        ids = []
        if not kto:
            keys = [key for key in ("prompt_ids", "chosen_ids", "rejected_ids") if key in made.column_names]
            ids = [[row[key] for key in keys] for row in made]
        loss = next(row["loss"] for row in run.state.log_history if "loss" in row)
        out[name] = {"rows": len(made), "loss": loss, "ids": ids, "trl": trl.__version__}
    Path(job["answer"]).write_text(json.dumps(out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-trl", help="the environment of TRL")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(json.loads(Path(args.child).read_text()))
    from parity import install

    python = install(args.venv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write(folder)
        job = {"files": files, "folder": name, "model": f"{name}/model", "answer": f"{name}/answer.json"}
        (folder / "job.json").write_text(json.dumps(job))
        environment = os.environ | {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
        command = [str(python), str(Path(__file__).resolve()), "--child", f"{name}/job.json"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(done.stderr[-4000:])
        found = json.loads((folder / "answer.json").read_text())
        print(f"TRL {found['pairs, turns']['trl']}, one step each\n")
        print("| file of label.py | rows | loss of the first step | pairs with our ids |\n|---|---|---|---|")
        wrong = 0
        for name, row in found.items():
            same = "-"
            if row["ids"]:
                mine = ours(job["model"], files[name], "text" in name)
                alike = sum(equal(theirs, own, job["model"]) for theirs, own in zip(row["ids"], mine, strict=True))
                same, wrong = f"{alike} of {len(mine)}", wrong + len(mine) - alike
            print(f"| {name} | {row['rows']} | {row['loss']:.4f} | {same} |")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
