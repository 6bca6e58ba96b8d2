"""Plans of single weights as files."""

import json

import pytest
import torch
from helpers import made_plan
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from fastplastic.errors import FastPlasticError, FileError, InputError
from fastplastic.planning import Plan
from fastplastic.wiring import UnitLayer

SIMPLE = ("eligible", "criterion", "ratio", "threshold", "scope", "granularity",
          "max_layer_fraction", "seed", "fingerprint", "notes")  # fmt: skip


def mask_plan(**changes) -> Plan:
    """Return a plan of single weights with odd shapes."""
    generator = torch.Generator().manual_seed(0)
    masks = {
        name: torch.rand(shape, generator=generator) < 0.4
        for name, shape in {"a.weight": (5, 7), "b.weight": (8,), "c": (1,), "d": (2, 3, 3)}.items()
    }
    masks["c"][0] = True
    hidden = torch.zeros(5, dtype=torch.bool)
    layer = UnitLayer(
        "a", "linear", "a.weight", None, 0, 5, None, ((0, 5, "relu"),), hidden, head=True
    )
    values = {
        "units": {}, "scores": {}, "wiring": {"a": layer}, "masks": masks, "eligible": 100,
        "criterion": "swr", "ratio": 0.25, "threshold": None, "scope": "layer",
        "granularity": "weight", "max_layer_fraction": 0.5, "seed": 7, "fingerprint": "f00d",
        "notes": ("a note",), **changes,
    }  # fmt: skip
    return made_plan(**values)


def test_masks_survive_a_file_at_one_bit_each(tmp_path):
    made, path = mask_plan(), tmp_path / "plan.safetensors"
    made.save(path)
    again = Plan.load(path)
    assert list(again.masks) == list(made.masks) and again.counts == made.counts
    for name, mask in made.masks.items():
        assert again.masks[name].dtype == torch.bool and torch.equal(again.masks[name], mask)
    for name in SIMPLE:
        assert getattr(again, name) == getattr(made, name)
    assert again.wiring["a"].head and not again.units
    with safe_open(path, framework="pt") as file:
        sizes = {name: file.get_tensor(name).numel() for name in file.keys()}
    assert sizes == {"mask/a.weight": 5, "mask/b.weight": 1, "mask/c": 1, "mask/d": 3}
    with pytest.raises(FileError, match="exists already"):
        made.save(path)


def test_a_plan_of_no_weights_survives_a_file(tmp_path):
    mask_plan(masks={}, wiring={}).save(tmp_path / "plan.safetensors")
    assert Plan.load(tmp_path / "plan.safetensors").count == 0


def test_masks_need_a_name_that_says_so(tmp_path):
    with pytest.raises(InputError, match=r"expected a name that ends in \.safetensors for a plan"):
        mask_plan().save(tmp_path / "plan.json")
    units = mask_plan(granularity="unit", masks={})
    with pytest.raises(
        InputError, match=r"name that does not end in \.safetensors for a plan of u"
    ):
        units.save(tmp_path / "plan.safetensors")
    assert not list(tmp_path.iterdir())


def rewritten(path, change) -> None:
    """Change the header and the tensors of a file of masks."""
    with safe_open(path, framework="pt") as file:
        values = json.loads(file.metadata()["fastplastic"])
        bits = {name: file.get_tensor(name) for name in file.keys()}
    change(values, bits)
    save_file(bits, path, {"fastplastic": json.dumps(values)})


def entry(name: str, value: object):
    return lambda values, _: values["masks"][0].update({name: value})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda values, _: values.update(kind="profile"), "is JSON but not a plan, expected kind"),
        (lambda values, _: values.update(granularity="unit"), "'granularity' is 'unit', expected"),
        (lambda values, _: values.update(criterion="dead"), "'criterion' is 'dead', expected one"),
        (lambda values, _: values.update(eligible=3), "'eligible' is 3, expected an integer from"),
        (lambda values, _: values.update(masks=None), "'masks' is None, expected a list"),
        (lambda values, _: values.update(masks=[3]), "an element of 'masks' is 3, expected an ob"),
        (lambda values, _: values["masks"].pop(), "tensor is 'mask/d', expected listed in 'masks'"),
        (lambda values, _: values["masks"].append(values["masks"][0]), "mask is 'a.weight', exp"),
        (entry("name", 3), "'name' is 3, expected a string"),
        (entry("name", "x"), "mask 'x' is 'missing', expected torch.uint8 (5,) for 35 elements"),
        (entry("shape", [5, 9]), "'torch.uint8 (5,)', expected torch.uint8 (6,) for 45 elements"),
        (entry("shape", [2**40, 2**40]), "mask 'a.weight' is 'torch.uint8 (5,)', expected torch.u"),
        (entry("shape", [-5, -7]), "'shape' is [-5, -7], expected a list of integers from 0 on"),
        (entry("shape", 35), "'shape' is 35, expected a list of integers"),
        (entry("selected", 1), "'selected' is 1, expected"),
        (lambda _, bits: bits["mask/a.weight"].fill_(0), "'0 of 35 bits', expected at least one"),
        (lambda _, bits: bits["mask/a.weight"][4:].fill_(255), "bits', expected at least one, and"),
        (lambda _, bits: bits.update({"mask/c": torch.ones(1)}), "'torch.float32 (1,)', expected"),
        (lambda values, _: values.pop("wiring"), "expected"),
    ],
)  # fmt: skip
def test_damaged_masks_are_refused_in_one_line(tmp_path, change, text):
    path = tmp_path / "plan.safetensors"
    mask_plan().save(path)
    rewritten(path, change)
    with pytest.raises(FileError) as caught:
        Plan.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and text in message and "\n" not in message
    assert len(message) < 600


@pytest.mark.parametrize("keep", [0, 7, 60, 400, -1])
def test_a_truncated_file_of_masks_is_refused(tmp_path, keep):
    path = tmp_path / "plan.safetensors"
    mask_plan().save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FileError, match=r"plan\.safetensors: cannot be read \("):
        Plan.load(path)


def test_other_safetensors_are_no_plan(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(3)}, path)
    with pytest.raises(
        FileError, match=r"holds tensors but no plan, expected what Plan\.save wrote"
    ):
        Plan.load(path)
    with pytest.raises(FileError, match=r"cannot be read \(.*expected a plan file"):
        Plan.load(tmp_path / "none.safetensors")


@settings(max_examples=60)
@given(source=st.data())
def test_nothing_but_our_errors_from_damaged_bytes(tmp_path_factory, source):
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    mask_plan().save(path, force=True)
    found = bytearray(path.read_bytes())
    if source.draw(st.booleans()):
        del found[source.draw(st.integers(0, len(found) - 1)) :]
    for _ in range(source.draw(st.integers(1, 3)) if found else 0):
        found[source.draw(st.integers(0, len(found) - 1))] = source.draw(st.integers(0, 255))
    path.write_bytes(found)
    try:
        made = Plan.load(path)
    except FastPlasticError as error:
        assert "\n" not in str(error)
    else:
        assert made.count == sum(int(mask.count_nonzero()) for mask in made.masks.values())
