"""The how-to runs as it is written: a LoRA trained by Trainer on a model made long, in small."""

import runpy
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "finetune_huggingface.py"


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_lora_is_trained_and_saved(tmp_path, capsys):
    main = runpy.run_path(str(EXAMPLE))["main"]
    trainer = main(["--tokens", "300", "--steps", "8", "--output", str(tmp_path / "adapter")])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.2
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    printed = capsys.readouterr().out
    for part in ("attention: in tiles", "2 MLPs: in chunks", "loss: without logits", "layers: checkpointed"):
        assert f"changed  {part}" in printed
