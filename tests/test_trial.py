import copy
import json
import random

import numpy as np
import pytest
import torch
from helpers.tuned import TEST, TRAIN, data, settings, small, task, with_norm
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import fastplastic
from fastplastic.errors import FileError, InputError
from fastplastic.trials import Arm, Results, run_trial, with_controls

DOSE = "dormant@0.2:zero"
pytestmark = pytest.mark.usefixtures("traced_once")


def compared(arms, seeds=(0, 1), path=None, given=None, **values):
    return run_trial(given or task(), with_controls(arms), seeds, settings(**values), results=path)


def test_every_arm_and_seed_has_a_curve():
    trial = compared([DOSE, "swr@0.1", "remove", "shrink-perturb", "fresh"])
    names = [arm.name for arm in trial.arms]
    assert names == [
        "baseline", DOSE, f"random:{DOSE}", f"remove:{DOSE}", "swr@0.1", "random:swr@0.1",
        "remove:swr@0.1", "shrink-perturb", "fresh",
    ]  # fmt: skip
    assert len(trial.runs) == 18 and all(arm.seeds == (0, 1) for arm in trial.arms)
    for run in trial.runs:
        assert run.steps == [0, 4, 8, 12] and run.total == 12
        assert len(run.accuracy) == 4 and len(run.train_loss) == 3
    assert trial["baseline"].cost is None and trial[DOSE].cost > 0
    assert trial[DOSE].count == trial[f"random:{DOSE}"].count == 5


def test_seeds_are_paired_and_differ():
    """The baseline twice is the same bits; another seed is another order of batches."""
    once, again = (compared([DOSE]) for _ in range(2))
    assert [run.accuracy for run in once.runs] == [run.accuracy for run in again.runs]
    assert [run.train_loss for run in once.runs] == [run.train_loss for run in again.runs]
    first, second = (run for run in once.runs if run.arm == "baseline")
    assert first.train_loss != second.train_loss


def test_a_shuffled_loader_alone_gives_the_same_trial_again():
    runs = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        batches = data()
        trial = fastplastic.trial(
            small(), batches.train, batches.test, arms=[DOSE], seeds=1,
            settings=settings(profile_images=32),
        )  # fmt: skip
        runs.append([(run.train_loss, run.layers) for run in trial.runs])
    assert runs[0] == runs[1]


def test_a_dose_of_units_without_effect_trains_as_the_baseline():
    """Units that are dead and stay so: what is left sees the same batches in the same order."""
    model = small()
    with torch.no_grad():
        model[0].bias[:4] = -100.0
    given = task(model=lambda seed: copy.deepcopy(model))
    runs = compared(["remove:dead@0.15:zero"], given=given).runs
    base, removed = ([run.train_loss for run in runs if run.arm == name] for name in (
        "baseline", "remove:dead@0.15:zero"))  # fmt: skip
    np.testing.assert_allclose(base, removed, rtol=1e-5)


def test_the_baseline_is_plain_training():
    """The same as timm's optimizer in the plainest loop, with nothing of ours around."""
    import timm.optim

    from fastplastic.trials import fit_head
    from fastplastic.trials.loop import seed_all

    model, batches = small(), data()
    fit_head(model, batches.plain)
    optimizer = timm.optim.create_optimizer_v2(model, "sgd", lr=0.01, weight_decay=0.01)
    for epoch in range(2):
        seed_all(batches.train, 0, epoch)
        for x, y in batches.train:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    with torch.no_grad():
        accuracy = float((model(TEST.tensors[0]).argmax(1) == TEST.tensors[1]).float().mean())
    (run,) = run_trial(task(), [Arm("baseline")], [0], settings(opt="sgd", sched="none")).runs
    assert run.accuracy[-1] == pytest.approx(accuracy)


def test_the_order_of_batches_does_not_depend_on_the_evaluations():
    few, many = (
        run_trial(task(), [Arm("baseline")], [0], settings(evals=n)).runs[0] for n in (1, 12)
    )
    assert few.accuracy[-1] == many.accuracy[-1] and few.loss[-1] == many.loss[-1]


def test_the_test_images_are_never_used_for_a_choice():
    """With other test images every arm is made and trained as before."""
    other = data()
    shifted = DataLoader([(x + 5, y) for x, y in TEST], 60)
    given = task(data=lambda seed: type(other)(other.train, shifted, other.plain))
    plain, moved = compared([DOSE]), compared([DOSE], given=given)
    assert [run.train_loss for run in plain.runs] == [run.train_loss for run in moved.runs]
    assert [run.layers for run in plain.runs] == [run.layers for run in moved.runs]
    assert [run.accuracy for run in plain.runs] != [run.accuracy for run in moved.runs]


def test_arms_take_turns_at_being_the_first(tmp_path):
    path = tmp_path / "trial.jsonl"
    compared([DOSE], seeds=(0, 1, 2, 3), path=path)
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert [(line["seed"], line["arm"]) for line in lines][::3] == [
        (0, "baseline"), (1, DOSE), (2, f"random:{DOSE}"), (3, "baseline"),
    ]  # fmt: skip


@pytest.mark.parametrize("arm", [DOSE, "swr@0.1", "dormant@0.2:fresh"])
def test_the_random_control_has_the_same_dose_in_every_layer(arm):
    trial = compared([arm])
    for seed in (0, 1):
        ours, control = (
            next(run for run in trial.runs if (run.arm, run.seed) == (name, seed))
            for name in (trial.arms[1].name, trial.arms[2].name)
        )
        assert ours.layers == control.layers and ours.count > 0


def test_recalibrate_is_refused_where_it_does_nothing():
    arms = with_controls(["recalibrate"])
    with pytest.raises(InputError, match="arm recalibrate: the model has no BatchNorm"):
        run_trial(task(), arms, [0], settings())
    with pytest.raises(InputError, match="arm recalibrate: all arms begin so"):
        run_trial(with_norm(), arms, [0], settings())


def test_the_model_stays_as_it_is():
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = data()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    trial = fastplastic.trial(
        model, batches.train, batches.test, arms=[DOSE], seeds=1, plain=batches.plain,
        settings=settings(),
    )  # fmt: skip
    assert len(trial.runs) == 3
    assert states[:2] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(torch.get_rng_state(), states[2])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_interrupted_trial_goes_on(tmp_path):
    path = tmp_path / "trial.jsonl"
    whole = compared([DOSE])
    results = []

    def stop(state):
        results.append(state)
        if state.run is not None and state.done == 4:
            raise KeyboardInterrupt

    arguments = (task(), with_controls([DOSE]), (0, 1), settings())
    with pytest.raises(KeyboardInterrupt):
        run_trial(*arguments, results=path, progress=stop)
    assert len(Results.read(path)) == 4
    finished = []
    again = run_trial(*arguments, results=path, progress=lambda state: finished.append(state.run))
    assert len([run for run in finished if run]) == 2
    for one, other in zip(whole.arms, again.arms, strict=True):
        assert (one.curve, one.final_tests) == (other.curve, other.final_tests)
    assert results[-1].total == 6 and results[-1].left > 0


def test_more_arms_and_seeds_join_finished_ones(tmp_path):
    path = tmp_path / "trial.jsonl"
    compared([DOSE], seeds=(0,), path=path)
    states = []
    trial = run_trial(
        task(), with_controls([DOSE, "fresh"]), (0, 1), settings(), results=path,
        progress=states.append,
    )  # fmt: skip
    assert len(trial.runs) == 8
    assert [(s.done, s.total) for s in states if s.run] == [(n, 8) for n in range(4, 9)]
    states.clear()
    run_trial(task(), with_controls([DOSE]), (2,), settings(), results=path, progress=states.append)
    assert [(s.done, s.total) for s in states if s.run] == [(1, 3), (2, 3), (3, 3)]
    assert len(compared([DOSE], seeds=(1,), path=path).runs) == 3


def test_other_settings_in_the_file_are_refused(tmp_path):
    path = tmp_path / "trial.jsonl"
    compared([DOSE], seeds=(0,), path=path)
    with pytest.raises(FileError, match=r"lr is 0\.01 there, 0\.02 here"):
        compared([DOSE], seeds=(0,), path=path, lr=0.02)


def test_a_rate_that_diverges_is_reported_and_the_trial_goes_on():
    trial = compared([DOSE], opt="sgd", lr=1e30)
    assert all(arm.diverged == 2 for arm in trial.arms) and len(trial.runs) == 6
    assert "it diverged in 2 of 2 runs" in trial.verdict[0]
    run = trial.runs[0]
    assert run.diverged_at == run.steps[-1] and run.accuracy[-1] < 0.7


def test_an_arm_that_cannot_be_done_is_refused_before_any_training(tmp_path):
    path = tmp_path / "trial.jsonl"
    with pytest.raises(InputError, match=r"arm dormant@1:zero: ratio 1 asks for 28 of 28"):
        compared(["dormant@1"], path=path)
    with pytest.raises(InputError, match="arm fresh: no way to make random weights"):
        compared(["fresh"], given=task(fresh=None))
    assert Results.read(path) == []


@pytest.mark.parametrize("seeds", [0, (), (1, 1)])
def test_seeds_that_are_none(seeds):
    batches = data()
    with pytest.raises(InputError, match="expected one or more, each once"):
        fastplastic.trial(small(), batches.train, batches.test, seeds=seeds)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"lr": 0}, "lr 0: expected more than 0"),
        ({"lr": float("nan")}, "lr nan: expected more than 0"),
        ({"epochs": 0}, "epochs 0: expected more than 0"),
        ({"warmup_epochs": 2}, "warmup_epochs 2 of 2 epochs"),
        ({"smoothing": 1.0}, "smoothing 1.0: expected less than 1"),
        ({"clip_grad": 0.0}, "clip_grad 0.0: expected more than 0"),
        ({"amp_dtype": "int8"}, "amp_dtype 'int8'"),
        ({"opt": "adamx"}, r"opt 'adamx': timm does not take it .*list_optimizers"),
        ({"sched": "cosin"}, r"sched 'cosin': timm does not take it .*cosine, tanh"),
    ],
)
def test_settings_that_nothing_can_be_trained_with(values, said):
    batches = data()
    with pytest.raises(InputError, match=said):
        fastplastic.trial(small(), batches.train, batches.test, settings=settings(**values))


def test_a_loader_without_batches():
    batches = data()
    empty = DataLoader(TRAIN, 200, shuffle=True, drop_last=True)
    with pytest.raises(InputError, match="yields no batch"):
        fastplastic.trial(small(), empty, batches.test, plain=batches.plain, settings=settings())


def test_options_of_the_budget_have_an_effect():
    base = run_trial(task(), [Arm("baseline")], [0], settings()).runs[0]
    for values in (
        {"opt": "sgd"}, {"weight_decay": 0.5}, {"smoothing": 0.2}, {"clip_grad": 0.01},
        {"warmup_epochs": 1}, {"min_lr": 0.009}, {"sched": "none"}, {"amp": True},
        {"amp": True, "amp_dtype": "float16"},
    ):  # fmt: skip
        run = run_trial(task(), [Arm("baseline")], [0], settings(**values)).runs[0]
        assert run.train_loss != base.train_loss, values


def test_layer_decay_is_that_of_timm():
    import timm
    from torch.utils.data import TensorDataset

    from fastplastic.trials import train

    images = TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8))
    moved = {}
    for decay in (None, 0.1):
        torch.manual_seed(0)
        model = timm.create_model("test_vit", num_classes=8, img_size=32)
        before = model.blocks[0].mlp.fc1.weight.detach().clone()
        train(model, DataLoader(images, 4), settings(epochs=1, layer_decay=decay), seed=0)
        moved[decay] = (model.blocks[0].mlp.fc1.weight - before).abs().mean().item()
    assert 0 < moved[0.1] < 0.2 * moved[None]


def test_mixup_and_cutmix_are_those_of_timm():
    plain = run_trial(task(), [Arm("baseline")], [0], settings()).runs[0]
    mixed = run_trial(task(), [Arm("baseline")], [0], settings(mixup=0.5)).runs[0]
    again = run_trial(task(), [Arm("baseline")], [0], settings(mixup=0.5)).runs[0]
    assert mixed.train_loss == again.train_loss != plain.train_loss


def test_finetune_is_one_arm_in_place():
    model, batches = small(), data()
    tuned = fastplastic.finetune(
        model, batches.train, batches.test, arm=DOSE, plain=batches.plain, settings=settings()
    )
    (run,) = (run for run in compared([DOSE], seeds=(0,)).runs if run.arm == DOSE)
    assert tuned.run.accuracy == run.accuracy and tuned.plan.count == run.count
    assert tuned.report.count == run.count
    with torch.no_grad():
        accuracy = float((model(TEST.tensors[0]).argmax(1) == TEST.tensors[1]).float().mean())
    assert accuracy == pytest.approx(run.accuracy[-1])
    assert tuned.before.fingerprint == tuned.after.fingerprint


def test_finetune_without_reinit_is_the_baseline_and_a_plan_is_taken():
    batches = data()
    arguments = {"plain": batches.plain, "settings": settings()}
    plain = fastplastic.finetune(small(), batches.train, batches.test, arm="baseline", **arguments)
    (run,) = run_trial(task(), [Arm("baseline")], [0], settings()).runs
    assert plain.run.accuracy == run.accuracy and plain.plan is None and plain.report is None
    profile = fastplastic.profile(small(), list(batches.plain))
    plan = fastplastic.plan(profile, criterion="contribution", ratio=0.1)
    tuned = fastplastic.finetune(
        small(), batches.train, batches.test, arm=DOSE, plan=plan, **arguments
    )
    assert tuned.plan is plan
    with pytest.raises(InputError, match="expected a dose or baseline"):
        fastplastic.finetune(small(), batches.train, batches.test, arm="fresh", **arguments)


def test_a_run_whose_weights_cannot_be_kept_is_kept_all_the_same(tmp_path):
    def full(run, model):
        raise FileError("no room")

    file = tmp_path / "trial.jsonl"
    with pytest.raises(FileError, match="no room"):
        run_trial(task(), with_controls([DOSE]), (0,), settings(), results=file, keep=full)
    assert [(run.arm, run.seed) for run in Results.read(file)] == [("baseline", 0)]
