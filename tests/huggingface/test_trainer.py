"""transformers' Trainer with a changed model."""

import pytest
import torch

pytest.importorskip("transformers")

from memory_efficient_attention_pytorch.huggingface import make_memory_efficient
from memory_efficient_attention_pytorch.huggingface.logits import LazyLogits

from .models import small_model, tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.usefixtures("chunks_of_a_few_tokens"),
]


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_a_trainer_evaluates_and_predicts_as_before(precision, tmp_path, monkeypatch):
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": row, "labels": row} for row in tokens(batch=5, length=12)]
    made, materialize = [], LazyLogits.materialize
    monkeypatch.setattr(LazyLogits, "materialize", lambda logits: [made.append(1), materialize(logits)][1])

    def found(model, **options):
        arguments = TrainingArguments(
            output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=2,
            **precision,
        )  # fmt: skip
        trainer = Trainer(model, arguments, eval_dataset=data, **options)
        loss = trainer.evaluate()["eval_loss"]
        return (loss, trainer.predict(data).predictions) if options else loss

    def metrics(prediction):
        return {"sum": float(prediction.predictions.sum())}

    expected = found(small_model("Llama", torch.float32), compute_metrics=metrics)
    model = small_model("Llama", torch.float32)  # accelerate replaces a model's forward, and so its loss is left
    make_memory_efficient(model)
    assert found(model) == pytest.approx(expected[0], rel=1e-2 if precision else 1e-5)
    assert not made
    tolerance = 2e-2 if precision else 2e-5
    loss, predictions = found(model, compute_metrics=metrics)
    assert loss == pytest.approx(expected[0], rel=tolerance)
    assert made
    assert predictions.shape == (5, 12, 61)
    torch.testing.assert_close(*map(torch.from_numpy, (predictions, expected[1])), rtol=tolerance, atol=tolerance)


def test_a_trainer_accumulates_the_same_gradients(tmp_path):
    from transformers import Trainer, TrainingArguments

    def trained(change):
        model = small_model("Llama", torch.float32)
        if change:
            make_memory_efficient(model)
        data = [{"input_ids": row, "labels": row} for row in tokens(batch=8, length=12)]
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            learning_rate=1e-2, report_to=[], use_cpu=True, save_strategy="no", optim="sgd", disable_tqdm=True,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=data).train()
        return model.state_dict()

    expected, found = trained(False), trained(True)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-5, atol=2e-5)
