"""Checkpoints that cannot be written or do not fit: one line, an exit code, and nothing lost."""

import errno

import pytest
import torch

from sdsearch_lightning.checkpoints.seals import seal
from sdsearch_lightning.checkpoints.writing import PlainFiles

pytestmark = pytest.mark.slow
LAST = "runs/rl/checkpoints/last.ckpt"
SHORT = ("fit", "--config", "fit.yaml", "--trainer.max_steps", "9")


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_full_disk_ends_the_run_in_two_lines_and_the_same_command_goes_on(workplace, monkeypatch):
    command = ("fit", "--config", "fit.yaml", "--run.name", "full")
    write, calls = PlainFiles.save_checkpoint, []

    def full(self, checkpoint, path, storage_options=None):
        write(self, checkpoint, path)
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(path.read_bytes()[:1000])
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PlainFiles, "save_checkpoint", full)
        ended = workplace.sdsearch(*command)
    assert ended.returncode == 1
    first, second = ended.stderr.splitlines()
    told = "error: the checkpoint of step 4 could not be saved in runs/full/checkpoints: No space left on device ("
    assert first.startswith(told) and first.endswith(" MB are free).")
    assert second == (
        "The checkpoint of step 2 is intact. Free some space (or allow writing) and run the same command again: "
        "it goes on from there."
    )
    left = sorted(path.name for path in (workplace.run("full") / "checkpoints").iterdir())
    assert left == ["last.ckpt", "step_00000002.ckpt"]
    resumed = workplace.sdsearch(*command)
    assert resumed.returncode == 0 and "after step 2" in resumed.stdout
    assert workplace.contents("full") == workplace.contents("rl")


def changed(workplace, tmp_path, change):
    checkpoint = torch.load(workplace.path / LAST, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "changed.ckpt")
    seal(tmp_path / "changed.ckpt")
    return str(tmp_path / "changed.ckpt")


def cut_embeddings(checkpoint):
    weights = checkpoint["state_dict"]
    name = next(name for name in weights if "embed_tokens" in name)
    weights[name] = weights[name][:10]


def drop_a_weight(checkpoint):
    del checkpoint["state_dict"]["policy.model.model.norm.weight"]


def double_optimizers(checkpoint):
    checkpoint["optimizer_states"] *= 2


@pytest.mark.parametrize(
    "change, told",
    [
        (cut_embeddings, "embed_tokens.weight is [10, 32] there and ["),
        (drop_a_weight, "it has no policy.model.model.norm.weight"),
        (double_optimizers, "the checkpoint holds 2 optimizers, model: makes 1"),
        (lambda checkpoint: checkpoint["state_dict"].clear(), "it has no policy."),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_the_run_in_the_folder_stays(workplace, tmp_path, change, told):
    path = changed(workplace, tmp_path, change)
    before = files_of(workplace.run("rl"))
    done = workplace.sdsearch(*SHORT, "--run.overwrite", "true", "--ckpt_path", path)
    assert done.returncode == 2 and told in done.stderr.splitlines()[0], done.stderr
    assert len(done.stderr.splitlines()) <= 3
    assert files_of(workplace.run("rl")) == before


def test_validate_of_another_model_is_refused_too(workplace, tmp_path):
    path = changed(workplace, tmp_path, drop_a_weight)
    done = workplace.sdsearch("validate", "--config", "fit.yaml", "--ckpt_path", path)
    assert done.returncode == 2 and "it has no policy.model.model.norm.weight" in done.stderr


@pytest.mark.parametrize("text", [b"", b"hello", b"PK\x03\x04 and nothing more"])
def test_what_is_no_checkpoint_is_refused_before_anything_is_loaded(workplace, tmp_path, text):
    (tmp_path / "x.ckpt").write_bytes(text)
    done = workplace.sdsearch(*SHORT, "--run.name", "x", "--ckpt_path", str(tmp_path / "x.ckpt"))
    assert done.returncode == 2 and "as a checkpoint of this library: cut off, or something else." in done.stderr
    assert not workplace.run("x").exists()


def test_a_learning_rate_that_the_checkpoint_overrules_is_told(workplace):
    with pytest.warns(UserWarning, match=r"learning rates of the checkpoint, \[0.001\], go on, not those of model:"):
        done = workplace.sdsearch(
            "fit", "--config", "fit.yaml", "--run.name", "rate", "--trainer.max_steps", "9", "--ckpt_path", LAST,
            "--model.optimizer.lr", "0.0005",
        )  # fmt: skip
    assert done.returncode == 0


def test_another_total_batch_size_is_refused_and_the_run_goes_on_with_the_old_one(workplace):
    command = ("fit", "--config", "fit.yaml", "--run.name", "total")
    stopped = workplace.interrupted(
        "SIGTERM", "sdsearch_lightning.rollout.groups:GroupSampler.run", "6", "before", *command
    )
    assert stopped.returncode == 143
    done = workplace.sdsearch(*command, "--data.batch_size", "5")
    assert done.returncode == 2
    assert "data.batch_size: the checkpoint's steps hold 4 questions, found 5 x 1 processes = 5" in done.stderr
    assert workplace.sdsearch(*command).returncode == 0
    assert workplace.contents("total") == workplace.contents("rl")
