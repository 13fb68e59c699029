"""A module and its data module from a saved configuration, without a trainer, and weights from a checkpoint."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from sdsearch_lightning.callbacks import RolloutGrouping
from sdsearch_lightning.checkpoints.reading import StoredCheckpoint
from sdsearch_lightning.datamodules import SearchDataModule
from sdsearch_lightning.errors import ConfigError, first_line
from sdsearch_lightning.inference.origin import LIMITS
from sdsearch_lightning.module import SDSearchModule
from sdsearch_lightning.supervised import SupervisedModule
from sdsearch_lightning.training.policy_module import PolicyModule


def link_seed(parser: LightningArgumentParser) -> None:
    """One seed for everything: `seed_everything` reaches the data module and the module."""
    parser.link_arguments("seed_everything", "data.init_args.seed", int)
    parser.link_arguments("seed_everything", "model.seed", int)


def _parser(
    module_class: type[PolicyModule], parser_class: type[LightningArgumentParser], **options: Any
) -> LightningArgumentParser:
    parser = parser_class(**options)
    parser.add_argument("--seed_everything", type=int, help="the one seed")
    parser.add_lightning_class_args(module_class, "model")
    parser.add_lightning_class_args(SearchDataModule, "data", subclass_mode=True)
    link_seed(parser)
    return parser


def build_module(config: Mapping[str, Any]) -> Any:
    """The module that a run's configuration describes, with its model, and without reference and teacher."""
    module_class: type[PolicyModule] = SDSearchModule if "rollout" in config else SupervisedModule
    parser = _parser(module_class, LightningArgumentParser)
    groups = {key: config[key] for key in ("seed_everything", "model", "data")}
    if module_class is SDSearchModule:
        rest = {key: value for key, value in config["model"].items() if key != "teacher"}
        groups["model"] = rest | {"kl_coef": 0.0}
    trainer = config.get("trainer") or {}
    if trainer.get("precision") == "bf16-true" and "fsdp2" not in str(trainer.get("strategy")).lower():
        groups["model"] = groups["model"] | {"dtype": "bfloat16"}  # what it was trained in; shards stay float32
    built = parser.instantiate_classes(parser.parse_object(groups))
    load_model(built.model, built.data)
    return built.model


def build_for_answers(
    config: Mapping[str, Any],
    keys: Sequence[str] = (),
    parser_class: type[LightningArgumentParser] = LightningArgumentParser,
    rollout: Sequence[str] = LIMITS,
) -> tuple[SDSearchModule, SearchDataModule, RolloutGrouping]:
    """What answers questions, its model not yet loaded.

    Args:
        config: of an `Origin`.
        keys: more of them, as on a command line: `--rollout.max_searches 2`.
        parser_class: tells errors in keys its own way, or leaves them to be raised.
        rollout: keys of `rollout:` that may be given, see `find_origin`.

    Raises:
        ConfigError: a key or a value that cannot be used.
    """
    shared = {} if parser_class is not LightningArgumentParser else {"exit_on_error": False}
    parser = _parser(SDSearchModule, parser_class, **shared)
    others = {name for name in _options(RolloutGrouping) if name not in rollout}
    parser.add_class_arguments(RolloutGrouping, "rollout", skip=others)
    groups = dict(config) | {"model": dict(config["model"]) | {"kl_coef": 0.0}}
    try:
        parsed = parser.parse_args([*keys], namespace=parser.parse_object(groups))
        built = parser.instantiate_classes(parsed)
    except ArgumentError as error:
        raise ConfigError(first_line(error)) from error
    return built.model, built.data, built.rollout


def _options(kind: type) -> list[str]:
    code: Any = kind.__init__.__code__  # type: ignore[misc]
    return list(code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount])


def load_model(module: Any, data: Any) -> None:
    """Load the module's model; one from random weights asks the data module, as it would a trainer's, for its words."""
    module.trainer = SimpleNamespace(datamodule=data, precision_plugin=None)
    module.configure_model()


def restore(module: PolicyModule, checkpoint: StoredCheckpoint) -> None:
    """Give `module` the policy's weights.

    Raises:
        ConfigError: they are another model's, or cannot be read.
    """
    policy = "policy."
    weights = {name: weight for name, weight in module.state_dict().items() if name.startswith(policy)}
    shapes = {name: shape for name, shape in checkpoint.shapes.items() if name.startswith(policy)}
    module.check_checkpoint(checkpoint.facts, shapes, weights)
    checkpoint.read({name: weight for name, weight in weights.items() if module.is_saved(name)})
