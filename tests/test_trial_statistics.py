import math

import numpy as np
import pytest
from scipy import stats

from fastplastic.trials import Arm, TrialRun, outcome_of, parse_arm, with_controls
from fastplastic.trials.outcome import area_of
from fastplastic.trials.statistics import compare, estimate, holm

DOSE = "dormant@0.3:zero"


def test_interval_and_test_are_those_of_scipy():
    generator = np.random.default_rng(0)
    ours, theirs = generator.normal(0.8, 0.02, 6), generator.normal(0.78, 0.02, 6)
    found = estimate(ours)
    low, high = stats.t.interval(0.95, 5, ours.mean(), stats.sem(ours))
    assert (found.mean, found.low, found.high) == pytest.approx((ours.mean(), low, high))
    test = compare("baseline", ours, theirs)
    wanted = stats.ttest_rel(ours, theirs)
    assert test.p == pytest.approx(wanted.pvalue)
    interval = wanted.confidence_interval()
    assert (test.difference.low, test.difference.high) == pytest.approx(
        (interval.low, interval.high)
    )


def test_the_detectable_effect_is_seen_in_four_of_five_trials():
    generator = np.random.default_rng(1)
    n, seen, rounds = 8, 0, 4000
    spread = 0.02
    factor = stats.t.ppf(0.975, n - 1) + stats.t.ppf(0.8, n - 1)
    effect = factor * spread / math.sqrt(n)
    for _ in range(rounds):
        differences = generator.normal(effect, spread, n)
        seen += stats.ttest_1samp(differences, 0).pvalue < 0.05
    assert 0.77 < seen / rounds < 0.86
    differences = generator.normal(0, spread, n)
    test = compare("x", differences, np.zeros(n))
    assert test.detectable == pytest.approx(factor * differences.std(ddof=1) / math.sqrt(n))


def test_one_seed_has_no_interval_and_no_test():
    test = compare("baseline", [0.8], [0.7])
    assert (test.p, test.detectable, test.difference.low, test.shown) == (None, None, None, 0)


def test_differences_that_are_all_the_same_have_no_test():
    assert compare("baseline", [0.5, 0.75], [0.25, 0.5]).p is None
    assert compare("baseline", [0.5, 0.75], [0.5, 0.75]).p is None


def test_holm():
    # Worked by hand: 3 x 0.01, 2 x 0.02, 1 x 0.04 and never less than the one before.
    assert holm({"a": 0.02, "b": 0.01, "c": 0.04}) == pytest.approx(
        {"a": 0.04, "b": 0.03, "c": 0.04}
    )
    assert holm({"a": 0.4, "b": 0.6, "c": None}) == {"a": 0.8, "b": 0.8, "c": None}
    assert holm({}) == {}


def run(arm, seed, accuracy, steps=(0, 10, 20), **values):
    return TrialRun(
        arm=arm, seed=seed, total=20, steps=list(steps), accuracy=list(accuracy),
        loss=[1.0] * len(accuracy), train_loss=[1.0] * (len(accuracy) - 1), **values,
    )  # fmt: skip


def arms(*texts):
    return with_controls(texts)


def made(gain, control_gain=0.0, seeds=6, extra=()):
    """Return the outcome of runs in which one arm gains so much, with some noise."""
    generator = np.random.default_rng(3)
    runs = []
    for seed in range(seeds):
        base = 0.7 + generator.normal(0, 0.01)
        for name, more in (("baseline", 0), (DOSE, gain), (f"random:{DOSE}", control_gain)):
            end = base + more + generator.normal(0, 0.005)
            runs.append(run(name, seed, [0.1, end - 0.1, end]))
        for name, more in extra:
            runs.append(run(name, seed, [0.1, 0.2, base + more + generator.normal(0, 0.005)]))
    texts = [DOSE, *(name for name, _ in extra)]
    return outcome_of(
        arms(*dict.fromkeys(t.replace(f"remove:{DOSE}", "remove") for t in texts)), runs, {}
    )


def test_a_gain_is_shown():
    trial = made(0.05)
    assert [test.shown for test in trial[DOSE].final_tests] == [1, 1]
    (text,) = trial.verdict
    assert text.startswith(f"{DOSE}: better than the baseline by +") and "6 seeds" in text
    assert "better than as many at random" in text


def test_no_gain_is_not_shown_and_its_size_is_bounded():
    (text,) = made(0.0).verdict
    assert "no difference to the baseline shown" in text
    assert "points would hardly have been seen" in text


def test_a_loss_is_shown():
    assert "worse than the baseline by -" in made(-0.05).verdict[0]


def test_a_gain_that_random_units_have_too_is_not_that_of_the_choice():
    text = made(0.05, 0.05).verdict[0]
    assert "better than the baseline" in text
    assert "whether the choice does better than as many at random is not shown" in text
    assert "as many at random do better" in made(0.05, 0.1).verdict[0]


def test_simpler_ways_are_named_where_they_do_as_well():
    extra = [("recalibrate", 0.08), (f"remove:{DOSE}", 0.08)]
    text = made(0.05, extra=extra).verdict[0]
    assert text.endswith("; removing the same and recalibrating alone did as well")


def test_one_seed_says_nothing():
    assert "with one seed, which says nothing" in made(0.05, seeds=1).verdict[0]


def test_differences_that_are_all_the_same_are_not_shown():
    ends = {"baseline": 0.5, DOSE: 0.75, f"random:{DOSE}": 0.5}
    runs = [run(name, seed, [0, 0, end]) for name, end in ends.items() for seed in (0, 1)]
    (text,) = outcome_of(arms(DOSE), runs, {}).verdict
    assert "no difference to the baseline shown (the same +25.0 points in all 2 seeds" in text


def test_more_controls_do_not_weaken_the_answer():
    plain = made(0.05)[DOSE].final_tests[0]
    more = made(0.05, extra=[("recalibrate", 0.0), ("fresh", 0.0)])[DOSE].final_tests[0]
    assert more.corrected == more.p and plain.corrected == plain.p


def test_two_questions_are_corrected():
    texts = ["dormant@0.3", "swr@0.1"]
    generator = np.random.default_rng(5)
    runs = [
        run(arm.name, seed, [0.1, 0.2, 0.5 + generator.normal(0, 0.01)])
        for arm in arms(*texts)
        for seed in range(5)
    ]
    tests = [outcome_of(arms(*texts), runs, {})[name].final_tests[0] for name in (DOSE, "swr@0.1")]
    wanted = holm({"a": tests[0].p, "b": tests[1].p})
    assert [test.corrected for test in tests] == [wanted["a"], wanted["b"]]
    assert tests[0].corrected > tests[0].p or tests[1].corrected > tests[1].p


def test_area_and_steps_to_the_baseline():
    runs = [run("baseline", 0, [0.0, 0.4, 0.6]), run("fresh", 0, [0.2, 0.8, 0.5])]
    trial = outcome_of(arms("fresh"), runs, {})
    # Trapezoids: (0 + .4) / 2 * .5 + (.4 + .6) / 2 * .5, and so on.
    assert trial["baseline"].area.mean == pytest.approx(0.35)
    assert trial["fresh"].area.mean == pytest.approx(0.25 + 0.325)
    # Two thirds of the way from 0.2 to 0.8, which is at half of the updates.
    assert trial["fresh"].steps_to_baseline == pytest.approx(1 / 3)
    assert trial["baseline"].steps_to_baseline == 1.0
    assert trial["fresh"].best.mean == 0.8


def test_an_arm_that_never_gets_there():
    runs = [run("baseline", 0, [0.0, 0.4, 0.6]), run("fresh", 0, [0.2, 0.3, 0.5])]
    fresh = outcome_of(arms("fresh"), runs, {})["fresh"]
    assert fresh.steps_to_baseline is None and fresh.reached == 0


def test_a_run_that_diverged_goes_on_with_its_last_accuracy():
    broken = run("fresh", 0, [0.5, 0.1], steps=(0, 10), diverged_at=10)
    whole = run("fresh", 1, [0.5, 0.7, 0.9])
    baselines = [run("baseline", seed, [0.5, 0.6, 0.7]) for seed in (0, 1)]
    trial = outcome_of(arms("fresh"), [broken, whole, *baselines], {})
    assert area_of(broken) == pytest.approx(0.2)
    assert trial["fresh"].curve == pytest.approx((0.5, 0.4, 0.5)) and trial["fresh"].diverged == 1
    assert trial["fresh"].steps == (0, 10, 20)


def test_the_arm_is_chosen_by_validation_and_never_a_diverged_one():
    runs = [
        run("baseline", 0, [0, 0, 0.5], validation=0.6),
        run("fresh", 0, [0, 0, 0.9], validation=0.6),
        run("recalibrate", 0, [0, 0, 0.4], validation=0.7),
        run("shrink-perturb", 0, [0, 0, 0.4], validation=0.9, diverged_at=20),
    ]
    given = arms("fresh", "recalibrate", "shrink-perturb")
    assert outcome_of(given, runs, {}).chosen == "recalibrate"
    assert outcome_of(given, runs[:2], {}).chosen == "baseline"
    assert outcome_of([Arm("baseline")], [run("baseline", 0, [0, 0, 0.5])], {}).chosen is None


def test_only_seeds_that_both_have_are_compared():
    runs = [run("baseline", seed, [0, 0, 0.5]) for seed in (0, 1)]
    runs += [run("fresh", seed, [0, 0, 0.6 + seed / 10]) for seed in (0, 1, 2)]
    (test,) = outcome_of([Arm("baseline"), parse_arm("fresh")], runs, {})["fresh"].final_tests
    assert test.difference.n == 2 and test.difference.mean == pytest.approx(0.15)


def test_the_best_point_and_the_updates_that_are_saved_are_tested_in_pairs():
    runs = []
    for seed, more in enumerate([0.0, 0.02, 0.05, 0.03]):
        runs.append(run("baseline", seed, [0.0, 0.4, 0.6]))
        runs.append(run("fresh", seed, [0.0, 0.8 + more, 0.6]))
    trial = outcome_of(arms("fresh"), runs, {})
    best, saved = trial["fresh"].best_tests[0], trial["fresh"].saved_tests[0]
    assert best.difference.mean == pytest.approx(0.225) and best.shown == 1
    # On the straight line from 0 to 0.8 + more at half of the updates, 0.6 is reached early.
    expected = np.mean([1 - 0.5 * 0.6 / (0.8 + more) for more in [0.0, 0.02, 0.05, 0.03]])
    assert trial["fresh"].saved.mean == pytest.approx(expected)
    assert saved.difference.mean == pytest.approx(expected) and saved.shown == 1
    assert trial["baseline"].saved.mean == 0.0


def test_runs_that_never_get_there_save_nothing():
    runs = [run("baseline", seed, [0.0, 0.6, 0.6]) for seed in (0, 1, 2)]
    runs += [run("fresh", seed, [0.2, 0.3, 0.5]) for seed in (0, 1)]
    runs += [run("fresh", 7, [0.9, 0.9, 0.9])]
    fresh = outcome_of(arms("fresh"), runs, {})["fresh"]
    assert fresh.saved.mean == 0.0 and fresh.saved.n == 2
    assert fresh.saved_tests[0].difference.mean == pytest.approx(-0.5)


def test_the_verdict_says_how_much_sooner():
    assert "where the baseline ends it is after" not in made(0.0).verdict[0]
    (text,) = made(0.05).verdict
    assert "; where the baseline ends it is after " in text and " % of the updates (p " in text


def test_too_few_seeds_are_called_too_few():
    ends = {"baseline": (0.1, 0.9), DOSE: (0.9, 0.3), f"random:{DOSE}": (0.5, 0.5)}
    runs = [run(name, seed, [0, 0, end[seed]]) for name, end in ends.items() for seed in (0, 1)]
    (text,) = outcome_of(arms(DOSE), runs, {}).verdict
    assert "no difference to the baseline shown (+10.0 points (95 % interval -" in text
    assert text.endswith(", 2 seeds; too few to show any: take more)")


def test_being_better_than_random_is_told_without_a_gain_over_the_baseline():
    text = made(0.0, -0.1).verdict[0]
    assert "no difference to the baseline shown" in text and "better than as many at random" in text


def test_a_baseline_that_training_harms_is_a_note():
    assert made(0.05).notes == ()
    runs = [run(name, seed, [0.8, 0.7, 0.6 + seed / 100]) for name in ("baseline", DOSE)
            for seed in (0, 1)]  # fmt: skip
    (note,) = outcome_of(arms(DOSE), runs, {}).notes
    assert note.startswith("the baseline ends 19.5 points below where it began")


def test_an_arm_is_found_by_its_name_or_by_what_makes_it():
    trial = made(0.05)
    assert trial["dormant@0.30"] is trial[DOSE]
    with pytest.raises(
        KeyError, match=r"no arm 'swr@0\.1', expected one of baseline, dormant@0\.3:"
    ):
        trial["swr@0.1"]
    with pytest.raises(KeyError, match="no arm 'nothing'"):
        trial["nothing"]
    assert repr(trial) == f"Trial(18 runs of baseline, {DOSE}, random:{DOSE})"
