"""Loading a model: the memory of each rank and the time, weights into shards against the whole model sharded.

    python bench/load.py [--model models/smollm2] [--out FILE]

Without --model a random Llama of 0.5 billion parameters (1 GB in bf16) is written into a temporary folder. On
one process and on two: "policy" in fp32, "reference" in bf16, and both as align.py loads them, the reference a
copy of the policy. "whole" is the way of model.load: every rank has the whole model in fp32, and shards it.
One launch a row; memory is the peak resident set of a rank, pages of mapped files with it, above what it was
after the imports and the start of the process group, the largest of the ranks, also as a share of the size of
what is loaded in its dtype. Times are from there to the last rank's last weight, the file in the page cache.
Prints a Markdown table and one JSON line.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from step import describe_machine, report  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402

import fsdp  # noqa: E402
import model  # noqa: E402

SIZES = {"vocab_size": 49152, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
LENGTH = 512
BYTES = {"policy": 4, "reference": 2, "policy and reference": 6}  # a parameter
CPU = torch.device("cpu")


def write(folder: str) -> None:
    """A Llama all rows of whose matrices are one: as good as any to be read, and drawn in no time."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), dtype=torch.bfloat16)
    drawn = {n: 0.02 * torch.randn(p.shape[-1], dtype=p.dtype) for n, p in lm.named_parameters()}
    whole = {n: drawn[n].expand(p.shape).contiguous() for n, p in lm.named_parameters()}
    lm.save_pretrained(folder, state_dict=whole)


def resident(which: str) -> int:
    """Bytes of this process: VmRSS, those now, or VmHWM, the most since clear_refs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))


def measure(path: str, what: str, way: str) -> None:
    """Load on this rank; rank 0 prints bytes above those before, seconds, and the number of parameters."""
    fsdp.init("cpu")
    fsdp.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, began = resident("VmRSS"), time.perf_counter()
    dtype = torch.bfloat16 if what == "reference" else torch.float32
    loaded = (model.load if way == "whole" else model.outline)(path, dtype, LENGTH)
    copy = model.copied(loaded, torch.bfloat16) if "and" in what else None
    for lm, like in ((loaded, None), (copy, loaded)):
        if lm is not None and way == "shards":
            model.place(lm, torch.bfloat16, CPU, like)
        elif lm is not None:
            fsdp.shard(lm, lm.blocks, torch.bfloat16, CPU)
    fsdp.barrier()
    seconds, peak = time.perf_counter() - began, resident("VmHWM") - before
    count = sum(parameter.numel() for parameter in loaded.parameters())
    said = fsdp.gathered(json.dumps({"peak": peak, "seconds": seconds, "parameters": count}))
    if fsdp.ranks()[0] == 0:
        print(max(said, key=lambda one: json.loads(one)["peak"]))
    fsdp.finish()


def launch(path: str, what: str, way: str, processes: int) -> dict[str, float]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *torchrun, __file__, "--model", path, "--worker", what, way]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--model", default=None, help="a model directory; None: a random one")
    made.add_argument("--out", type=Path, default=None, help="the table goes there too")
    made.add_argument("--worker", nargs=2, default=None, help=argparse.SUPPRESS)
    args = made.parse_args()
    if args.worker:
        return measure(args.model, *args.worker)
    with tempfile.TemporaryDirectory() as folder:
        path = args.model or folder
        if args.model is None:
            write(folder)
        rows = [
            {"processes": processes, "what": what, "way": way, **launch(path, what, way, processes)}
            for processes in (1, 2)
            for what in BYTES
            for way in ("whole", "shards")
        ]
    lines = [
        f"{describe_machine()}; {args.model or 'a random Llama'}, {rows[0]['parameters'] / 1e6:.0f} M parameters",
        "",
        "| processes | what | way | peak, GB a rank | of its size | s |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        share = row["peak"] / (BYTES[row["what"]] * row["parameters"])
        lines.append(
            f"| {row['processes']} | {row['what']} | {row['way']} | {row['peak'] / 1e9:.2f} | {share:.2f} "
            f"| {row['seconds']:.1f} |"
        )
    report(lines, {"rows": rows}, args.out)


if __name__ == "__main__":
    main()
