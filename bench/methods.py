"""The table of docs/methods.md, from the signatures and docstrings of losses.py.

python bench/methods.py
"""

import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import config  # noqa: E402
import losses  # noqa: E402
import objective  # noqa: E402

HEADER = "| `--loss` | data | reference | statistics | source | defaults |\n|---|---|---|---|---|---|"
BY_SFT = """| `sft.py` | any | no | `token_policy_logps` | - | - |
| `sft.py --method csft` | pairs or labels | no | `token_policy_logps` | [2302.08582](https://arxiv.org/abs/2302.08582) | - |"""


def row(name: str, loss) -> str:
    needs = config.positional(loss)
    if objective.in_pairs(needs):
        kind = "pairs"
    else:
        kind = (
            "scored lists" if "scores" in needs else "labels" if "desirable" in needs else "labels or scores"
        )
    reference = any(need in objective.REFERENCE for need in needs)
    found = re.search(r"Source:.*?arXiv:(\d{4}\.\d{5})", inspect.getdoc(loss), re.S)
    source = f"[{found[1]}](https://arxiv.org/abs/{found[1]})" if found else "see its docstring"
    defaults = {
        p.name: p.default for p in inspect.signature(loss).parameters.values() if p.kind is p.KEYWORD_ONLY
    }
    settings = ", ".join(f"{key} {value:g}" for key, value in defaults.items()) or "-"
    published = re.search(r"Published\s+default: (.+?)\.\s", inspect.getdoc(loss), re.S)
    if published:
        settings += f" (published: {' '.join(published[1].split())})"
    statistics = ", ".join(f"`{need}`" for need in needs)
    return f"| `{name}` | {kind} | {'yes' if reference else 'no'} | {statistics} | {source} | {settings} |"


def table() -> str:
    order = re.findall(r"^def (\w+)\(", Path(losses.__file__).read_text(encoding="utf-8"), re.M)
    rows = [row(name, objective.LOSSES[name]) for name in order if name in objective.LOSSES]
    return "\n".join([HEADER, *rows, BY_SFT])


if __name__ == "__main__":
    print(table())
