"""docs/migration.md: every line of the peers' scripts has its row, and every key of ours that it names is one."""

from __future__ import annotations

import re

import pytest

from helpers.paths import ROOT
from sdsearch_lightning.callbacks import HindsightConstruction, RolloutGrouping
from sdsearch_lightning.datamodules import SearchDataModule
from sdsearch_lightning.module import SDSearchModule
from sdsearch_lightning.runs.folder import RunOptions

PAGE = (ROOT / "docs/migration.md").read_text()
TRAIN_GRPO = """
data.train_files val_files train_data_num train_batch_size val_batch_size max_prompt_length max_response_length
max_start_length max_obs_length shuffle_train_dataloader adv_estimator enable_gradient_checkpointing use_remove_padding
optim.lr lr_warmup_steps_ratio use_kl_loss ppo_mini_batch_size ppo_micro_batch_size offload log_prob_micro_batch_size
rollout.name gpu_memory_utilization kl_loss_coef kl_loss_type no_think_rl n_agent temperature state_masking
trainer.logger val_before_train n_gpus_per_node nnodes save_freq test_freq experiment_name total_epochs
total_training_steps default_local_dir max_turns retriever.url retriever.topk
"""
AUTOREFINE = "reward_style refine_lambda refine_score format_score filter_groups"
BUILDER = """
--retriever_name --retrieval_method --model_path --retriever_model --corpus_path --index_path --topk --batch_size
--save_dir --faiss_type --use_fp16 --max_length --pooling_method --save_embedding --embedding_path --faiss_gpu
"""
CLASSES = {"data": SearchDataModule, "model": SDSearchModule, "rollout": RolloutGrouping, "run": RunOptions}
CLASSES |= {"hindsight": HindsightConstruction}


@pytest.mark.parametrize("line", [*TRAIN_GRPO.split(), *AUTOREFINE.split(), *BUILDER.split()])
def test_each_line_of_their_scripts_is_answered(line: str) -> None:
    rows = re.findall(r"^\|(.*?)\|.*\| (?:unchanged|changed|missing) \|$", PAGE, re.MULTILINE)
    assert any(line in theirs for theirs in rows), f"no row of the page begins with {line}"


def keys(text: str) -> set[tuple[str, str]]:
    """Keys of ours in the second column of the tables."""
    ours = [row.split("|")[2] for row in re.findall(r"^\|.*\|$", text, re.MULTILINE)]
    return set(re.findall(rf"`({'|'.join(CLASSES)})\.(\w+)", "".join(ours)))


def test_our_keys_are_keys() -> None:
    found = keys(PAGE)
    assert len(found) > 25
    for group, name in found:
        known = {name for base in CLASSES[group].__mro__ for name in getattr(base.__init__, "__annotations__", {})}
        assert name in known, f"{group}.{name}"


def test_this_test_can_fail() -> None:
    assert keys("| a | `rollout.group_sise: 5`, `model.num_updates` | x |") == {
        ("rollout", "group_sise"),
        ("model", "num_updates"),
    }
    assert "group_sise" not in RolloutGrouping.__init__.__annotations__
