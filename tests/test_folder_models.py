"""Hugging Face model folders: what is loaded, what is refused, and what is written."""

import json
import sys

import pytest
import torch
from helpers.folders import change_json, save_folder_model, write_texts
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

import fastplastic
from fastplastic.errors import FileError, InputError
from fastplastic.sources import (
    InputShape,
    batches,
    create_model,
    put_head,
    save_model,
    text_batches,
)

KINDS = ["classifier", "encoder", "causal", "vit", "resnet"]


def same(model, other):
    own, others = model.state_dict(), other.state_dict()
    return own.keys() == others.keys() and all(torch.equal(own[x], others[x]) for x in own)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_the_model_that_was_saved(tmp_path, kind, capfd):
    saved = save_folder_model(tmp_path / "m", kind)
    capfd.readouterr()
    before = torch.get_rng_state()
    loaded = create_model(f"hf:{tmp_path / 'm'}", pretrained=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert (loaded.weights, loaded.head, loaded.warning) == ("pretrained", "", None)
    assert type(loaded.model) is type(saved) and same(loaded.model, saved)
    classes = {"classifier": 2, "vit": 3, "resnet": 3}.get(kind, 0)
    assert loaded.model.num_classes == classes
    assert (loaded.texts is None) == (kind in ("vit", "resnet"))
    assert capfd.readouterr() == ("", "")


def test_shards_and_half_precision(tmp_path):
    saved = save_folder_model(tmp_path / "m", "classifier", dtype=torch.bfloat16, shard="1KB")
    assert (tmp_path / "m" / "model.safetensors.index.json").is_file()
    loaded = create_model(f"hf:{tmp_path / 'm'}")
    assert same(loaded.model, saved.float())
    save_model(tmp_path / "a.safetensors", loaded, force=False)
    written = load_file(tmp_path / "a.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert written.keys() == saved.state_dict().keys()


def test_random_weights_depend_on_the_seed_alone(tmp_path):
    save_folder_model(tmp_path / "m", "vit")
    name = f"hf:{tmp_path / 'm'}"
    one = create_model(name, pretrained=False)
    torch.rand(3)
    assert one.weights == "random"
    assert same(create_model(name, pretrained=False).model, one.model)
    assert not same(create_model(name, pretrained=False, seed=1).model, one.model)


def test_images_are_prepared_as_the_folder_says(tmp_path):
    save_folder_model(tmp_path / "m", "resnet")
    name, file = f"hf:{tmp_path / 'm'}", tmp_path / "m" / "preprocessor_config.json"

    def shape(**sizes):
        return InputShape.of(create_model(name, **sizes).model, None, None, None).config

    found = shape()
    assert (found["input_size"], found["crop_pct"]) == ((3, 16, 16), 1.0)
    assert (found["mean"], found["std"]) == ((0.5,) * 3, (0.25,) * 3)
    assert (found["interpolation"], found["crop_mode"]) == ("bicubic", "squash")
    assert shape(img_size=8)["input_size"] == (3, 8, 8)
    size = {"height": 8, "width": 8}
    change_json(file, size={"shortest_edge": 16}, do_center_crop=True, crop_size=size)
    found = shape()
    assert (found["input_size"], found["crop_pct"]) == ((3, 8, 8), 0.5)
    change_json(file, do_normalize=False)
    assert shape()["std"] == (1.0,) * 3
    change_json(file, do_flip_channel_order=True)
    with pytest.raises(InputError, match="do_flip_channel_order is True, which is not supported"):
        shape()
    file.unlink()
    assert shape()["input_size"] == (3, 224, 224)


def test_images_are_those_of_its_own_processor(tmp_path):
    from transformers import ViTImageProcessor

    save_folder_model(tmp_path / "m", "vit")
    model = create_model(f"hf:{tmp_path / 'm'}").model
    images, _ = next(iter(batches("sample", model=model, batch_size=4, seed=0)))
    from fastplastic.sources.images import Sample, balanced

    sample = Sample()
    chosen = balanced(sample.labels, len(sample), len(sample), 0)[:4]
    processor = ViTImageProcessor(
        size={"height": 16, "width": 16}, image_mean=[0.5] * 3, image_std=[0.25] * 3, resample=3
    )
    pictures = [sample.read(index)[0].convert("RGB") for index in chosen]
    expected = processor(pictures, return_tensors="pt")["pixel_values"]
    assert torch.allclose(images, expected, atol=0.05)


# Heads


@pytest.mark.parametrize(("kind", "had"), [("vit", 3), ("classifier", 2), ("encoder", None)])
def test_a_head_for_other_classes(tmp_path, kind, had):
    saved = save_folder_model(tmp_path / "m", kind)
    loaded = create_model(f"hf:{tmp_path / 'm'}", num_classes=5)
    others = "the weights have none" if had is None else f"that of the weights has {had}"
    assert loaded.head == f"fresh, of 5 classes: {others}"
    assert loaded.model.num_classes == loaded.model.config.num_labels == 5
    own, before = loaded.model.state_dict(), saved.state_dict()
    prefix = "bert." if kind == "encoder" else ""
    kept = [name for name in before if "classifier" not in name]
    assert kept and all(torch.equal(own[prefix + name], before[name]) for name in kept)
    save_model(tmp_path / "fresh", loaded, force=False)
    again = create_model(f"hf:{tmp_path / 'fresh'}")
    assert same(again.model, loaded.model)


def test_a_head_that_is_put_on_is_in_the_configuration(tmp_path):
    save_folder_model(tmp_path / "m", "resnet")
    model = create_model(f"hf:{tmp_path / 'm'}").model
    put_head(model, 6, seed=0)
    assert model.num_classes == model.num_labels == model.config.num_labels == 6
    assert model(torch.rand(1, 3, 16, 16)).logits.shape == (1, 6)


def test_a_masked_language_model_gets_a_classifier(tmp_path):
    save_folder_model(tmp_path / "m", "masked")
    loaded = create_model(f"hf:{tmp_path / 'm'}", num_classes=3)
    assert type(loaded.model).__name__ == "BertForSequenceClassification"
    assert loaded.head == "fresh, of 3 classes: the weights have none"


def test_a_new_head_is_given_the_names_that_are_found(tmp_path):
    save_folder_model(tmp_path / "m", "classifier")
    loaded = create_model(f"hf:{tmp_path / 'm'}", num_classes=3)
    file = write_texts(tmp_path / "a.jsonl", labels=("z", "y"))
    source = text_batches(str(file), model=loaded.model, texts=loaded.texts, seed=0)
    assert sorted(next(iter(source))["labels"].tolist()) == [0] * 4 + [1] * 4
    own = create_model(f"hf:{tmp_path / 'm'}", num_classes=2)
    with pytest.raises(FileError, match=r"a.jsonl:1: label 'z', expected 0 to 1 or one of bad, go"):
        text_batches(str(file), model=own.model, texts=own.texts)


def test_a_checkpoint_takes_the_place_of_the_weights(tmp_path):
    save_folder_model(tmp_path / "m", "resnet")
    other = create_model(f"hf:{tmp_path / 'm'}", pretrained=False, seed=7)
    save_model(tmp_path / "a.safetensors", other, force=False)
    (tmp_path / "m" / "model.safetensors").unlink()
    loaded = create_model(f"hf:{tmp_path / 'm'}", checkpoint=tmp_path / "a.safetensors")
    assert loaded.weights == f"checkpoint: {tmp_path / 'a.safetensors'}"
    assert same(loaded.model, other.model)


# What is written


def test_a_file_can_take_the_place_of_the_folder_s(tmp_path):
    save_folder_model(tmp_path / "m", "causal")
    weights = tmp_path / "m" / "model.safetensors"
    before = load_file(weights)
    assert "lm_head.weight" not in before  # tied
    before["model.layers.0.rotary.inv_freq"] = torch.arange(3.0)  # of an older version
    before["model.norm.weight"] = before["model.norm.weight"].half()
    save_file(before, weights, {"format": "pt"})
    loaded = create_model(f"hf:{tmp_path / 'm'}")
    with torch.no_grad():
        loaded.model.model.layers[0].mlp.up_proj.weight.mul_(2)
    save_model(tmp_path / "a.safetensors", loaded, force=False)
    after = load_file(tmp_path / "a.safetensors")
    assert {x: after[x].dtype for x in after} == {x: before[x].dtype for x in before}
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["model.layers.0.mlp.up_proj.weight"]
    weights.write_bytes((tmp_path / "a.safetensors").read_bytes())
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "m"), loaded.model)


def test_a_folder_has_all_that_the_model_s_has(tmp_path):
    save_folder_model(tmp_path / "m", "causal", shard="1KB")
    (tmp_path / "m" / "1_Pooling").mkdir()
    (tmp_path / "m" / "1_Pooling" / "config.json").write_text("{}")
    (tmp_path / "m" / "flax_model.msgpack").write_text("of before")
    (tmp_path / "m" / ".cache").mkdir()
    (tmp_path / "m" / ".cache" / "x").write_text("")
    loaded = create_model(f"hf:{tmp_path / 'm'}")
    save_model(tmp_path / "new", loaded, force=False)
    files = {str(x.relative_to(tmp_path / "new")) for x in (tmp_path / "new").rglob("*")}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json"}
    assert not [x for x in files if "msgpack" in x or "cache" in x or "index" in x or "-of-" in x]
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "new"), loaded.model)
    assert AutoTokenizer.from_pretrained(tmp_path / "new")("the cat")["input_ids"] == [4, 5]
    with pytest.raises(FileError, match="new: is a folder with files: name another, or pass --for"):
        save_model(tmp_path / "new", loaded, force=False)
    save_model(tmp_path / "new", loaded, force=True)
    with pytest.raises(FileError, match="m: is the folder of the model itself: name another"):
        save_model(tmp_path / "m", loaded, force=True)


def test_images_written_load_again(tmp_path):
    save_folder_model(tmp_path / "m", "vit")
    loaded = create_model(f"hf:{tmp_path / 'm'}")
    data = batches("sample", model=loaded.model, batch_size=4, max_batches=1)
    found = fastplastic.plan(fastplastic.profile(loaded.model, data, backward=False), ratio=0.2)
    fastplastic.reinit_(loaded.model, found)
    save_model(tmp_path / "new", loaded, force=False)
    assert same(AutoModelForImageClassification.from_pretrained(tmp_path / "new"), loaded.model)


# Bad input


def broken(folder, how):
    config, weights = folder / "config.json", folder / "model.safetensors"
    if how == "no folder":
        folder.rename(folder.with_name("away"))
    elif how == "no config":
        config.unlink()
    elif how == "corrupt config":
        config.write_text('{"a": ')
    elif how == "config of a list":
        config.write_text("[]")
    elif how == "no weights":
        weights.unlink()
    elif how == "corrupt weights":
        weights.write_bytes(b"abc")
    elif how == "weights lack a tensor":
        state = load_file(weights)
        del state["bert.pooler.dense.weight"]
        save_file(state, weights, {"format": "pt"})
    elif how == "no tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    elif how == "larger tokenizer":
        found = json.loads((folder / "tokenizer.json").read_text())
        found["model"]["vocab"]["zebra"] = 15
        (folder / "tokenizer.json").write_text(json.dumps(found))
    else:
        change_json(config, **how)


@pytest.mark.parametrize(
    ("how", "error", "text"),
    [
        ("no folder", FileError, "no such folder, expected a Hugging Face model folder with"),
        ("no config", FileError, "has no config.json, expected one beside the weights: check the"),
        ("corrupt config", FileError, "config.json: cannot be read as JSON (Expecting value: line"),
        ("config of a list", FileError, "config.json: holds a list, expected an object: get it an"),
        ({"model_type": None}, FileError, "config.json: has no model_type, expected that of a Hu"),
        ({"architectures": None}, FileError, "config.json: names no architectures, expected the"),
        (
            {"model_type": "bort"},
            FileError,
            "config.json of model_type 'bort' is not known to the installed transformers or not",
        ),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "code.Own"}},
            FileError,
            "model_type 'own' (it brings code of its own, which is never run) is not known",
        ),
        (
            {"architectures": ["BertForTokenClassification"]},
            InputError,
            "is a BertForTokenClassification, expected a model ...ForImageClassification, ...ForS",
        ),
        (
            {"architectures": ["BertForMaskedLM"]},
            InputError,
            "with --num-classes N it gets a fresh classifier; for others use the library: fastpla",
        ),
        ({"is_encoder_decoder": True, "architectures": ["T5Model"]}, InputError, "is a T5Model, e"),
        (
            {"problem_type": "multi_label_classification"},
            InputError,
            "is for regression or for several labels at once, expected one class of each text",
        ),
        ("no weights", FileError, "has no weights, expected model.safetensors (or model.safetens"),
        ("corrupt weights", FileError, "the weights cannot be read (SafetensorError: "),
        (
            "weights lack a tensor",
            FileError,
            "the weights lack bert.pooler.dense.weight, or have it in another shape, expected all",
        ),
        ({"hidden_size": 16}, FileError, "the weights lack bert."),
        ("no tokenizer", FileError, "no tokenizer that can be loaded (none of its files is"),
        ("larger tokenizer", FileError, "its tokenizer has 16 tokens, the model 15: expected that"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(tmp_path, how, error, text):
    save_folder_model(tmp_path / "m", "classifier")
    broken(tmp_path / "m", how)
    with pytest.raises(error) as raised:
        create_model(f"hf:{tmp_path / 'm'}")
    assert text in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "arguments", "text"),
    [
        ("classifier", {"img_size": 32}, "--img-size: hf:m takes texts: leave it out"),
        ("classifier", {"in_chans": 1}, "--in-chans: hf:m takes texts: leave it out"),
        ("causal", {"num_classes": 3}, "--num-classes 3: hf:m predicts tokens and has no classes"),
        ("vit", {"in_chans": 1}, "--in-chans 1: hf:m takes 3 channels (grey images are repeated"),
        ("vit", {"model_kwargs": {"fo": 1}}, "--model-kwargs fo: config.json of hf:m has no such"),
    ],
)
def test_arguments_that_do_not_suit_it(tmp_path, monkeypatch, kind, arguments, text):
    monkeypatch.chdir(tmp_path)
    save_folder_model(tmp_path / "m", kind)
    with pytest.raises(InputError) as error:
        create_model("hf:m", **arguments)
    assert str(error.value).startswith(text)


def test_another_size_of_images_needs_other_weights(tmp_path):
    save_folder_model(tmp_path / "m", "vit")
    name = f"hf:{tmp_path / 'm'}"
    assert create_model(name, pretrained=False, img_size=32).model.config.image_size == 32
    with pytest.raises(FileError, match=r"the weights lack vit.embeddings.position_embeddings, or"):
        create_model(name, img_size=32)


def test_arguments_change_the_configuration(tmp_path):
    save_folder_model(tmp_path / "m", "vit")
    name = f"hf:{tmp_path / 'm'}"
    assert create_model(name, model_kwargs={"hidden_act": "relu"}).model.config.hidden_act == "relu"


def test_without_transformers_one_line_says_what_to_install(tmp_path, monkeypatch):
    save_folder_model(tmp_path / "m", "vit")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError) as error:
        create_model(f"hf:{tmp_path / 'm'}")
    assert "needs transformers (" in str(error.value)
    assert str(error.value).endswith('): pip install "fastplastic[transformers]"')


def test_code_in_a_folder_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    save_folder_model(tmp_path / "m", "vit")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save({"a": Evil()}, tmp_path / "m" / "pytorch_model.bin")
    code = f"open({str(tmp_path / 'ran')!r}, 'w')"
    (tmp_path / "m" / "modeling.py").write_text(code)
    change_json(
        tmp_path / "m" / "config.json",
        auto_map={"AutoModelForImageClassification": "modeling.Model"},
    )
    with pytest.raises(FileError, match="the weights cannot be read"):
        create_model(f"hf:{tmp_path / 'm'}")
    assert not (tmp_path / "ran").exists()
