"""Puts the repository's root on the path, keeps the suite offline and off the user's caches."""
import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TOKEN_CACHE"] = tempfile.mkdtemp(prefix="tokens-")
atexit.register(shutil.rmtree, os.environ["TOKEN_CACHE"], ignore_errors=True)

import torch  # noqa: E402

torch.set_num_threads(1)  # two threads that wait for each other are slower on small tensors


# What takes longest goes first, or one worker has it at the end while the other has nothing.
LONG = ("methods", "train", "fsdp", "lora", "loop", "sample", "references", "load", "memory", "moe", "subset", "faults")


def pytest_collection_modifyitems(items: list) -> None:
    place = {f"test_{name}": index for index, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


def launch(base: Path, jobs: list[dict], processes: int, threads: int = 1, timeout: int = 400) -> str:
    """Run jobs of drive.py in one launch of so many processes; what they print."""
    path = base / f"jobs{processes}.json"
    path.write_text(json.dumps(jobs), encoding="utf-8")
    command = [sys.executable, "tests/drive.py", str(path)]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout
