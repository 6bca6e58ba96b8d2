"""The callback for the Trainer of transformers, on tiny models of its own."""

import copy
from pathlib import Path

import peft
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from fastplastic.errors import FileError, InputError
from fastplastic.integrations.transformers import PlasticityCallback

# Steps of the optimizer in a run.
STEPS = 12
METHODS = {
    "redo": {"every": 4, "threshold": 0.6},
    "cbp": {"rate": 0.02, "maturity": 2},
    "swr": {"every": 4, "threshold": 0.05},
}


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=24, hidden_act="relu", max_position_embeddings=16,
        )
    )  # fmt: skip


def samples() -> list[dict[str, Tensor]]:
    draws = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 32, (64, 8), generator=draws)
    return [
        {"input_ids": t, "attention_mask": torch.ones(8, dtype=torch.long), "labels": t[0] % 2}
        for t in tokens
    ]


def trainer_of(folder: Path, model: nn.Module, **options) -> Trainer:
    given = {
        "max_steps": STEPS, "per_device_train_batch_size": 8, "learning_rate": 1e-2,
        "logging_steps": 3, "report_to": [], "disable_tqdm": True, "save_strategy": "no",
        "use_cpu": True, "seed": 4, "dataloader_pin_memory": False,
    }  # fmt: skip
    arguments = TrainingArguments(str(folder), **given | options)
    return Trainer(model, arguments, train_dataset=samples(), eval_dataset=samples())


def state_of(trainer: Trainer) -> list[Tensor]:
    """Return every parameter and every tensor of the optimizer's state."""
    found = [p.detach() for p in trainer.model.parameters()]
    states = trainer.optimizer.state
    return found + [v for p in trainer.model.parameters() for v in states[p].values()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def logged(trainer: Trainer, name: str) -> dict[int, float]:
    return {row["step"]: row[name] for row in trainer.state.log_history if name in row}


def test_profiles_change_nothing_and_are_in_the_log(tmp_path: Path) -> None:
    plain = trainer_of(tmp_path, bert())
    plain.train()
    watched = trainer_of(tmp_path, bert())
    callback = PlasticityCallback(watched, freq=4, layers=True, start_step=4)
    watched.add_callback(callback)
    watched.train()
    assert same(state_of(watched), state_of(plain))
    layer = "plasticity/dormant/bert.encoder.layer.0.intermediate.dense"
    assert list(logged(watched, layer)) == [8, 12]
    shares = logged(watched, "plasticity/dormant")
    assert list(shares) == [8, 12] and all(0 <= share <= 1 for share in shares.values())
    # What the Trainer logs by itself is all there.
    assert logged(watched, "loss") == logged(plain, "loss") and len(logged(plain, "loss")) == 4
    assert callback.profile.totals.units
    assert not watched.optimizer.optimizer._optimizer_step_post_hooks


def test_figures_reach_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The Trainer asks the environment where to write.
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = trainer_of(tmp_path, bert(), report_to=["tensorboard"], max_steps=4)
    trainer.add_callback(PlasticityCallback(trainer, "random", ratio=0.2, every=2, freq=4))
    trainer.train()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    found = events.Scalars("train/plasticity/dead")
    assert [event.step for event in found] == [4]
    assert events.Scalars("train/plasticity/reset")[0].value > 0


@pytest.mark.parametrize("name", METHODS)
def test_a_run_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path: Path, name: str) -> None:
    found = []
    for folder, resumes in ((tmp_path, False), (tmp_path, True)):
        trainer = trainer_of(folder, bert(), save_strategy="steps", save_steps=7)
        callback = PlasticityCallback(trainer, name, freq=5, seed=3, **METHODS[name])
        trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-7") if resumes else None)
        log = [reset.to_dict() for reset in callback.recycler.log]
        assert any(reset["step"] > 7 for reset in log) and any(r["step"] <= 7 for r in log)
        found.append((state_of(trainer), log, logged(trainer, "plasticity/reset")))
    (values, log, numbers), (values_again, log_again, numbers_again) = found
    assert same(values, values_again) and log == log_again
    assert numbers == numbers_again and sum(numbers.values()) == sum(
        sum(reset["counts"].values()) for reset in log
    )


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path, bert(), gradient_accumulation_steps=2, max_steps=4, per_device_train_batch_size=4
    )
    callback = PlasticityCallback(trainer, "random", ratio=0.2, every=2, freq=3)
    trainer.add_callback(callback)
    trainer.train()
    assert [reset.step for reset in callback.recycler.log] == [2, 4]
    assert callback.profile.batches == 2 and callback.profile.samples == 8
    # The profile of step 3 tells of the reset in step 2, the end of that in step 4.
    counts = [reset.count for reset in callback.recycler.log]
    assert logged(trainer, "plasticity/reset") == {3: counts[0], 4: counts[1]}


def test_in_bfloat16_with_evaluation_in_between(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path, bert(), bf16=True, max_steps=4, eval_strategy="steps", eval_steps=1
    )
    callback = PlasticityCallback(trainer, "redo", every=2, threshold=0.6, freq=4)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.recycler.log and callback.profile.samples == 8
    assert any(layer.hidden.any() for layer in callback.profile)


def test_a_compiled_model_is_seen_and_trained_to_the_same_bits(tmp_path: Path) -> None:
    found = []
    for compiles in (False, True):
        backend = {"torch_compile": True, "torch_compile_backend": "eager"} if compiles else {}
        trainer = trainer_of(tmp_path, bert(), max_steps=6, **backend)
        callback = PlasticityCallback(trainer, "redo", every=3, threshold=0.6, freq=4)
        trainer.add_callback(callback)
        trainer.train()
        assert len(callback.recycler.log) == 2 and callback.profile.samples == 8
        found.append(state_of(trainer))
    assert same(*found)


# peft asks transformers 5 for a property under the name that it had before.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_frozen_layers_of_lora_are_measured_and_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16,
        )
    )  # fmt: skip
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules=["up_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trainer = trainer_of(tmp_path, model, max_steps=4)
    trainer.train_dataset = [s | {"labels": s["input_ids"]} for s in samples()]
    callback = PlasticityCallback(trainer, "random", ratio=0.5, every=2, freq=4)
    trainer.add_callback(callback)
    trainer.train()
    written = {name for reset in callback.recycler.log for name in reset.counts}
    assert written and all(".lora_A." in name for name in written)
    now = dict(model.named_parameters())
    assert frozen and all(torch.equal(now[name], value) for name, value in frozen.items())
    seen = [layer.name for layer in callback.profile if "base_layer" in layer.name]
    assert len(seen) == 2


def test_a_checkpoint_without_a_state(tmp_path: Path) -> None:
    trainer_of(tmp_path, bert(), save_strategy="steps", save_steps=6, max_steps=6).train()
    again = trainer_of(tmp_path, bert(), max_steps=9)
    callback = PlasticityCallback(again, "random", ratio=0.2, every=4, freq=None)
    again.add_callback(callback)
    with pytest.warns(UserWarning, match="step 6 has no plasticity.pt in .* call load"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert [reset.step for reset in callback.recycler.log] == [8]
    with pytest.raises(FileError, match=r"plasticity.pt: cannot be read .*, expected a file of Pl"):
        callback.load(tmp_path / "checkpoint-6")


def test_a_state_of_another_place_and_of_another_training(tmp_path: Path) -> None:
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4}
    method = {"method": "random", "ratio": 0.2, "every": 3}

    def resumed(folder: Path, elsewhere: Path | None) -> PlasticityCallback:
        trainer = trainer_of(folder, bert(), **options)
        callback = PlasticityCallback(trainer, **method)
        trainer.add_callback(callback)
        if elsewhere is not None:
            callback.load(elsewhere)
        trainer.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-4"))
        return callback

    for name, rate in (("first", 1e-2), ("second", 1e-3)):
        trainer = trainer_of(tmp_path / name, bert(), learning_rate=rate, **options)
        trainer.add_callback(PlasticityCallback(trainer, **method))
        trainer.train()
    callback = resumed(tmp_path / "third", tmp_path / "first" / "checkpoint-4")
    assert [reset.step for reset in callback.recycler.log] == [3, 6]
    # The folder has a checkpoint of this number, but it is not the one that is gone on from.
    with pytest.warns(UserWarning, match="so the plasticity callback begins anew with this step"):
        callback = resumed(tmp_path / "second", None)
    assert [reset.step for reset in callback.recycler.log] == [6]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": "redoo"}, "method 'redoo' is unknown, .*did you mean 'redo'"),
        ({"method": "redo", "evry": 3}, "option 'evry' is unknown, .*did you mean 'every'"),
        ({"every": 3}, "every given without a method, expected one such as 'redo'"),
        ({"freq": None}, "neither a method nor a freq is given: there is nothing to do"),
        ({"freq": 0}, "freq is 0, expected an integer of at least 1, or None"),
        ({"start_step": -1}, "start_step is -1, expected an integer of at least 0"),
    ],
)
def test_what_cannot_be_done(tmp_path: Path, options: dict, text: str) -> None:
    with pytest.raises(InputError, match=text):
        PlasticityCallback(trainer_of(tmp_path, bert()), **options)


def test_data_that_can_only_be_run_through(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from samples()

    trainer = trainer_of(tmp_path, bert(), max_steps=2)
    trainer.train_dataset = Stream()
    callback = PlasticityCallback(trainer, freq=2)
    trainer.add_callback(callback)
    with pytest.raises(InputError, match=r"is a Stream that can only be run through, .*give exam"):
        trainer.train()
    trainer.remove_callback(callback)
    callback = PlasticityCallback(
        trainer, freq=2, example_inputs={"input_ids": samples()[0]["input_ids"][None]}
    )
    trainer.add_callback(callback)
    trainer.train()
    assert callback.profile.samples == 8


def test_other_processes_than_the_first_reinitialise_and_log_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "is_world_process_zero", lambda self: False)
    trainer = trainer_of(tmp_path, bert(), max_steps=4)
    callback = PlasticityCallback(trainer, "random", ratio=0.2, every=2, freq=2)
    trainer.add_callback(callback)
    trainer.train()
    assert len(callback.recycler.log) == 2 and callback.profile is None
    assert not any("plasticity/reset" in row for row in trainer.state.log_history)


def test_a_model_in_several_copies(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, bert())
    callback = PlasticityCallback(trainer, "redo")
    arguments = copy.copy(trainer.args)
    arguments._n_gpu = 2
    with pytest.raises(InputError, match=r"FSDP, DeepSpeed or DataParallel.*expected one whole mo"):
        callback.on_train_begin(arguments, trainer.state, trainer.control, model=trainer.model)


def test_a_callback_without_the_trainer() -> None:
    with pytest.raises(InputError, match="the first argument is 'redo', expected the Trainer"):
        PlasticityCallback("redo")
