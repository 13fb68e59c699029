"""Usage errors: exit code 2, at most three lines on standard error, and the mistake and its remedy in them."""

import pytest

from sdsearch_lightning.__main__ import main
from sdsearch_lightning.errors import ConfigError, RetrievalError

DATA = ["--data", "SyntheticWorldDataModule"]
MODEL = ["--model.model_name_or_path", "nowhere/at/all"]

ON_THE_COMMAND_LINE = [
    (["--model.kl_coeff", "3"], "unknown key 'model.kl_coeff'. Did you mean 'model.kl_coef'?"),
    (["--rolout.group_size=4"], "unknown key 'rolout.group_size'. Did you mean 'rollout.group_size'?"),
    (["--trainer.max_step", "3"], "Did you mean 'trainer.max_steps'?"),  # not taken for an abbreviation
    (["--run.nmae", "x"], "Did you mean 'run.name'?"),
    (["--data.num_entitis", "3"], "data: unknown key 'num_entitis'. Did you mean 'num_entities'?"),
    (["--model.scratch.model_typ", "x"], "model.scratch: unknown key 'model_typ'. Did you mean 'model_type'?"),
    (["--model.optimizer.lrr", "3"], "model.optimizer: unknown key 'lrr'. Did you mean 'lr'?"),
    (["--model.xyzzy", "3"], "unknown key 'model.xyzzy'."),
    (["--model.num_updates", "many"], "model.num_updates: expected int, got many"),
    (["--data.num_entities", "many"], "data: num_entities: expected int, got many"),
    (["--seed_everything", "x"], "seed_everything: expected bool or int, got x"),
    (["--trainer.max_steps"], "--trainer.max_steps: expected one argument"),
    (["--max_steps", "5"], "unknown key 'max_steps'. Did you mean 'trainer.max_steps'?"),
    (["--group_size", "5"], "unknown key 'group_size'. Did you mean 'rollout.group_size'?"),
    (["extra"], "unrecognized arguments: extra"),
    (["--data", "SyntheticWorldDataModul"], "data: there is no class 'SyntheticWorldDataModul'. Did you"),
    (["--rollout.reward", "F1Rewar"], "rollout.reward: there is no class 'F1Rewar'. Did you mean 'F1Reward'?"),
    (["--model.optimizer", "AdamWW"], "model.optimizer: there is no class 'AdamWW'. Did you mean 'AdamW'?"),
    (["--model.protocol", "autorefin"], "model.protocol: there is no class 'autorefin'. Did you mean 'autorefine'?"),
    (
        ["--rollout.reward", "sdsearch_lightning.scoring.rewads.F1Reward"],
        "in sdsearch_lightning.scoring. Did you mean 'rewards'?",
    ),
    (["--rollout.reward", "nowhere.F1Reward"], "rollout.reward: there is no module 'nowhere'."),
    (["--config", "nope.yaml"], "nope.yaml"),
    (["--model.protocol", "nope.yaml"], "model.protocol: there is no file nope.yaml."),
    (["--rollout.seed", "3"], 'Linked "rollout.seed" must be given via "seed_everything".'),
    (["--data.seed", "3"], 'Linked "data.seed" must be given via "seed_everything".'),
    (["--rollout.temperature", "0"], "rollout.temperature"),
    (["--run.name", "../elsewhere"], "run.name: expected a folder below run.root, such as mine"),
    (["--data.batch_size", "0"], "data.batch_size: expected at least 1, found 0."),  # from its __init__
    (["--ckpt_path", "last"], "ckpt_path: expected the last checkpoint of a run, found none at runs/"),
    (["--ckpt_path", "nope.ckpt"], "expected a checkpoint (a file, or a folder of shards), found none at nope.ckpt."),
    (["--trainer.strategy", "fsdp"], "FSDP1 cannot train with manual optimisation. Use fsdp2."),
    (["--trainer.strategy", "FSDPStrategy"], "fsdp2"),
    (["--trainer.strategy", "dpp"], "trainer: "),
    (["--trainer.accelerator", "gpuu"], "trainer: "),
    ([], "model.model_name_or_path: there is no folder 'nowhere/at/all'"),
]  # fmt: skip

IN_YAML = [
    ("model: {kl_coeff: 3}", "unknown key 'model.kl_coeff'. Did you mean 'model.kl_coef'?"),
    ("modell: {kl_coef: 3}", "unknown key 'modell.kl_coef'. Did you mean 'model.kl_coef'?"),
    ("data: {class_path: SyntheticWorldDataModule, init_args: {num_entitis: 3}}", "Did you mean 'num_entities'?"),
    ("rollout: {reward: {class_path: sdsearch_lightning.scoring.rewards.F1Rewrd}}", "Did you mean 'F1Reward'?"),
    ("rollout: {reward: {class_path: AutoRefineReward, init_args: {refine_scoer: 1}}}", "Did you mean 'refine_score'?"),
    ("trainer: {callbacks: [{class_path: sdsearch_lightning.callbacks.GracefulStp}]}", "Did you mean 'GracefulStop'?"),
    ("trainer: {callbacks: [{class_path: TrajectoryLog, init_args: {top_token: 3}}]}", "Did you mean 'top_tokens'?"),
    ("model: {scratch: {model_typ: x}}", "Did you mean 'model_type'?"),
    ("rollout: {group_size: five}", "rollout.group_size: expected int, got five"),
    ("data: {seed: 3}", 'Linked "data.seed" must be given via "seed_everything".'),
    ("model: [", "config.yaml, line 1: this is no YAML"),
    ("model: {}\nmodel: {}", "config.yaml, line 2: the key 'model' stands in line 1 already"),
    ("", "config.yaml: expected keys"),
    ("trainer: {logger: {class_path: CometLogger}}", ".CometLogger cannot be made: Requirement"),
]  # fmt: skip


def fails(capfd, tmp_path, monkeypatch, *arguments, code=2):
    """Standard error of a command that has to fail."""
    monkeypatch.chdir(tmp_path)
    ended = main(arguments)
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("INFO")]  # pytest's capture keeps logs
    assert ended == code
    assert out == ""
    assert 1 <= len(lines) <= 3 and lines[0].startswith("error: "), err
    assert all(len(line) <= 300 for line in lines)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("*.ckpt"))
    return err


@pytest.mark.parametrize(
    "arguments, told", ON_THE_COMMAND_LINE, ids=lambda value: "_".join(value) if value else "model"
)
def test_on_the_command_line(capfd, tmp_path, monkeypatch, arguments, told):
    assert told in fails(capfd, tmp_path, monkeypatch, "fit", *DATA, *MODEL, *arguments)


@pytest.mark.parametrize("text, told", IN_YAML)
def test_in_yaml(capfd, tmp_path, monkeypatch, text, told):
    (tmp_path / "config.yaml").write_text(text)
    assert told in fails(capfd, tmp_path, monkeypatch, "fit", *DATA, *MODEL, "--config", "config.yaml")


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["fit"], "'data' is required"),
        (
            ["export", "--ckpt_path", "x", "--output", "y"],
            "expected a checkpoint (a file, or a folder of shards), found none at x.",
        ),
        (["export", "--ckpt_pth", "x"], "unknown key 'ckpt_pth'. Did you mean 'ckpt_path'?"),
        (["report"], "'run' is required"),
        (["report", "nothing"], "found none in nothing"),
        (["supervise", *DATA, "--model.loss_weight.query", "3"], "Did you mean 'model.loss_weights.query'?"),
        (["supervise", *DATA, "--rollout.group_size", "3"], "unknown key 'rollout.group_size'"),
    ],
)
def test_of_other_commands(capfd, tmp_path, monkeypatch, arguments, told):
    assert told in fails(capfd, tmp_path, monkeypatch, *arguments)


def test_a_misspelt_command_needs_no_import(capfd):
    assert main(["superwise"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "Did you mean 'supervise'?" in err


@pytest.mark.parametrize("said, meant", [("train", "fit"), ("eval", "test"), ("sft", "supervise")])
def test_a_command_by_the_name_that_others_give_it(capfd, said, meant):
    assert main([said]) == 2
    assert f"Did you mean {meant!r}?" in capfd.readouterr().err


def test_no_command_shows_the_help(capfd):
    assert main([]) == 2
    assert "commands:" in capfd.readouterr().out


@pytest.mark.parametrize("error, code", [(RetrievalError, 1), (ConfigError, 2)])
def test_an_error_in_a_run_is_told_in_lines_and_on_demand_with_its_traceback(capfd, tmp_path, monkeypatch, error, code):
    def broken(*args):
        raise error("expected this, found that.\nDo so.")

    monkeypatch.setattr("sdsearch_lightning.cli.training.SearchCLI", broken)
    assert fails(capfd, tmp_path, monkeypatch, "fit", code=code) == "error: expected this, found that.\nDo so.\n"
    monkeypatch.setenv("SDSEARCH_TRACEBACK", "1")
    with pytest.raises(error):
        main(["fit"])


def test_another_error_is_not_hidden(monkeypatch):
    def broken(*args):
        raise ZeroDivisionError

    monkeypatch.setattr("sdsearch_lightning.cli.training.SearchCLI", broken)
    with pytest.raises(ZeroDivisionError):
        main(["fit"])


def test_ctrl_c_before_training_ends_with_130(monkeypatch):
    def stopped(*args):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise SystemExit(1)  # noqa: B904  (as Lightning does it)

    monkeypatch.setattr("sdsearch_lightning.cli.training.SearchCLI", stopped)
    assert main(["fit"]) == 130
