"""What transformers reads of a model, checked: a directory or a hub name in, a whole model or tokenizer out,
or one line that says what is wrong with it.

    check              what a directory's small files and headers say, before anything is loaded
    settings           its configuration
    size               of what it describes, against its weights
    skeleton           that, without weights
    without_memory     a model that is made within has no weights, but its buffers
    from_pretrained    a language model with every weight of it
    load_plain         the same to generate with, an adapter merged into its base
    load_tokenizer     the tokenizer

No code of a model is run and nobody is asked whether it may be, unless --trust-remote-code says so; no
directory is looked for on a hub, and no kernel fetched that a config.json names. Left out: pickle weights.
"""

import contextlib
import copy
import math
import os
from pathlib import Path
from typing import Any, Iterator

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.initialization import guard_torch_init_functions
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import get_checkpoint_shard_files

import files

transformers_logging.disable_progress_bar()
MAX_LAYERS = 10_000  # of a configuration without weights
SMALL = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
PROCESSOR = ("preprocessor_config.json", "processor_config.json")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@contextlib.contextmanager
def one_line(path: str) -> Iterator[None]:
    """Whatever goes wrong within, a dozen unrelated types for a directory that is not a model, is a
    ValueError of one line; transformers itself says nothing."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)  # its report of missing weights is ours
    try:
        yield
    except MemoryError:
        raise ValueError(f"{path}: does not fit into memory") from None
    except BaseException as error:
        # a panic of the tokenizers library is no Exception, and has said more on stderr than a line
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "trust_remote_code" in str(error):
            what = "needs code of its own (inspect it, then pass --trust-remote-code true)"
        elif what.startswith("Unrecognized configuration class"):
            kind = what.split("'")[1].split(".")[-1] if "'" in what else "its configuration"
            what = f"{kind} has no causal language model in transformers (save its text part as one)"
        where = "" if what.startswith((f"{path}: ", f"{path}/")) else f"{path}: "  # ours say it already
        raise ValueError(f"{where}{what[:500]}") from error
    finally:
        transformers_logging.set_verbosity(before)


def options(path: str, trust_remote_code: bool = False) -> dict[str, bool]:
    """What transformers is told beside a path: a directory, or what looks like one, is never looked for on a
    hub. Raises ValueError if there is no such directory."""
    folder = Path(path)
    if not folder.exists():
        if files.looks_local(path):
            raise ValueError(f"{path}: no such model directory")
        return {"trust_remote_code": trust_remote_code}
    if not folder.is_dir():
        raise ValueError(f"{path}: not a model directory but a file")
    return {"trust_remote_code": trust_remote_code, "local_files_only": True}


def check(path: str, weights: str = "pretrained") -> tuple[int, int]:
    """(tensors, numbers in them) of a model directory, by its small files and the headers of its weights
    alone; (0, 0) of a hub name or of "random" weights. Raises ValueError for JSON that is none, weights that
    are cut, elsewhere or pickles, or an adapter without its model."""
    options(path)
    folder = Path(path)
    if not folder.exists():
        return 0, 0
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise ValueError(f"{path}: an adapter without its model (merge it into the model first)")
    for name in SMALL:
        if name == "config.json" or os.path.lexists(folder / name):
            files.read_json(folder / name)
    if weights == "random":
        return 0, 0
    shapes = [shape for name in _weights(folder) for shape in _header(folder / name)]
    return len(shapes), sum(map(math.prod, shapes))


def _weights(folder: Path) -> list[str]:
    """The files of a directory's weights, none of them outside."""
    if (folder / "model.safetensors").exists():
        return ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        found = [path.name for pattern in PICKLES for path in sorted(folder.glob(pattern))]
        said = f"only {found[0]}, a pickle, which may run code; save it as safetensors first" if found else ""
        raise ValueError(f"{folder}: no model.safetensors" + f" ({said})" * bool(said))
    named = files.read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(n, str) for n in named.values()):
        raise ValueError(f"{index}: no weight_map of names of files")
    found = sorted(set(named.values()))
    for name in found:
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: names {name[:80]!r} (safetensors beside it only)")
        if not (folder / name).exists():
            raise ValueError(f"{folder}: {name} is missing")
    return found


def weight_files(path: str) -> list[Path]:
    """The files of a model's weights, of a hub name those of its snapshot, which is fetched if need be; none
    where there are no safetensors."""
    folder = Path(path)
    if not folder.exists():
        either = {"_raise_exceptions_for_missing_entries": False}
        found = cached_file(path, "model.safetensors", **either)
        if found is None:
            found = cached_file(path, "model.safetensors.index.json", **either)
            if found is None:
                return []
            get_checkpoint_shard_files(path, found)
        folder = Path(found).parent
    return [folder / name for name in _weights(folder)]


def processor(config: Any) -> list[Path]:
    """The files that say how images become a composite model's input, of the model that a configuration was
    read of; those that are not there, or a hub does not give, are left out."""
    path, found = config.name_or_path, []
    for name in PROCESSOR if config.get_text_config() is not config else ():
        with contextlib.suppress(Exception):  # a dozen types, and none of them is worth a trained model
            local = "local_files_only" in options(path)
            found.append(Path(cached_file(path, name, local_files_only=local)))
    return found


def _header(path: Path) -> list[list[int]]:
    """The shapes of a file's tensors; their bytes are there, none more and none less."""
    try:
        with safe_open(path, "pt") as file:
            return [file.get_slice(name).get_shape() for name in file.keys()]
    except Exception as error:  # the library has types of its own
        raise ValueError(f"{path}: {str(error).splitlines()[0][:200]}") from None


def settings(path: str, trust_remote_code: bool = False) -> Any:
    """The configuration of a model, without the attention that it asks for: some names are fetched from a
    hub. Raises ValueError."""
    told = options(path, trust_remote_code)
    with one_line(path):
        found = AutoConfig.from_pretrained(path, **told)
        for config in (found, found.get_text_config()):
            config._attn_implementation = None
    return found


def size(
    path: str,
    config: Any,
    tensors: int,
    numbers: int,
    trust_remote_code: bool = False,
    weights: str = "pretrained",
) -> int:
    """The number of a configuration's parameters. Raises ValueError for a larger model than there are weights
    for, as `check` counts them, or, of "random" ones, than fits into this machine's memory."""
    if quantised(config):  # packed: they are fewer than the parameters
        tensors = numbers = 0
    refuse_deeper(path, config, tensors or MAX_LAYERS)
    with one_line(path):
        lm = skeleton(config, trust_remote_code)
    if empty := [name for name, parameter in lm.named_parameters() if not parameter.numel()]:
        raise ValueError(f"{path}: its configuration has parameters without numbers (first: {empty[0]})")
    wanted = sum(parameter.numel() for parameter in lm.parameters())
    if tensors and wanted > 2 * numbers:
        raise ValueError(f"{path}: its configuration has {wanted} parameters, its weights {numbers}")
    if weights == "random":
        refuse_larger(path, wanted)
    return wanted


def refuse_deeper(path: str, config: Any, most: int = MAX_LAYERS) -> None:
    """Raises ValueError for a configuration of more layers than so many tensors fill."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > most:
        raise ValueError(f"{path}: its configuration has {layers} layers, more than {most} tensors fill")


def refuse_larger(path: str, numbers: int) -> None:
    """Raises ValueError for more fp32 numbers in one process than this machine's memory holds."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * numbers > memory:
        need = f"{4 * numbers / 1e9:.2g} GB in fp32, this machine has {memory / 1e9:.2g}"
        raise ValueError(f"{path}: its {numbers} parameters take {need}")


def skeleton(config: Any, trust_remote_code: bool = False) -> nn.Module:
    """A language model of a configuration, without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """A parameter made within is moved to the meta device as soon as it has a name, before anything is
    written into it, and is not initialised, which takes 2 ms each there; a buffer is computed as ever, for no
    file holds the frequencies of a rotary embedding."""
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)
        if parameter is not None:
            parameter._is_hf_initialized = True

    nn.Module.register_parameter = register_empty
    try:
        with guard_torch_init_functions():  # constructors' own too
            yield
    finally:
        nn.Module.register_parameter = register


def from_pretrained(
    path: str, config: Any, dtype: torch.dtype, trust_remote_code: bool, reward_model: bool = False
) -> nn.Module:
    """A language model with every weight of it. Raises ValueError."""
    lm, report = AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **options(path, trust_remote_code),
    )
    refuse_classifier(config, reward_model)
    untie(lm)
    head = {f"lm_head.{kind}" for kind in ("weight", "bias")} if is_classifier(config) else set()
    _refuse_missing(path, {**report, "missing_keys": set(report["missing_keys"]) - head}, lm)
    return lm


def is_classifier(config: Any) -> bool:
    """Is this the configuration of a sequence classifier?"""
    return any("ForSequenceClassification" in name for name in config.architectures or ())


def refuse_classifier(config: Any, reward_model: bool) -> None:
    """Raises ValueError for a classifier where no reward model is wanted."""
    if is_classifier(config) and not reward_model:
        raise ValueError("a classifier, not a language model")


def _refuse_missing(path: str, report: dict[str, Any], lm: nn.Module) -> None:
    tied = set(getattr(lm, "all_tied_weights_keys", None) or {})
    missing = sorted(set(report["missing_keys"]) - tied)
    wrong = sorted(name for name, *_ in report.get("mismatched_keys") or [])
    if missing or wrong:
        raise ValueError(
            f"{path}: {len(missing + wrong)} weights missing or misshapen (first: {(missing + wrong)[0]})"
        )


def quantised(config: Any) -> str:
    """By what method the weights of a model are quantised; empty if they are not."""
    told = getattr(config, "quantization_config", None)
    told = told or getattr(config.get_text_config(), "quantization_config", None) or {}
    if not isinstance(told, dict):
        return str(getattr(told, "quant_method", told))
    return str(told.get("quant_method") or next(iter(told), ""))


def refuse_quantised(path: str, config: Any) -> None:
    """Raises ValueError for quantised weights: transformers makes others of them, without a word, and an
    export would still be called quantised."""
    if method := quantised(config):
        raise ValueError(f"{path}: its weights are quantised ({method[:40]}): dequantise it first")


def untie(lm: nn.Module) -> None:
    """A file may hold a head of its own where the configuration says tied: then it is trained apart, and the
    export must say so."""
    head, embedding = lm.get_output_embeddings(), lm.get_input_embeddings()
    for config in (lm.config, lm.config.get_text_config()):
        if head is not None and getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = head.weight is embedding.weight


def load_plain(path: str, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """transformers' own model, to generate with: in evaluation mode, on its own attention. A directory with
    an adapter is its base model with the adapter merged. Raises ValueError as `load` does."""
    if (Path(path) / "adapter_config.json").exists():
        return _merged(path, dtype, trust_remote_code)
    found = check(path)
    config = settings(path, trust_remote_code)
    size(path, config, *found, trust_remote_code)
    with one_line(path):
        lm = from_pretrained(path, config, dtype, trust_remote_code)
        refuse_odd_stops(path, lm)
        return lm.eval()


def _merged(path: str, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The base model of peft's adapter directory, the adapter merged into it in fp32."""
    try:
        import peft
    except ImportError:
        raise ValueError(f"{path} holds an adapter, which takes peft (pip install peft)") from None
    with one_line(path):
        if not (Path(path) / "adapter_model.safetensors").exists():
            raise ValueError("no adapter_model.safetensors (pickle .bin files are not loaded)")
        told = files.read_json(Path(path) / "adapter_config.json")
        base = told.get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise ValueError('adapter_config.json has no "base_model_name_or_path"')
        if (Path(base) / "adapter_config.json").exists():
            raise ValueError(f"its base model {base} is an adapter too")
    lm = load_plain(base, torch.float32, trust_remote_code)
    with one_line(path):
        if (end := end_of_rows(told.get("trainable_token_indices"))) > len(lm.get_input_embeddings().weight):
            lm.resize_token_embeddings(end, mean_resizing=False)  # the new rows are the adapter's
        merged = peft.PeftModel.from_pretrained(lm, path, local_files_only=True).merge_and_unload()
    return merged.to(dtype).eval()


def stored(model: nn.Module) -> dict[str, Tensor]:
    """What a model is saved with, a tied weight once."""
    own = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    return {name: value for name, value in model.state_dict().items() if name in own}


def end_of_rows(indices: Any) -> int:
    """How many rows an embedding must have for peft's `trainable_token_indices`, ids or ids by module."""
    found = indices.values() if isinstance(indices, dict) else [indices or []]
    return max((id + 1 for ids in found for id in ids), default=0)


def load_tokenizer(path: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model directory or hub name. Raises ValueError where there is none."""
    told = options(path, trust_remote_code)
    for name in SMALL:
        if os.path.lexists(Path(path) / name):
            files.read_json(Path(path) / name)
    try:
        with one_line(path):
            return AutoTokenizer.from_pretrained(path, **told)
    except ValueError as error:
        raise ValueError(f"{path}: no tokenizer ({str(error).removeprefix(f'{path}: ')})") from error


def refuse_odd_stops(path: str, lm: nn.Module) -> None:
    """Raises ValueError unless the ids at which generation stops are ids."""
    stops = getattr(lm.generation_config, "eos_token_id", None)
    if not all(type(id) is int and id >= 0 for id in (stops if isinstance(stops, list) else [stops or 0])):
        raise ValueError(f"{path}: its eos_token_id is {str(stops)[:40]!r} (an id, or a list of them)")
