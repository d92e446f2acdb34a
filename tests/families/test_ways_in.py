"""The ways into training that docs/training.md begins with: its code, as it stands there."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support import ROOT
from tests.support.gradients import real_tokens
from tests.support.quantised import PROJECTIONS

SECTION = (ROOT / "docs" / "training.md").read_text().split("\n## ")[1]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the shipped models and some texts, which is the current one."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "texts").mkdir()
    for number in range(3):
        (tmp_path / "texts" / f"{number}.txt").write_text("def double(x):\n    return 2 * x\n" * (number + 2))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(title: str) -> dict[str, Any]:
    """Run the code of a part of the section."""
    (code,) = re.findall(r"```python\n(.*?)```", SECTION.split(f"\n### {title}\n")[1].split("\n### ")[0], re.DOTALL)
    names: dict[str, Any] = {}
    torch.manual_seed(0)  # for what is drawn before a trainer sets its own seed
    exec(compile(code, "docs/training.md", "exec"), names)
    return names


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model.cpu().eval()(input_ids=ids[None]).logits[0]
    return found


def served(folder: str) -> Any:
    """The model that a server loads."""
    assert Path(folder, "tokenizer.json").exists()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_there_are_three() -> None:
    assert SECTION.startswith("Three ways in") and SECTION.count("\n### ") == 3


def test_trainer(workplace: Path, fox_tiny: Path) -> None:
    trainer, ids = run("transformers' Trainer")["trainer"], real_tokens(fox_tiny, 50)
    assert trainer.state.global_step == 1
    model = served("runs/tuned/model")
    assert torch.equal(logits(model, ids), logits(trainer.model, ids))
    first = AutoModelForCausalLM.from_pretrained(fox_tiny, dtype=torch.float32)
    assert not torch.equal(logits(model, ids), logits(first, ids))


def test_the_adapters_that_vllm_serves_are_of_all_projections(fox_tiny: Path) -> None:
    """And of nothing else."""
    peft = pytest.importorskip("peft", reason="PEFT, of the extra train, is not installed")
    (targets,) = re.findall(r"`target_modules=(\[.*?\])`", SECTION)
    model: Any = AutoModelForCausalLM.from_pretrained(fox_tiny)
    projections = {name for name in model.state_dict() if PROJECTIONS.fullmatch(name)}
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=ast.literal_eval(targets)))
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert {f"{name.removeprefix('base_model.model.')}.weight" for name in adapted} == projections


def test_trl_with_lora(workplace: Path, fox_tiny: Path) -> None:
    """All linear layers are adapted, and the merged weights compute what the adapter does."""
    pytest.importorskip("trl", reason="TRL, of the extra train, is not installed")
    peft = pytest.importorskip("peft", reason="PEFT, of the extra train, is not installed")
    trainer, ids = run("TRL with LoRA")["trainer"], real_tokens(fox_tiny, 50)
    # Three texts of less than 8,192 tokens are packed into one row.
    assert trainer.state.global_step == 3 and len(trainer.train_dataset) == 1
    first: Any = AutoModelForCausalLM.from_pretrained(fox_tiny, dtype=torch.float32)
    linear = {name for name, one in first.named_modules() if type(one) is torch.nn.Linear and name != "lm_head"}
    before = logits(first, ids)
    adapted = peft.PeftModel.from_pretrained(first, "runs/lora/adapter")
    assert linear == {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
        for name, _ in adapted.named_modules()
        if name.endswith(".lora_A.default")
    }
    want, found = logits(adapted, ids), logits(served("runs/lora/model"), ids)
    changed, apart = (want - before).abs().max(), (found - want).abs().max()
    print(changed, apart)
    # float32's roundoff on logits of at most some tens, and what three steps have changed.
    assert apart < 1e-4 and changed > 100 * apart
