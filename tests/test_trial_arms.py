import pytest

from fastplastic.errors import InputError
from fastplastic.trials import Arm, Dose, parse_arm, with_controls


@pytest.mark.parametrize(
    "text",
    [
        "dormant@0.3:zero", "dormant@0.1:fresh+empirical", "gradient@0.05:weight", "swr@0.05",
        "dormant@0.2:zero+compensate+recalibrate", "random:dormant@0.3:small", "recalibrate",
        "dormant@0.6:fresh+shrink=0.5+max=1", "swr@0.1:shrink=0.7", "dormant@0.1:fresh+refit",
        "remove:swr@0.05", "fresh", "shrink-perturb", "shrink-perturb@0.4", "baseline",
        "dormant@0.6:fresh+in=layer1.*+in=fc+not=conv1+max=1", "dormant@0.1:zero+scope=layer",
    ],
)  # fmt: skip
def test_the_name_of_an_arm_makes_it_again(text):
    assert parse_arm(text).name == text
    assert parse_arm(parse_arm(text).name) == parse_arm(text)


def test_what_a_text_means():
    assert parse_arm("dormant@0.3") == Arm("reinit", Dose(criterion="dormant", ratio=0.3))
    assert parse_arm("swr@0.1").dose.granularity == "weight"
    assert parse_arm("gradient@0.1").dose.granularity == "unit"
    dose = parse_arm("random:dormant@0.2:small+kaiming_normal").dose
    assert (dose.outgoing, dose.init) == ("small", "kaiming_normal")
    assert parse_arm("dormant@0.1", include=("layer1*",)).dose.include == ("layer1*",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dormnt@0.3", "did you mean dormant?"),
        ("dormant", "has no ratio: expected CRITERION@RATIO"),
        ("dormnt", "did you mean dormant"),
        ("dormant@x", "'x' is no number"),
        ("dormant@0", "ratio 0, expected more than 0 and at most 1"),
        ("dormant@1.5", "ratio 1.5, expected more than 0"),
        ("dormant@0.1:zeros", "no option 'zeros'"),
        ("dormant@0.1:zero+fresh", "zero and fresh: drop one of the two"),
        ("dormant@0.1:max=0.5+max=1", "max=0.5 and max=1: drop one of the two"),
        ("swr@0.1:compensate", "compensate is for units, not for weights"),
        ("swr@0.1:unit", "no criterion 'swr'"),
        ("dormant@0.1:fresh+compensate", "compensate needs outgoing zero or small"),
        ("dormant@0.1:shrink=1", "shrink 1, expected from 0 to less than 1"),
        ("dormant@0.1:shrink=x", "'x' is no number"),
        ("baseline@2", "baseline takes no number"),
        ("shrink-perturb@1", "expected a factor from 0 to less than 1"),
        ("randm:dormant@0.1", "no control 'randm'"),
    ],
)
def test_what_is_no_arm_is_refused(text, said):
    with pytest.raises(InputError, match="arm") as error:
        parse_arm(text)
    assert said in str(error.value) and repr(text) in str(error.value)


def names(*texts):
    return [arm.name for arm in with_controls(texts)]


def test_controls_are_always_among_the_arms():
    assert names("dormant@0.3") == ["baseline", "dormant@0.3:zero", "random:dormant@0.3:zero"]
    assert names("fresh", "baseline") == ["baseline", "fresh"]
    assert names("swr@0.1", "remove") == [
        "baseline", "swr@0.1", "random:swr@0.1", "remove:swr@0.1",
    ]  # fmt: skip
    assert names("random@0.1") == ["baseline", "random@0.1:zero"]
    assert names("dormant@0.3", "random:dormant@0.3").count("random:dormant@0.3:zero") == 1


def test_an_arm_with_a_name_of_its_own_has_controls_of_that_name():
    arm = Arm("reinit", Dose(criterion="dormant", ratio=0.3), name="mine")
    assert [x.name for x in with_controls([arm])] == ["baseline", "mine", "random:mine"]


def test_two_arms_of_one_name_are_refused():
    with pytest.raises(InputError, match=r"two arms are called 'dormant@0\.3:zero'"):
        with_controls(["dormant@0.3", "dormant@0.30:zero"])
