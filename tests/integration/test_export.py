"""`export`: from a file and from shards, what it writes is what other programs load; what cannot work is told."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.exports import EXPORT_TOKENS, export, exported_logits, shard, stored
from sdsearch_lightning.checkpoints.reading import open_checkpoint
from sdsearch_lightning.files import written_whole

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sharded(workplace: Any) -> Path:
    """runs/sharded: the run runs/rl, had its last checkpoint been sharded; last.ckpt is a link."""
    run = workplace.run("sharded")
    folder = run / "checkpoints/step_00000008.ckpt"
    shard(stored(workplace.run("rl") / "checkpoints/last.ckpt"), folder)
    shutil.copy(workplace.run("rl") / "config.yaml", run)
    (run / "checkpoints/last.ckpt").symlink_to(folder.name)
    return folder


@pytest.mark.parametrize("run", ["rl", "sharded"])
def test_plain_transformers_reads_the_policys_logits_from_a_file_and_from_shards(
    workplace: Any, sharded: Path, tmp_path: Path, run: str
) -> None:
    done = export(workplace, f"runs/{run}/checkpoints/last.ckpt", tmp_path / "model")
    assert (done.returncode, done.stderr) == (0, "")
    assert "step 8 of" in done.stdout
    trained = AutoModelForCausalLM.from_pretrained(workplace.run("cold") / "model", dtype=torch.float32)
    weights = stored(workplace.run("rl") / "checkpoints/last.ckpt")["state_dict"]
    before = trained(EXPORT_TOKENS).logits
    trained.load_state_dict({n.removeprefix("policy.model."): w for n, w in weights.items()})
    expected = trained(EXPORT_TOKENS).logits
    assert torch.equal(exported_logits(tmp_path / "model"), expected)
    assert not torch.allclose(before, expected, atol=1e-4), "training changed what is compared"
    words = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert words.encode("<search>") == AutoTokenizer.from_pretrained(workplace.run("cold") / "model").encode("<search>")


def test_the_comparison_above_can_fail(workplace: Any, sharded: Path, tmp_path: Path) -> None:
    facts = stored(workplace.run("rl") / "checkpoints/last.ckpt")
    facts["state_dict"]["policy.model.model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-3
    folder = sharded.with_name("step_00000009.ckpt")
    shard(facts, folder)
    assert export(workplace, folder, tmp_path / "model").returncode == 0
    assert not torch.equal(exported_logits(tmp_path / "model"), exported_logits(workplace.run("rl") / "model"))


def test_no_process_group_is_needed_and_optimizer_states_are_not_read(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.facts["global_step"] == 8
    assert all(name.startswith("policy.") for name in checkpoint.shapes)
    assert not torch.distributed.is_initialized()


# The card, and the hub


def test_the_card_of_an_export_is_that_of_the_run_and_its_command_runs(workplace: Any, tmp_path: Path) -> None:
    assert export(workplace, "runs/rl/checkpoints/last.ckpt", tmp_path / "model").returncode == 0
    for name in ("README.md", "sdsearch_config.yaml"):
        assert (tmp_path / "model" / name).read_text() == (workplace.run("rl") / "model" / name).read_text()
    text = (tmp_path / "model/README.md").read_text()
    command = next(line for line in text.splitlines() if line.startswith("sdsearch predict"))
    told = command.replace("PATH_OR_NAME", str(tmp_path / "model"))
    told = told.replace("sdsearch_config.yaml", str(tmp_path / "model/sdsearch_config.yaml"))
    done = workplace.sdsearch(*told.split()[1:], "--run.name", "from_card")
    assert (done.returncode, done.stderr) == (0, "")
    (rollouts,) = (workplace.run("from_card") / "predict").glob("*/trajectories.jsonl")
    assert rollouts.stat().st_size > 0


def test_a_checkpoint_before_the_end_has_no_scores(workplace: Any, tmp_path: Path) -> None:
    assert export(workplace, "runs/rl/checkpoints/step_00000006.ckpt", tmp_path / "model").returncode == 0
    text = (tmp_path / "model/README.md").read_text()
    assert "evaluated after step 8, these weights are of step 6" in text and "| exact match |" not in text


def test_a_push_that_fails_leaves_the_folder_and_one_that_does_not_tells_where(
    workplace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    done = export(workplace, "runs/rl/checkpoints/last.ckpt", tmp_path / "a", "--push_to_hub", "owner/model")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 2
    assert "push_to_hub: owner/model could not be written" in done.stderr
    assert torch.equal(exported_logits(tmp_path / "a"), exported_logits(workplace.run("rl") / "model"))
    monkeypatch.setattr("sdsearch_lightning.cli.export.push", lambda folder, name: f"https://hub/{name}")
    done = export(workplace, "runs/rl/checkpoints/last.ckpt", tmp_path / "b", "--push_to_hub", "owner/model")
    assert done.returncode == 0 and "pushed to https://hub/owner/model" in done.stdout
    done = export(workplace, "runs/rl/checkpoints/last.ckpt", tmp_path / "c", "--push_to_hub", "model")
    assert done.returncode == 2 and not (tmp_path / "c").exists()


# What cannot work


def damaged(sharded: Path, tmp_path: Path, name: str) -> Path:
    """A copy of the sharded run without one of its files."""
    shutil.copytree(sharded.parent.parent, tmp_path / "run", symlinks=True)
    folder = tmp_path / "run/checkpoints" / sharded.name
    (folder / name).unlink()
    return folder


@pytest.mark.parametrize(
    ("lacking", "told"),
    [
        (".metadata", "found no .metadata in the folder"),
        ("meta.pt", "found no meta.pt in the folder"),
        ("__0_0.distcp", "lacks __0_0.distcp, one of its shards"),
    ],
)
def test_a_torn_folder_is_refused(workplace: Any, sharded: Path, tmp_path: Path, lacking: str, told: str) -> None:
    done = export(workplace, damaged(sharded, tmp_path, lacking), tmp_path / "model")
    assert done.returncode == 2 and told in done.stderr and len(done.stderr.splitlines()) <= 3
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", [".metadata", "meta.pt", "__0_0.distcp"])
@pytest.mark.parametrize("size", [0, 900])
def test_a_folder_with_a_file_that_was_cut_off_is_refused(
    workplace: Any, sharded: Path, tmp_path: Path, name: str, size: int
) -> None:
    shutil.copytree(sharded.parent.parent, tmp_path / "run", symlinks=True)
    folder = tmp_path / "run/checkpoints" / sharded.name
    (folder / name).write_bytes((folder / name).read_bytes()[:size])
    done = export(workplace, folder, tmp_path / "model")
    assert done.returncode == 2 and "cannot be read as a checkpoint" in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) <= 3 and not (tmp_path / "model").exists()


@pytest.mark.parametrize("size", [0, 200, 20_000])
def test_a_file_that_was_cut_off_is_refused(workplace: Any, tmp_path: Path, size: int) -> None:
    whole = workplace.run("rl") / "checkpoints/last.ckpt"
    (tmp_path / "cut.ckpt").write_bytes(whole.read_bytes()[:size])
    done = export(workplace, tmp_path / "cut.ckpt", tmp_path / "model")
    assert done.returncode == 2 and "cannot be read as a checkpoint" in done.stderr
    assert len(done.stderr.splitlines()) <= 3


def test_what_is_no_checkpoint_is_refused(workplace: Any, tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    (tmp_path / "lost.ckpt").symlink_to("step_00000099.ckpt")
    (tmp_path / "empty").mkdir()
    for name, told in {
        "other.pt": "expected state_dict and global_step in it",
        "lost.ckpt": "a link to step_00000099.ckpt which is gone",
        "empty": "found no .metadata and no meta.pt",
        "nothing": "found none at",
    }.items():
        done = export(workplace, tmp_path / name, tmp_path / "model")
        assert done.returncode == 2 and told in done.stderr, done.stderr


def test_a_checkpoint_outside_of_its_run_is_refused_and_a_link_to_one_is_not(
    workplace: Any, sharded: Path, tmp_path: Path
) -> None:
    shutil.copytree(sharded, tmp_path / "a/b/copy.ckpt")
    done = export(workplace, tmp_path / "a/b/copy.ckpt", tmp_path / "model")
    assert done.returncode == 2 and "expected the run's configuration at" in done.stderr
    (tmp_path / "link.ckpt").symlink_to(sharded)
    assert export(workplace, tmp_path / "link.ckpt", tmp_path / "model").returncode == 0


def test_weights_of_another_model_are_refused_with_the_first_that_differs(
    workplace: Any, sharded: Path, tmp_path: Path
) -> None:
    shutil.copytree(sharded.parent.parent, tmp_path / "run", symlinks=True)
    config = yaml.safe_load((workplace.run("cold") / "config.yaml").read_text())
    config["model"]["scratch"]["options"]["intermediate_size"] = 48
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config))
    done = export(workplace, tmp_path / "run/checkpoints/last.ckpt", tmp_path / "model")
    assert done.returncode == 2
    first = done.stderr.splitlines()[0]
    assert "this checkpoint of runs/cold/model does not fit the model scratch llama: policy.model." in first
    assert "is [64, 32] there and [48, 32] here" in first


def test_an_export_that_is_cut_off_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    def cut(folder: Path) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / "model") as draft:
        cut(draft)
    assert not (tmp_path / "model").exists()
    with written_whole(tmp_path / "model") as draft:
        draft.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# Shards of several processes

WRITER = """
import sys, torch
from pathlib import Path
from torch.distributed.fsdp import fully_shard
from torch.distributed.checkpoint import save
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from transformers import AutoModelForCausalLM
from sdsearch_lightning.__main__ import end_process

torch.distributed.init_process_group("gloo")
facts = torch.load(sys.argv[1], map_location="cpu", weights_only=True)
policy = torch.nn.Module()
policy.policy = torch.nn.Module()
policy.policy.model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32)
policy.load_state_dict(facts.pop("state_dict"), strict=False)
mesh = torch.distributed.init_device_mesh("cpu", (2,))
for layer in policy.policy.model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(policy.policy, mesh=mesh)
weights = get_model_state_dict(policy)
assert any(hasattr(w, "placements") for w in weights.values())
save({"state_dict": weights}, checkpoint_id=sys.argv[3])
if torch.distributed.get_rank() == 0:
    facts.pop("optimizer_states")
    torch.save(facts, Path(sys.argv[3]) / "meta.pt")
torch.distributed.barrier()
end_process(0)
"""


@pytest.mark.distributed
def test_shards_of_two_processes_become_one_model(workplace: Any, sharded: Path, tmp_path: Path) -> None:
    run = workplace.run("two_ranks")
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(workplace.run("rl") / "config.yaml", run)
    folder = run / "checkpoints/last.ckpt"
    (tmp_path / "writer.py").write_text(WRITER)
    places = [workplace.run("rl") / "checkpoints/last.ckpt", workplace.run("cold") / "model", folder]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(tmp_path / "writer.py"), *map(str, places)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert {"__0_0.distcp", "__1_0.distcp"} <= {path.name for path in folder.iterdir()}
    assert export(workplace, folder, tmp_path / "model").returncode == 0
    assert torch.equal(exported_logits(tmp_path / "model"), exported_logits(workplace.run("rl") / "model"))
