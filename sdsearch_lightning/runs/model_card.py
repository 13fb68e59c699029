"""The model card of an exported model: what it is, what it was trained with and on, how it scored, how it is loaded.

Everything in it comes from the run's files. Invariant: what was not measured is not in the card, and no path of this
machine is: an absolute one is cut to its last part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from sdsearch_lightning.files import write_text
from sdsearch_lightning.policy.lora_folder import CONFIG as ADAPTER_CONFIG
from sdsearch_lightning.report.evaluation import Evaluation, to_markdown
from sdsearch_lightning.report.metrics import read_metrics
from sdsearch_lightning.report.summary import Summary, build_summary, installed_versions
from sdsearch_lightning.runs.eval_results import eval_results
from sdsearch_lightning.runs.folder import RunFolder
from sdsearch_lightning.trust.secrets import without_secrets

CARD, SETTINGS = "README.md", "sdsearch_config.yaml"
PAPER = "https://arxiv.org/abs/2605.18299"
UNSHARED = ("config", "ckpt_path", "weights_only")
"""Keys of a configuration that say nothing about the model."""
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_LOCAL = re.compile(r"[./~]|runs/|.*\.(jsonl|gz|parquet)$")


@dataclass(frozen=True)
class Training:
    """What a card tells of a run."""

    config: Mapping[str, Any]
    """Its config.yaml."""
    step: int
    """The rollout batches (or batches of demonstrations) that the weights have seen."""
    summary: Summary | None = None
    """None where the run is not finished."""
    evaluations: Sequence[Evaluation] = ()
    """Those of these weights."""

    @property
    def is_cold_start(self) -> bool:
        """Whether it learned demonstrations."""
        return "rollout" not in self.config

    def get(self, key: str) -> Any:
        """The value of a dotted key; None where there is none."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value


def write_model(run: RunFolder, save: Callable[[Path], None], step: int, facts: dict[str, Any]) -> None:
    """Write the model folder of a run that has come to its end, with its card.

    Args:
        run: summary.json need not be there yet.
        save: writes the weights into a folder.
        step: the run's last.
        facts: for the summary, see `build_summary`.
    """
    metrics = read_metrics(run.path) if run.metrics.is_file() else {}
    config = yaml.safe_load(run.config.read_text(encoding="utf-8")) if run.config.is_file() else {}

    def write(folder: Path) -> None:
        save(folder)
        write_card(folder, Training(config, step, build_summary(metrics, {"steps": step, **facts})))

    run.replace_model(write)


def write_card(folder: Path, training: Training) -> None:
    """Write README.md and sdsearch_config.yaml into the folder of a model or of an adapter."""
    from huggingface_hub import ModelCardData

    training = replace(training, config=without_secrets(training.config))
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    base = _base_model(training.get("model.model_name_or_path"))
    tests = [evaluation for evaluation in training.evaluations if evaluation["command"] == "test"]
    data = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=base,
        base_model_relation=None if base is None else "adapter" if is_adapter else "finetune",
        datasets=_hub_data_sets(training) or None,
        model_name=str(training.get("run.name") or folder.name) if tests else None,
        eval_results=[result for found in tests for result in eval_results(found)] or None,
        tags=["sd-search", "search", "sdsearch-lightning", "sft" if training.is_cold_start else "grpo"],
    )
    found = [to_markdown(evaluation, level="##").rstrip() for evaluation in training.evaluations]
    sections = [_opening(training, is_adapter), _settings(training), _scores(training), *found]
    sections.append(_use(training, is_adapter))
    body = "\n\n".join([*filter(None, sections), _versions(training)])
    write_text(folder / CARD, f"---\n{data.to_yaml()}\n---\n\n{body}\n")
    shared = {key: value for key, value in training.config.items() if key not in UNSHARED}
    write_text(folder / SETTINGS, yaml.safe_dump(without_machine_paths(shared), sort_keys=False, allow_unicode=True))


def without_machine_paths(value: Any) -> Any:
    """A configuration as it was written, but for absolute paths: of them the last part stays."""
    if isinstance(value, Mapping):
        return {without_machine_paths(key): without_machine_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_machine_paths(item) for item in value]
    if isinstance(value, str) and re.match(r"(/|~[\w-]*/)[^\s/]", value) and "\n" not in value:
        return Path(value).name
    return value


def _hub_name(name: Any) -> str | None:
    """`name` where it is one of the hub, not a path."""
    is_one = isinstance(name, str) and _HUB_NAME.fullmatch(name) and not _LOCAL.match(name) and not Path(name).exists()
    return name if is_one else None


def _base_model(name: Any) -> str | None:
    """The hub name behind a model: its own, or what the card in its folder says."""
    from huggingface_hub import ModelCard

    card = Path(str(name)).expanduser() / CARD
    if not card.is_file():
        return _hub_name(name)
    told = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    return _hub_name(getattr(told, "base_model", None))


def _sources(training: Training) -> list[str]:
    """Entries of the options that name training data."""
    key = "demonstration_files" if training.is_cold_start else "train_files"
    files = training.get(f"data.init_args.{key}") or []
    return [files] if isinstance(files, str) else [str(entry) for entry in files]


def _hub_data_sets(training: Training) -> list[str]:
    """Hub data sets among them; a bare word is a benchmark, which comes from `data.hub`."""
    hub = training.get("data.init_args.hub")
    names = [_hub_name(entry if "/" in entry else hub) for entry in _sources(training) if _hub_name(entry)]
    return list(dict.fromkeys(name for name in names if name))


def _opening(training: Training, is_adapter: bool) -> str:
    what = "LoRA adapter of a language model" if is_adapter else "language model"
    how = "learned to search from written demonstrations (the cold start of SD-Search)"
    if not training.is_cold_start:
        method = "GRPO with hindsight self-distillation" if training.get("jsd.weight") else "GRPO"
        how = f"was trained with {method} to search while it reasons ([SD-Search]({PAPER}))"
    merged = "" if is_adapter or not training.get("model.lora") else " The LoRA adapter it learned is merged."
    name = training.get("run.name") or "SD-Search model"
    return f"# {name}\n\nA {what} that {how}, by sdsearch-lightning.{merged}"


def _settings(training: Training) -> str:
    """The main settings; all of them are in sdsearch_config.yaml."""
    data = str(training.get("data.class_path") or "").rpartition(".")[2]
    sources = ", ".join(str(without_machine_paths(entry)) for entry in _sources(training))
    lora, several = training.get("model.lora"), training.get("model.optimizers") or [{}]
    optimizer = training.get("model.optimizer") or several[0].get("optimizer")
    scratch = training.get("model.scratch.model_type")
    model = without_machine_paths(training.get("model.model_name_or_path")) or f"{scratch}, random weights"
    rows = {
        "initial model": model,
        "training data": f"{data}: {sources}" if sources else data,
        "steps": training.step,
        "questions per step and process": training.get("data.init_args.batch_size"),
        "protocol": _named(training.get("model.protocol")),
        "optimizer": _named(optimizer),
        "weights": training.get("model.dtype"),
        "LoRA": f"r {lora['r']}, lora_alpha {lora['lora_alpha']}, {lora['target_modules']}" if lora else None,
        "seed": training.get("seed_everything"),
    }
    if not training.is_cold_start:
        rows |= {
            "retriever": _named(training.get("data.init_args.retriever")),
            "rollouts per question": training.get("rollout.group_size"),
            "searches per rollout, at most": training.get("rollout.max_searches"),
            "reward": _named(training.get("rollout.reward")),
            "JSD weight": _after_warmup(training),
            "KL coefficient": training.get("model.kl_coef"),
            "updates per step": training.get("model.num_updates"),
        }
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value not in (None, "")]
    return "\n".join(
        ["## Training", "", "| setting | value |", "|---|---|", *lines, "", f"All settings: `{SETTINGS}`."]
    )


def _named(value: Any) -> str | None:
    """A class by its own name, with its learning rate where it has one."""
    if not isinstance(value, Mapping):
        return None if value is None else str(value)
    name = str(value.get("class_path", "")).rpartition(".")[2]
    rate = (value.get("init_args") or {}).get("lr")
    return name if rate is None else f"{name}, learning rate {rate:g}"


def _after_warmup(training: Training) -> str | None:
    weight, warmup = training.get("jsd.weight"), training.get("jsd.warmup_steps")
    return None if weight is None else f"{weight:g}, after {warmup} steps" if weight and warmup else f"{weight:g}"


def _scores(training: Training) -> str | None:
    summary = training.summary
    if summary is None or (summary.get("exact_match") or {}).get("after") is None:
        return None
    last = summary.get("steps") or (summary.get("sd") or {}).get("steps")
    if last != training.step:
        return f"## Scores\n\nNone: the run was evaluated after step {last}, these weights are of step {training.step}."
    decoding = summary.get("decoding") or {}
    most = f", at most {decoding['max_searches']} searches" if decoding.get("max_searches") is not None else ""
    rows = [
        f"| {name} | {_number(summary[key]['before'])} | {_number(summary[key]['after'])} |"
        for key, name in (
            ("exact_match", "exact match"),
            ("f1", "F1"),
            ("searches_per_question", "searches per question"),
        )
    ]
    return "\n".join(
        [
            "## Scores",
            "",
            f"On {summary['questions']} held-out questions, {'greedy' if decoding.get('greedy') else 'sampled'} "
            f"decoding{most}, seed {summary['seed']}; before is the initial model.",
            "",
            "| | before | after |",
            "|---|---|---|",
            *rows,
        ]
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _use(training: Training, is_adapter: bool) -> str:
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    load = 'model = AutoModelForCausalLM.from_pretrained("PATH_OR_NAME")'
    if is_adapter:
        imports = "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer"
        load = 'model = AutoPeftModelForCausalLM.from_pretrained("PATH_OR_NAME")  # with the base that it names'
    lines = [
        "## Use",
        "",
        "```python",
        imports,
        "",
        load,
        'tokenizer = AutoTokenizer.from_pretrained("PATH_OR_NAME")',
        "```",
        "",
        "It was trained on one prompt and one set of tags, and with a retriever that answers its searches. "
        "sdsearch-lightning brings all three:",
        "",
        "```bash",
        _command(training, is_adapter),
        "```",
    ]
    return "\n".join(lines)


def _command(training: Training, is_adapter: bool) -> str:
    if training.is_cold_start:
        return "sdsearch fit --config YOURS.yaml --model.model_name_or_path PATH_OR_NAME  # goes on with SD-Search"
    if is_adapter:
        return f"sdsearch predict --config {SETTINGS} --model.lora.adapter PATH_OF_THIS_FOLDER"
    no_lora = " --model.lora null" if training.get("model.lora") else ""
    no_scratch = " --model.scratch null" if training.get("model.scratch") else ""
    return f"sdsearch predict --config {SETTINGS} --model.model_name_or_path PATH_OR_NAME{no_lora}{no_scratch}"


def _versions(training: Training) -> str:
    found = (training.summary or {}).get("versions") or installed_versions()
    return "## Versions\n\n" + ", ".join(f"{name} {version}" for name, version in found.items())
