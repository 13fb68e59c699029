"""What answers a question: whose weights, with which protocol and retriever; found out from files, without torch.

    run     its config.yaml, and model/ where it is finished, else its last checkpoint
    model   a Hugging Face folder or hub name, or the folder of an adapter; the rest comes from configuration files

Invariant: a configuration that lies in a model folder is somebody else's. Of it are taken texts of the protocol, limits
of rollouts and the embedded world; a class to import, a path or an address is taken from files that the user names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from sdsearch_lightning.errors import ConfigError, reading_foreign
from sdsearch_lightning.runs.names import CONFIG

SETTINGS, ADAPTER = "sdsearch_config.yaml", "adapter_config.json"
POLICY = ("model_name_or_path", "scratch", "protocol", "compute", "dtype", "lora", "eos_tokens")
"""Keys of `model:` that decide what a policy writes; all others are about learning."""
LIMITS = ("top_k", "max_searches", "max_invalid_actions", "max_turn_tokens", "max_observation_tokens", "max_tokens")
"""Keys of `rollout:` that bound an answer."""
TRAINING = (*LIMITS, "group_size", "temperature", "top_p", "reward", "label", "advantage_scale", "max_error_fraction")
"""Those that decide, beside it, what training samples of a question and what that is worth."""
_DATA = "sdsearch_lightning.datamodules.SearchDataModule"
_WORLD = "SyntheticWorldDataModule"
_PROTOCOLS = "sdsearch_lightning.protocol."


@dataclass(frozen=True)
class Origin:
    """Where answers come from, before anything is loaded."""

    config: dict[str, Any]
    """`seed_everything`, `model`, `data` and `rollout`, with the keys that answering needs."""
    checkpoint: Path | None = None
    """Its weights take the place of the model's own; None: they stay."""
    precision: str | None = None
    """`trainer.precision` of the run."""
    num_threads: int | Literal["auto"] | None = None
    """`run.num_threads` of the run."""

    @property
    def weights(self) -> str:
        """What is loaded, in words."""
        model = self.config["model"]
        adapter = (model.get("lora") or {}).get("adapter") if self.checkpoint is None else None
        return str(self.checkpoint or adapter or model.get("model_name_or_path"))


def find_origin(
    run: str | None = None,
    model: str | None = None,
    config: Sequence[str] = (),
    ckpt_path: str | None = None,
    given: Sequence[str] = (),
    rollout: Sequence[str] = LIMITS,
) -> Origin:
    """What a command or `Asker` was told, as one configuration.

    Args:
        run: a run folder, or its name below runs/.
        model: a model folder, an adapter folder or a hub name.
        config: files whose keys are added; later ones win.
        ckpt_path: a checkpoint, or `last`, the run's own.
        given: names of keys that are given otherwise, such as `data.retriever`.
        rollout: keys of `rollout:` that are kept: `LIMITS` for answers, `TRAINING` for groups as training has them.

    Raises:
        ConfigError: neither or both of run and model; no such run; it has no weights yet; no retriever is known.
    """
    if (run is None) == (model is None):
        found = "neither" if run is None else "both"
        raise ConfigError(f"run: expected --run RUN (such as runs/quickstart) or --model FOLDER, found {found}.")
    files = [_read(Path(path)) for path in config]
    if run is not None:
        folder = _run_folder(run)
        settings, weights, checkpoint = _of_run(folder, _read(folder / CONFIG), ckpt_path)
    else:
        if ckpt_path is not None:
            raise ConfigError("ckpt_path: expected it beside --run, whose config.yaml tells what it belongs to.")
        settings, weights, checkpoint = *_of_model(str(model), files, given), None
    for file in files:
        settings = _joined(settings, file)
    settings["model"] = (settings.get("model") or {}) | weights
    _check_data(settings, model, given)
    asked: dict[str, Any] = {
        "seed_everything": settings.get("seed_everything") if type(settings.get("seed_everything")) is int else 0,
        "model": {key: value for key, value in settings["model"].items() if key in POLICY},
        "data": settings["data"],
        "rollout": {key: value for key, value in (settings.get("rollout") or {}).items() if key in rollout},
    }
    options = settings.get("trainer") or {}, settings.get("run") or {}
    return Origin(asked, checkpoint, options[0].get("precision"), options[1].get("num_threads"))


def _read(path: Path) -> dict[str, Any]:
    """A YAML file of keys.

    Raises:
        ConfigError: there is none, or it holds something else.
    """
    if not path.is_file():
        raise ConfigError(f"config: there is no file {path}.")
    with reading_foreign(f"config: expected YAML in {path}"):
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ConfigError(f"config: expected keys such as data: and model: in {path}, found {str(found)[:40]!r}.")
    for name in ("model", "data", "rollout"):
        if found.get(name) is not None and not isinstance(found[name], dict | str):
            raise ConfigError(f"config: expected keys under {name}: in {path}, found {str(found[name])[:40]!r}.")
    data = found.get("data")
    if isinstance(data, dict) and not {"class_path", "init_args"} & {*data}:
        found["data"] = {"init_args": data}  # keys alone are those of whichever class the others name
    protocol = (found.get("model") or {}).get("protocol")
    if isinstance(protocol, str) and (beside := path.parent / protocol).is_file():
        found["model"]["protocol"] = str(beside)  # named as seen from its file
    return found


def _joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Both configurations, the second over the first; options of another class do not mix."""
    joined = dict(first)
    for key, value in second.items():
        old = joined.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        another = both and "class_path" in value and value["class_path"] != old.get("class_path")  # type: ignore[union-attr]
        joined[key] = _joined(old, value) if both and not another else value  # type: ignore[arg-type]
    return joined


def _run_folder(run: str) -> Path:
    for path in (Path(run).expanduser(), Path("runs", run)):
        if (path / CONFIG).is_file():
            return path
    here = sorted(path.parent.name for path in Path("runs").glob(f"*/{CONFIG}"))
    known = f" In runs/ are: {', '.join(here[:8])}." if here else ""
    raise ConfigError(f"run: expected a run folder with {CONFIG}, found none at {run}.{known}")


def _of_run(
    folder: Path, config: dict[str, Any], ckpt_path: str | None
) -> tuple[dict[str, Any], dict[str, Any], Path | None]:
    """Configuration, keys of `model:` that change, and the checkpoint."""
    last = folder / "checkpoints" / "last.ckpt"
    if ckpt_path is not None:
        return config, {}, last if ckpt_path == "last" else Path(ckpt_path).expanduser()
    if (folder / "model" / "config.json").is_file():  # adapters are merged there
        return config, {"model_name_or_path": str(folder / "model"), "scratch": None, "lora": None}, None
    if last.exists():
        return config, {}, last
    raise ConfigError(
        f"run: {folder} has no model yet: expected model/ or checkpoints/last.ckpt. Run its command again."
    )


def _of_model(
    name: str, files: Sequence[Mapping[str, Any]], given: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is taken of the folder's own configuration, and the keys of `model:` that name the weights."""
    folder = Path(name).expanduser()
    if not folder.exists() and (name.startswith((".", "/", "~", "runs/")) or name.count("/") > 1):
        raise ConfigError(f"model: expected a model folder or a hub name, found nothing at {name}.")
    settings: dict[str, Any] = {}
    if (folder / SETTINGS).is_file():
        settings = _harmless(_read(folder / SETTINGS))
    if not (folder / ADAPTER).is_file():
        return settings, {"model_name_or_path": name, "scratch": None, "lora": None}
    with reading_foreign(f"model: expected the configuration of an adapter in {folder / ADAPTER}"):
        base = json.loads((folder / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    named = [(file.get("model") or {}).get("model_name_or_path") for file in reversed(files)]
    base = next((found for found in (base, *named) if found), None)
    if base is None and "model.model_name_or_path" not in given:
        raise ConfigError(f"model: the adapter {name} does not name its base: --model.model_name_or_path BASE does.")
    return settings, {"model_name_or_path": base, "scratch": None, "lora": {"adapter": name}}


def _harmless(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration from elsewhere may say."""
    told: dict[str, Any] = {"seed_everything": config.get("seed_everything"), "model": {}}
    protocol = _group(config, "model").get("protocol")
    if (isinstance(protocol, str) and protocol.isidentifier()) or (
        isinstance(protocol, Mapping) and all(path.startswith(_PROTOCOLS) for path in _class_paths(protocol))
    ):
        told["model"]["protocol"] = protocol
    rollout = _group(config, "rollout")
    told["rollout"] = {key: rollout[key] for key in LIMITS if type(rollout.get(key)) is int}
    data = _group(config, "data")
    if str(data.get("class_path")).rpartition(".")[2] == _WORLD:
        numbers = {
            key: value
            for key, value in _group(data, "init_args").items()
            if key != "seed" and (type(value) in (int, float) or (isinstance(value, list) and "hop_mix" in key))
        }
        told["data"] = {"class_path": f"sdsearch_lightning.datamodules.{_WORLD}", "init_args": numbers}
    return told


def _group(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def _class_paths(value: Any) -> list[str]:
    """Every class that a part of a configuration names."""
    if isinstance(value, Mapping):
        own = [str(value["class_path"])] if "class_path" in value else []
        return own + [path for item in value.values() for path in _class_paths(item)]
    return [path for item in value for path in _class_paths(item)] if isinstance(value, list) else []


def _check_data(settings: dict[str, Any], model: str | None, given: Sequence[str]) -> None:
    """Fill in the plain data module; refuse one that searches nothing."""
    data = settings.get("data") or {}
    data = {"class_path": data} if isinstance(data, str) else dict(data)
    if "class_path" not in data:  # keys alone are those of the plain one
        data = {"class_path": _DATA, "init_args": data.get("init_args", data)}
    options = {key: value for key, value in (data.get("init_args") or {}).items() if key != "seed"}
    settings["data"] = data | {"init_args": options}
    is_plain = str(data["class_path"]).rpartition(".")[2] == "SearchDataModule"
    if not is_plain or options.get("retriever") is not None or {"data", "data.retriever"} & {*given}:
        return
    theirs = Path(model or "") / SETTINGS
    hint = f" {theirs} names the one it was trained with: --config {theirs}, if you trust that file."
    raise ConfigError(
        "data.retriever: no retriever is known, and answers need something to search. Name one: --data.retriever "
        "RemoteRetriever --data.retriever.url http://..., or a file with --config." + (hint if theirs.is_file() else "")
    )
