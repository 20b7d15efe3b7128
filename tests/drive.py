"""Runs training jobs with the real scripts, several in one process group, and keeps what a run does not
write.

    python tests/drive.py JOBS.json          torchrun --nproc-per-node 2 tests/drive.py JOBS.json

A job is {"script", "argv", "mutation": [old, new] or null}. The script's source is executed as it stands, or
with one line replaced, of it or of frozen.py: the mutation that must turn a test red. Into the run directory goes gradients.pt, the
whole gradients of every optimiser step before clipping, from rank 0, and collectives.json, how many collectives
of tensors each step has made by then, by name, how many models rest on the CPU, and how many graphs of --compile it has made and run, which are
traced and run operation by operation: no code is generated.
"""

import collections
import functools
import json
import os
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

import fsdp  # noqa: E402

clip_gradients = fsdp.clip_gradients
start_group = dist.init_process_group
# a process group can be made only once under one launcher: the jobs share it
dist.init_process_group = lambda *args, **options: dist.is_initialized() or start_group(*args, **options)
fsdp.finish = fsdp.barrier
CALLS: collections.Counter = collections.Counter()  # of the step
compiler = torch.compile


def traced(function, dynamic, options):
    """torch.compile without what generates code, whose options these are."""
    assert options == {"emulate_precision_casts": True}
    return compiler(function, dynamic=dynamic, backend=counted_graph)


def counted_graph(graph, inputs):
    """A backend that counts."""
    CALLS["graphs made"] += 1

    def run(*given):
        CALLS["graphs run"] += 1
        return graph.forward(*given)

    return run


torch.compile = traced


def count(name: str, where=dist) -> None:
    """Count the calls of a collective, or of another function, from now on."""
    call = getattr(where, name)

    @functools.wraps(call, updated=())
    def counted(*args, **options):
        CALLS[name] += 1
        return call(*args, **options)

    setattr(where, name, counted)


for name in ("all_gather_single", "reduce_scatter_single"):
    if hasattr(dist, name):  # torch 2.11 has other names
        count(name)
count("CPUOffloadPolicy", fsdp)  # of each model that rests on the CPU


def run(job: dict) -> None:
    gradients, calls = [], []
    CALLS.clear()

    def record(limits):
        gradients.append({})
        calls.append(dict(CALLS))
        CALLS.clear()
        for key, (part, _) in limits.items():
            prefix = "value_head." if key == "value_grad_norm" else ""
            for name, parameter in part.named_parameters() if part is not None else ():
                grad = parameter.grad
                if grad is not None:
                    whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
                    gradients[-1][prefix + name] = whole.clone()
        return clip_gradients(limits)

    fsdp.clip_gradients = record
    sources = {name: (ROOT / name).read_text(encoding="utf-8") for name in (job["script"], "frozen.py")}
    if job.get("mutation"):
        old, new = job["mutation"]
        counts = {name: source.count(old) for name, source in sources.items()}
        assert sum(counts.values()) == 1, f"{old!r} stands {counts} times"
        sources = {name: source.replace(old, new) for name, source in sources.items()}
    frozen = sys.modules["frozen"] = types.ModuleType("frozen")
    exec(compile(sources["frozen.py"], "frozen.py", "exec"), vars(frozen))
    sys.modules.pop("references", None)  # it shares a class with frozen
    names = {"__name__": "driven", "__file__": str(ROOT / job["script"])}
    exec(compile(sources[job["script"]], job["script"], "exec"), names)
    names["main"](job["argv"])
    out = Path(job["argv"][job["argv"].index("--out") + 1])
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(gradients, out / "gradients.pt")
        (out / "collectives.json").write_text(json.dumps(calls), encoding="utf-8")


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        run(job)
    dist.destroy_process_group()
