import pytest
import torch
import yaml

from sdsearch_lightning.checkpoints.seals import seal
from sdsearch_lightning.errors import ConfigError, DataError
from sdsearch_lightning.runs.folder import RunFolder, RunOptions

CONFIG = {"seed_everything": 0, "model": {"lr": 0.1, "options": {}}, "run": {"overwrite": False}, "ckpt_path": None}


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


def save(folder, *steps, last):
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    for step in steps:
        contents = {"global_step": step, "state_dict": {"w": torch.zeros(1000)}}
        torch.save(contents, path := folder.checkpoints / f"step_{step:08d}.ckpt")
        seal(path)
    folder.last_checkpoint.symlink_to(f"step_{last:08d}.ckpt")
    folder.config.write_text(yaml.safe_dump(CONFIG))


def test_a_new_folder_has_no_owner_and_nothing_to_resume(folder):
    folder.check_owner(CONFIG)
    assert folder.resume_point() is None
    assert not folder.is_finished


def test_the_published_checkpoint_is_resumed_and_a_later_file_is_not(folder):
    save(folder, 2, 4, 6, last=4)
    assert folder.resume_point() == (folder.checkpoints / "step_00000004.ckpt", 4)


@pytest.mark.parametrize("size", [0, 10, 1500])
def test_a_torn_checkpoint_is_named_and_the_one_before_it_is_taken(folder, capsys, size):
    save(folder, 2, 4, last=4)
    torn = folder.checkpoints / "step_00000004.ckpt"
    torn.write_bytes(torn.read_bytes()[:size])
    assert folder.resume_point() == (folder.checkpoints / "step_00000002.ckpt", 2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"warning: {torn} is damaged and passed over")


def test_a_file_does_not_speak_to_the_terminal(folder, capsys):
    save(folder, 2, last=2)
    folder.checkpoints.joinpath("step_00000002.ckpt").unlink()
    evil = folder.checkpoints / "step_00000002.ckpt"
    evil.mkdir()
    (evil / "meta.pt").touch()
    (evil / ".metadata").write_bytes(b"c\x1b]0;owned\x07\nname\n.")
    with pytest.raises(DataError):
        folder.resume_point()
    told = capsys.readouterr().err
    assert "]0;owned" in told and "\x1b" not in told


def test_with_every_checkpoint_torn_the_way_out_is_told(folder):
    save(folder, 2, 4, last=4)
    for path in folder.checkpoints.glob("step_*"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the 2 checkpoints.*\n.*--run.overwrite true"):
        folder.resume_point()


def test_a_plain_last_checkpoint_is_resumed_too(folder):
    save(folder, 2, last=2)
    folder.last_checkpoint.unlink()
    torch.save({"global_step": 3, "state_dict": {}}, folder.last_checkpoint)
    assert folder.resume_point() == (folder.last_checkpoint, 3)


def test_another_configuration_or_seed_is_refused_with_what_differs(folder):
    save(folder, 2, last=2)
    with pytest.raises(ConfigError) as error:
        folder.check_owner(CONFIG | {"seed_everything": 1, "model": {"lr": 0.2, "options": {"width": 3}}})
    first, second = str(error.value).splitlines()
    assert "seed_everything is 0 there, 1 now" in first and "model.lr is 0.1 there, 0.2 now" in first
    assert "(and 1 more)" in first, "an empty group and its new key"
    assert "--run.name" in second and "--run.overwrite true" in second


def test_keys_that_change_no_result_may_differ(folder):
    save(folder, 2, last=2)
    folder.check_owner(CONFIG | {"run": {"overwrite": True}, "ckpt_path": "x"})


def test_a_damaged_configuration_is_told(folder):
    save(folder, 2, last=2)
    for contents in (b"\xff\xfe", b"a: [", bytes(100)):
        folder.config.write_bytes(contents)
        with pytest.raises(DataError, match=r"config\.yaml: expected the configuration of the run \("):
            folder.check_owner(CONFIG)


def test_a_finished_run_without_its_configuration_is_refused(folder):
    folder.path.mkdir()
    (folder.path / "summary.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"without its config\.yaml"):
        folder.check_owner(CONFIG)


def test_clearing_leaves_what_a_user_keeps_there(folder):
    save(folder, 2, last=2)
    notes = folder.path / "notes.txt"
    notes.write_text("mine")
    (folder.path / "trajectories.rank1.jsonl").write_text("")
    folder.clear()
    assert list(folder.path.iterdir()) == [notes]


def test_steps_after_the_restored_one_are_removed(folder):
    save(folder, 2, 4, 6, last=2)
    folder.clear_after(4, RunOptions())
    assert sorted(path.name for path in folder.checkpoints.glob("step_*")) == [
        "step_00000002.ckpt",
        "step_00000004.ckpt",
    ]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [40, 60]),
        ({"checkpoint_keep": 3}, [20, 40, 60]),
        ({"checkpoint_keep": 1, "checkpoint_keep_every": 20}, [20, 40, 60]),
        ({"checkpoint_keep": 1, "checkpoint_keep_every": 40}, [40, 60]),
    ],
)
def test_older_ones_that_a_cut_left_are_removed_unless_they_are_to_stay(folder, options, steps):
    save(folder, 20, 40, 60, 80, last=60)
    folder.clear_after(60, RunOptions(**options))
    assert sorted(path.name for path in folder.checkpoints.glob("step_*")) == [f"step_{n:08d}.ckpt" for n in steps]


def test_drafts_that_a_kill_left_are_removed(folder):
    save(folder, 2, last=2)
    drafts = [folder.checkpoints / ".step_00000004.ckpt.draft", folder.path / ".trajectories.00001.jsonl.gz.draft"]
    for draft in drafts:
        draft.touch()
    folder.clear_after(2, RunOptions())
    assert not any(draft.exists() for draft in drafts)


def test_the_model_folder_is_replaced_whole(folder):
    folder.model.mkdir(parents=True)
    (folder.model / "old").write_text("")
    folder.replace_model(lambda path: path.mkdir())
    assert folder.model.is_dir() and not list(folder.model.iterdir())

    def fails(path):
        path.mkdir()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        folder.replace_model(fails)
    assert folder.model.is_dir()


@pytest.mark.parametrize(
    "options",
    [
        {"name": ""},
        {"name": "../x"},
        {"name": "/x"},
        {"checkpoint_every": 0},
        {"checkpoint_keep": 0},
        {"checkpoint_keep_every": 15},
    ],
)
def test_run_options_that_cannot_work_are_refused(options):
    with pytest.raises(ConfigError, match=r"^run\."):
        RunOptions(**options)


@pytest.mark.parametrize(
    "name",
    ["a\nb", "a\x1b]0;x\x07", "a\0", "a/", "a//b", "./a", "a/../b", "a\\b", " a", "~/a", ".a", "a" * 300,
     "a/checkpoints", "a/model", "a/config.yaml"],
)  # fmt: skip
def test_a_name_is_one_folder_per_part(name):
    with pytest.raises(ConfigError, match=r"^run\.name: ") as caught:
        RunOptions(name=name)
    assert str(caught.value).isprintable()


def test_no_run_lies_in_another(folder, tmp_path):
    save(folder, 2, last=2)
    for root, name in ((tmp_path, "run/more"), (tmp_path, "run/deep/more"), (folder.path, "more")):
        with pytest.raises(ConfigError, match=rf"which lies in the run {folder.path}"):
            RunOptions(name=name, root=str(root))
    RunOptions(name="run", root=str(tmp_path))


@pytest.mark.parametrize("name", ["mine", "comparison/grpo-seed3", "a/b/c_1.5", "Übung 2", "model"])
def test_names_that_are_fine(name, tmp_path):
    assert RunOptions(name=name, root=str(tmp_path)).name == name
