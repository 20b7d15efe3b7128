"""Puts the repository's root on the path, keeps the suite offline and off the user's caches."""
import atexit
import os
import shutil
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
