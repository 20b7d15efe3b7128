"""Our losses against those of TRL, on the same log-probabilities.

    python bench/parity.py [--venv DIR] [--out FILE]

Installs TRL into an environment of its own (once), and there runs TRL's own `compute_loss` on trainers made
without `__init__`: a real config, a model that returns given token log-probabilities, reference sums as if
precomputed. The same fp64 tables of tokens go through losses.py. Compared are the loss of a batch and its
gradient with respect to every token's policy log-probability, chosen and rejected, over SEEDS x (our default
hyper-parameters, others). Prints a Markdown table and one JSON line; exits 1 where a difference, after the
stated change of parameters if there is one, is above TOLERANCE.
"""

import argparse
import collections
import inspect
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # not for a benchmark that imports `install`
    os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ("torch==2.13.0", "trl==1.16.0", "peft==0.21.2")
DISK_GB = 8  # what an installation may need
SEEDS = 6
TOKENS = 12  # of the longest answer
TOLERANCE = 1e-5


class Row(NamedTuple):
    loss: str  # ours
    trainer: str  # TRL's
    loss_type: str | list[str] | None
    names: dict[str, str]  # our hyper-parameter -> TRL's, where the value is the same
    others: dict[str, float]  # other values of ours than the defaults: the second setting
    definition: str = "equal"
    fixed: dict = {}  # hyper-parameters of TRL alone
    pairs: int = 8  # in a batch; 1 where TRL's loss of a batch is no mean over its pairs
    convert: Callable[[dict, int], dict] | None = None  # (ours, chosen tokens) -> more of TRL's
    ours: Callable[[dict, dict], Tensor] | None = None  # (statistics, ours) -> loss, if not the mean


def with_sft(stats: dict, options: dict) -> Tensor:
    out = losses.dpo(stats["policy_logps"], stats["ref_logps"]).losses
    return losses.with_sft(out, stats["policy_logps"], stats["lengths"], **options).mean()


def slic(stats: dict, options: dict) -> Tensor:
    return losses.slic(stats["policy_logps"], **options).losses.mean() / options["margin"]


def sft(stats: dict, options: dict) -> Tensor:
    return losses.sft(stats["chosen_tokens"]).losses.mean()


BETA = {"beta": "beta"}
SMOOTHED = BETA | {"epsilon": "label_smoothing"}
WEIGHTED = {"desirable_weight": "desirable_weight", "undesirable_weight": "undesirable_weight"}
ONE_PAIR = "; compared one pair at a time, as TRL's likelihood term averages over the tokens of the batch"
# fmt: off
ROWS = (
    Row("dpo", "DPOTrainer", "sigmoid", BETA, {"beta": 0.7}),
    Row("cdpo", "DPOTrainer", "aot", SMOOTHED, {"beta": 0.7, "epsilon": 0.3}, pairs=1,
        definition="TRL's sigmoid ignores label_smoothing; its aot, which sorts the batch, is cDPO on one "
        "pair: compared one pair at a time"),
    Row("robust_dpo", "DPOTrainer", "robust", SMOOTHED, {"beta": 0.7, "epsilon": 0.3}),
    Row("dpo_norm", "DPOTrainer", "sigmoid_norm", BETA, {"beta": 0.7}),
    Row("wpo", "DPOTrainer", "sigmoid", BETA, {"beta": 0.7}, fixed={"use_weighting": True},
        definition="use_weighting; TRL's weights also divide by sum_v pi(v)^2, which ours leaves out: "
        "given as 1"),
    Row("ipo", "DPOTrainer", "ipo", {"tau": "beta"}, {"tau": 0.7},
        definition="equal: both average over the length; tau is TRL's beta"),
    Row("hinge", "DPOTrainer", "hinge", BETA, {"beta": 0.7}),
    Row("exo", "DPOTrainer", "exo_pair", SMOOTHED, {"beta": 0.7, "epsilon": 0.2},
        definition="equal; TRL's log(epsilon) is fp32, and 0, its default, is an error"),
    Row("nca", "DPOTrainer", "nca_pair", BETA, {"beta": 0.7}),
    Row("bco_pair", "DPOTrainer", "bco_pair", BETA, {"beta": 0.7},
        definition="TRL has no delta: compared at delta = 0, ours of the first step"),
    Row("sppo_hard", "DPOTrainer", "sppo_hard", BETA, {"beta": 0.7}),
    Row("apo_zero", "DPOTrainer", "apo_zero", BETA, {"beta": 0.7}),
    Row("apo_down", "DPOTrainer", "apo_down", BETA, {"beta": 0.7}),
    Row("discopop", "DPOTrainer", "discopop", BETA | {"tau": "discopop_tau"}, {"beta": 0.7, "tau": 0.3}),
    Row("with_sft", "DPOTrainer", ["sigmoid", "sft"], {}, {"sft_weight": 0.5}, pairs=1, ours=with_sft,
        convert=lambda options, _: {"loss_weights": [1.0, options["sft_weight"]]},
        definition="dpo + sft_weight: loss_weights [1, sft_weight]" + ONE_PAIR),
    Row("sft", "DPOTrainer", "sft", {}, {}, ours=sft, definition="equal: both average over all tokens"),
    Row("slic", "CPOTrainer", "hinge", {}, {"margin": 2.0, "sft_weight": 0.5}, pairs=1, ours=slic,
        convert=lambda options, tokens: {
            "beta": 1 / options["margin"],
            "cpo_alpha": options["sft_weight"] * tokens / options["margin"],
        },
        definition="ours / margin at beta = 1 / margin, cpo_alpha = sft_weight length / margin: ours sums "
        "the log-likelihood of the chosen answer, TRL averages it (default beta 0.1, cpo_alpha 1)"
        + ONE_PAIR),
    Row("simpo", "CPOTrainer", "simpo", BETA | {"gamma": "simpo_gamma"}, {"beta": 0.7, "gamma": 0.2},
        fixed={"cpo_alpha": 0.0},
        definition="equal: gamma is absolute in both; at cpo_alpha = 0 (TRL's default 1 adds likelihood)"),
    Row("cpo", "CPOTrainer", "sigmoid", BETA | {"sft_weight": "cpo_alpha"},
        {"beta": 0.7, "sft_weight": 0.3}, pairs=1, definition="sft_weight is cpo_alpha" + ONE_PAIR),
    Row("orpo", "ORPOTrainer", None, BETA, {"beta": 0.7}, pairs=1,
        definition="TRL's likelihood term includes the prompt, here one token and so without a prediction"
        + ONE_PAIR + "; odds in fp32"),
    Row("bradley_terry", "RewardTrainer", None, {"center_weight": "center_rewards_coefficient"},
        {"center_weight": 0.1}, definition="equal, margins included; gradient of the scores"),
    Row("kto", "KTOTrainer", "kto", BETA | WEIGHTED,
        {"beta": 0.7, "desirable_weight": 1.3, "undesirable_weight": 0.6},
        definition="equal; TRL's reference point is of the micro-batch, here the whole step"),
    Row("kto_zero", "KTOTrainer", "apo_zero_unpaired", BETA | WEIGHTED,
        {"beta": 0.7, "desirable_weight": 1.3, "undesirable_weight": 0.6},
        definition="equal: TRL weighs its apo_zero_unpaired, which is KTO at z = 0"),
    Row("apo_zero_unpaired", "KTOTrainer", "apo_zero_unpaired", BETA, {"beta": 0.7},
        definition="equal at TRL's weights of 1; ours has none"),
    Row("grpo", "GRPOTrainer", "grpo", BETA | {"epsilon": "epsilon"}, {"beta": 0.2, "epsilon": 0.1},
        fixed={"use_bias_correction_kl": False},
        definition="old policy = reference; given our advantages (TRL's, with the unbiased std + 1e-4, are "
        "made in its generation) and at use_bias_correction_kl = False (TRL's default multiplies the KL term "
        "by rho); TRL's default loss_type is dapo, a mean over all tokens"),
)
# fmt: on
MISSING = {
    "odpo": "TRL's DPO knows no offset (its reward model does)",
    "tdpo1": "not in TRL",
    "tdpo2": "not in TRL",
    "ra_dpo1": "not in TRL",
    "ra_dpo2": "not in TRL",
    "kto_token_max": "not in TRL",
    "bco": "this release has no BCOTrainer any more, only bco_pair",
    "ppo": "this release has no PPOTrainer any more",
}


# ---- the inputs: tables of token log-probabilities (2, B, T), as lists, so that JSON carries them exactly


def sample(seed: int, pairs: int) -> dict[str, list]:
    """A batch with log-ratios of both signs, clipped and not, and a KL estimate of the sign of the seed."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = (2, pairs, TOKENS)
    inputs = {"lengths": torch.randint(2, TOKENS + 1, shape[:2], generator=generator)}
    for policy, ref in (("policy", "ref"), ("mismatched_policy", "mismatched_ref")):
        inputs[policy] = -normal(*shape).square() - 0.01
        shift = 0.3 * (-1) ** seed * (policy == "mismatched_policy")
        inputs[ref] = (inputs[policy] + 0.6 * normal(*shape) - shift).clamp(max=-0.01)
    inputs |= {"sequence_scores": 2 * normal(2, pairs), "margins": normal(pairs).abs()}
    inputs |= {"desirable": normal(2 * pairs) > 0, "scores": normal(2 * pairs)}
    return {name: value.tolist() for name, value in inputs.items()}


def tensors(inputs: dict[str, list]) -> tuple[dict[str, Tensor], Tensor]:
    """The same as tensors, and which places of a table are tokens."""
    values = {
        name: torch.tensor(value, dtype=torch.float64 if name not in ("lengths", "desirable") else None)
        for name, value in inputs.items()
    }
    return values, torch.arange(TOKENS) < values["lengths"][..., None]


# ---- our side


def our_loss(row: Row, inputs: dict[str, list], options: dict) -> tuple[Tensor, Tensor]:
    """Our loss and its gradient."""
    values, mask = tensors(inputs)
    leaf = values[leaf_of(row.trainer)].requires_grad_()
    sums = {name: (values[name] * mask).sum(-1) for name in values if values[name].dim() == 3}
    stats = {
        "policy_logps": sums["policy"],
        "ref_logps": sums["ref"],
        "delta": torch.zeros((), dtype=torch.float64),
        "chosen_tokens": values["policy"][0][mask[0]],
    }
    stats |= {name: values[name] for name in ("lengths", "margins", "sequence_scores", "desirable")}
    if row.trainer in ("KTOTrainer", "GRPOTrainer"):  # single responses
        stats |= {name: stats[name].flatten() for name in ("policy_logps", "ref_logps", "lengths")}
        responses = torch.arange(mask[..., 0].numel())
        stats |= {
            "kl_estimate": (sums["mismatched_policy"] - sums["mismatched_ref"]).mean(),
            "token_policy_logps": values["policy"][mask],
            "token_ref_logps": values["ref"][mask],
            "token_logratios": (values["policy"] - values["ref"])[mask],
            "response": responses.repeat_interleave(stats["lengths"]),
            "scores": values["scores"],
            "group": responses // 4,
        }
    if row.ours:
        loss = row.ours(stats, options)
    else:
        function = getattr(losses, row.loss)
        positional = [p.name for p in parameters(function) if p.kind is p.POSITIONAL_OR_KEYWORD]
        loss = function(*(stats[name] for name in positional), **options).losses.mean()
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def our_options(row: Row, others: dict) -> dict:
    keyword = [p for p in parameters(getattr(losses, row.loss)) if p.kind is p.KEYWORD_ONLY]
    return {p.name: others.get(p.name, p.default) for p in keyword}


def their_options(row: Row, inputs: dict[str, list], options: dict) -> dict:
    found = {theirs: options[ours] for ours, theirs in row.names.items()} | row.fixed
    if row.loss_type is not None:
        found["loss_type"] = row.loss_type if row.trainer != "DPOTrainer" else as_list(row.loss_type)
    return found | (row.convert(options, inputs["lengths"][0][0]) if row.convert else {})


def advantages(scores: list[float], std_floor: float) -> list[float]:
    groups = torch.tensor(scores, dtype=torch.float64).view(-1, 4)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, correction=0, keepdim=True) + std_floor)).flatten().tolist()


def parameters(function) -> list[inspect.Parameter]:  # noqa: ANN001
    return list(inspect.signature(function).parameters.values())


def leaf_of(trainer: str) -> str:
    return "sequence_scores" if trainer == "RewardTrainer" else "policy"


def as_list(value: str | list[str]) -> list[str]:
    return value if isinstance(value, list) else [value]


# ---- TRL's side, in its own environment


def child(jobs: Path, results: Path) -> None:
    """Run TRL's loss code on every job."""
    import accelerate
    import transformers
    import trl
    import trl.experimental.cpo
    import trl.experimental.orpo

    found = []
    with tempfile.TemporaryDirectory() as folder:
        for job in json.loads(jobs.read_text()):
            name = job["trainer"]
            home = {"CPOTrainer": trl.experimental.cpo, "ORPOTrainer": trl.experimental.orpo}.get(name, trl)
            config_class = getattr(home, name.replace("Trainer", "Config"))
            common = {"output_dir": folder, "bf16": False, "use_cpu": True, "report_to": "none"}
            defaults = vars(config_class(**common))
            config = config_class(**common, **job["options"])
            accelerator = accelerate.Accelerator(cpu=True)  # a config resets the state of those before it
            trainer = bare(getattr(home, name), config, accelerator)
            values, mask = tensors(job["inputs"])
            leaf = values[leaf_of(name)].requires_grad_()
            inputs = batch(name, values, mask)
            loss = trainer.compute_loss(fake_model(values, mask, name), inputs)
            (gradient,) = torch.autograd.grad(loss, leaf)
            found.append(
                {
                    "loss": loss.item(),
                    "gradient": gradient.tolist(),
                    "defaults": {key: defaults[key] for key in job["options"]},
                }
            )
    versions = {module.__name__: module.__version__ for module in (trl, torch, transformers)}
    results.write_text(json.dumps({"versions": versions, "found": found}))


def bare(trainer_class, config, accelerator):  # noqa: ANN001, ANN201
    """A trainer with the attributes that its loss reads, most of them named as in the config."""
    trainer = object.__new__(trainer_class)
    trainer.__dict__.update(vars(config))
    trainer.__dict__.update(
        args=config,
        accelerator=accelerator,
        model=types.SimpleNamespace(training=True),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        is_encoder_decoder=False,
        pad_token_id=0,
        padding_value=0,
        current_gradient_accumulation_steps=1,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _stored_metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        _peft_has_been_casted_to_bf16=False,
        _entropy_bonus_enabled=False,
    )
    if isinstance(getattr(config, "loss_type", None), list):
        trainer.loss_types = config.loss_type
        trainer.loss_weights = config.loss_weights or [1.0] * len(config.loss_type)
    trainer.calculate_KL = getattr(config, "loss_type", None) == "kto"
    trainer.epsilon_low = trainer.epsilon_high = getattr(config, "epsilon", None)
    return trainer


def batch(trainer: str, values: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    """What TRL's collator would make: a prompt of one token, 0, and answers of the token 1."""
    tokens = mask.flatten(0, 1)  # (2B, T)
    first = torch.zeros_like(tokens[:, :1])
    completion = torch.cat([first, tokens], 1).long()  # (2B, T + 1) the ids and the mask
    attention = torch.cat([~first, tokens], 1).long()
    ref = (values["ref"] * mask).sum(-1)  # (2, B)
    if trainer in ("CPOTrainer", "ORPOTrainer"):
        columns = {"input_ids": completion, "attention_mask": attention}
        columns["labels"] = completion.masked_fill(completion == 0, -100)
        return {
            f"{side}_{key}": value.chunk(2)[i]
            for i, side in enumerate(("chosen", "rejected"))
            for key, value in columns.items()
        }
    if trainer == "GRPOTrainer":
        ref_tokens = (values["ref"] * mask).flatten(0, 1)
        return {
            "prompt_ids": completion[:, :1],
            "prompt_mask": attention[:, :1],
            "completion_ids": completion[:, 1:],
            "completion_mask": tokens.long(),
            "advantages": values["advantages"],
            "old_per_token_logps": ref_tokens,
            "ref_per_token_logps": ref_tokens,
        }
    inputs = {"input_ids": completion, "attention_mask": attention}
    if trainer == "RewardTrainer":
        return inputs | {"margin": values["margins"]}
    inputs["completion_mask"] = completion
    if trainer == "DPOTrainer":
        return inputs | {"ref_chosen_logps": ref[0], "ref_rejected_logps": ref[1]}
    return inputs | {
        "label": values["desirable"],
        "ref_logps": ref.flatten(),
        "KL_input_ids": torch.ones_like(completion),  # a prompt of 1: see fake_model
        "KL_attention_mask": attention,
        "KL_completion_mask": completion,
        "ref_KL_logps": (values["mismatched_ref"] * mask).sum(-1).flatten(),
    }


def fake_model(values: dict[str, Tensor], mask: Tensor, trainer: str) -> Callable:
    """A model with these token log-probabilities; those of the mismatched answers where the prompt is 1."""
    nothing = torch.zeros_like(mask.flatten(0, 1), dtype=torch.float64)

    def model(input_ids: Tensor, **_) -> types.SimpleNamespace:  # noqa: ANN003
        table = values["mismatched_policy" if input_ids[0, 0] == 1 else "policy"]
        logps = torch.where(mask, table, -1.0).flatten(0, 1)  # (2B, T)
        if trainer == "RewardTrainer":
            logits = values["sequence_scores"].reshape(-1, 1)
        else:  # a vocabulary of two, normalised: the log-probability of the token 1 is the wanted one
            logits = torch.stack([(-logps.expm1()).log(), logps], -1)
            logits = torch.cat([logits, torch.zeros_like(logits[:, :1])], 1)  # (2B, T + 1, 2)
        return types.SimpleNamespace(
            log_probs=logps * mask.flatten(0, 1),
            logits=logits,
            entropy=nothing,
            mean_logits=nothing,
            log_sum_sq_probs=nothing,
            is_top1=nothing.bool(),
        )

    return model


# ---- both


def install(venv: Path) -> Path:
    """The interpreter of an environment with REQUIREMENTS, made if it is not there."""
    python, stamp = venv / "bin" / "python", venv / "installed.txt"
    if python.exists() and stamp.exists() and stamp.read_text().split() == list(REQUIREMENTS):
        return python
    free = shutil.disk_usage(venv.resolve().parent).free / 1e9
    if not python.exists() and free < DISK_GB:
        sys.exit(f"error: parity.py: {DISK_GB} GB are needed for {venv}, {free:.1f} are free")
    print(f"installing {' '.join(REQUIREMENTS)} into {venv}", file=sys.stderr)
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *REQUIREMENTS], check=True)
    stamp.write_text("\n".join(REQUIREMENTS) + "\n")
    return python


def run_trl(python: Path, jobs: list[dict]) -> dict:
    environment = os.environ | {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "jobs.json"), Path(folder, "results.json")
        asked.write_text(json.dumps(jobs))
        command = [str(python), str(Path(__file__).resolve()), "--child", str(asked), str(answered)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(done.stderr)
        return json.loads(answered.read_text())


def default_differences(row: Row, defaults: dict) -> str:
    ours = our_options(row, {})
    differ = [
        f"{name} {ours[name]:g}, TRL {defaults[theirs] if defaults[theirs] is not None else 'none'}"
        for name, theirs in row.names.items()
        if ours[name] != defaults[theirs] and (ours[name] or defaults[theirs])
    ]
    return "; default " + "; ".join(differ) if differ else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-trl", help="the environment of TRL")
    parser.add_argument("--out", type=Path, default=None, help="also write the output here")
    args = parser.parse_args()

    python = install(args.venv)
    jobs, ours = [], []
    for number, row in enumerate(ROWS):
        for others in ({}, row.others) if row.others else ({},):
            options = our_options(row, others)
            for seed in range(SEEDS):
                inputs = sample(seed, row.pairs)
                ours.append((number, *our_loss(row, inputs, options)))
                if row.loss == "grpo":
                    inputs["advantages"] = advantages(inputs["scores"], options["std_floor"])
                jobs.append(
                    {"trainer": row.trainer, "options": their_options(row, inputs, options), "inputs": inputs}
                )
    trl = run_trl(python, jobs)

    differences = [[] for _ in ROWS]
    defaults = [{} for _ in ROWS]
    for (number, loss, gradient), theirs in zip(ours, trl["found"], strict=True):
        defaults[number] = theirs["defaults"]
        apart = (gradient - torch.tensor(theirs["gradient"], dtype=torch.float64)).abs().max().item()
        differences[number].append([abs(loss.item() - theirs["loss"]), apart])
    worst = [torch.tensor(found, dtype=torch.float64).amax(0).tolist() for found in differences]  # nan stays
    lines = [
        "| loss | TRL | largest difference of the loss | of the gradient | definition |",
        "|---|---|---|---|---|",
    ]
    for row, (loss, gradient), default in zip(ROWS, worst, defaults, strict=True):
        name = f"{row.trainer} {' + '.join(as_list(row.loss_type or ''))}".strip()
        words = row.definition + default_differences(row, default)
        lines.append(f"| {row.loss} | {name} | {loss:.1e} | {gradient:.1e} | {words} |")
    public = [
        name
        for name, function in vars(losses).items()
        if inspect.isfunction(function) and inspect.signature(function).return_annotation is losses.Loss
    ]
    missing = {
        name: MISSING.get(name, "no comparison written")
        for name in public
        if name[0] != "_" and name not in [row.loss for row in ROWS]
    }
    lines += ["", "Not compared: " + "; ".join(f"{name}, {why}" for name, why in missing.items()) + "."]
    versions = trl["versions"]
    lines += [
        "",
        f"trl {versions['trl']}, transformers {versions['transformers']}, torch {versions['torch']} (TRL) "
        f"and {torch.__version__} (ours), {len(jobs)} batches, fp64, {platform.machine()}, one thread.",
    ]
    text = "\n".join(lines)
    print(text)
    rows = {row.loss: dict(zip(("loss", "gradient"), found)) for row, found in zip(ROWS, worst)}
    print(json.dumps({"versions": versions, "tolerance": TOLERANCE, "rows": rows}))
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    wrong = [row.loss for row, found in zip(ROWS, worst) if not all(x <= TOLERANCE for x in found)]
    if wrong:
        sys.exit(f"error: parity.py: more than {TOLERANCE:g} apart: {', '.join(wrong)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.path.insert(0, str(ROOT))
        import losses

        main()
