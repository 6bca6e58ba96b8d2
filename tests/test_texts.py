"""Texts from a file, as batches of a model."""

import json
import logging

import pytest
import torch
from helpers.folders import VOCABULARY, WORDS, change_json, save_folder_model, write_texts

import fastplastic
from fastplastic.errors import FileError, InputError
from fastplastic.sources import create_model, text_batches


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for kind in ("classifier", "encoder", "causal"):
        save_folder_model(root / kind, kind)
    return {kind.name: create_model(f"hf:{kind}") for kind in root.iterdir()}


def source_of(loaded, file, **more):
    return text_batches(str(file), model=loaded.model, texts=loaded.texts, **more)


def text_of(ids):
    names = {number: word for word, number in VOCABULARY.items()}
    return " ".join(names[int(number)] for number in ids)


def test_texts_are_padded_and_labelled(models, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(
        '{"text": "the cat", "label": "good"}\n\n{"sentence": "a dog sat on", "labels": 0}\n'
    )
    source = source_of(models["classifier"], file)
    assert (len(source), source.samples, source.num_classes) == (1, 2, 2)
    assert source.says == f"{file} (2 classes, at most 32 tokens of a text)"
    (batch,) = source
    order = [text_of(ids) for ids in batch["input_ids"]]
    assert sorted(order) == ["a dog sat on", "the cat [PAD] [PAD]"]
    short = order.index("the cat [PAD] [PAD]")
    assert batch["attention_mask"][short].tolist() == [1, 1, 0, 0]
    assert batch["labels"].tolist() == ([1, 0] if short == 0 else [0, 1])


def test_classes_are_drawn_evenly_and_by_the_seed_alone(models, tmp_path):
    lines = [json.dumps({"text": WORDS[i % 11], "label": int(i >= 18)}) for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))

    def drawn(seed):
        source = source_of(
            models["classifier"], tmp_path / "a.jsonl", batch_size=2, max_batches=2, seed=seed
        )
        torch.rand(3)
        return [(batch["input_ids"].tolist(), batch["labels"].tolist()) for batch in source]

    assert sorted(label for _, labels in drawn(0) for label in labels) == [0, 0, 1, 1]
    assert drawn(0) == drawn(0)
    assert len({str(drawn(seed)) for seed in range(5)}) > 1


def test_names_of_classes_by_either_mapping_of_the_configuration(tmp_path):
    save_folder_model(tmp_path / "m", "classifier")
    config = tmp_path / "m" / "config.json"
    for changes in ({"label2id": None}, {"id2label": None}):
        before = config.read_text()
        change_json(config, **changes)
        assert create_model(f"hf:{tmp_path / 'm'}").texts.labels == {"bad": 0, "good": 1}
        config.write_text(before)


def test_long_texts_are_cut(models, tmp_path):
    (tmp_path / "a.txt").write_text("cat " * 100)
    for length, expected in ((None, 32), (5, 5)):
        source = source_of(models["classifier"], tmp_path / "a.txt", max_length=length)
        assert next(iter(source))["input_ids"].shape == (1, expected)


def test_causal_models_read_blocks_in_the_file_s_order(models, tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat\na dog ran on\nthe mat\n")
    source = source_of(models["causal"], tmp_path / "a.txt", max_length=4, batch_size=2)
    batches = list(source)
    blocks = [text_of(block) for batch in batches for block in batch["input_ids"]]
    assert blocks == ["the cat sat [EOS]", "a dog ran on", "[EOS] the mat [EOS]"]
    assert (source.samples, len(source), len(batches)) == (3, 2, 2)
    assert source.says.endswith("(3 blocks of 4 tokens, from its beginning)")
    for batch in batches:
        assert torch.equal(batch["labels"], batch["input_ids"])
        assert batch["attention_mask"].all()
    few = source_of(models["causal"], tmp_path / "a.txt", max_length=4, batch_size=1, max_batches=2)
    assert len(list(few)) == few.samples == 2
    short = source_of(models["causal"], tmp_path / "a.txt", max_length=32)
    assert next(iter(short))["input_ids"].shape == (1, 12)


def test_a_long_text_of_a_causal_model_is_cut_into_blocks_in_silence(
    models, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    (tmp_path / "a.txt").write_text("cat " * 100)
    source = source_of(models["causal"], tmp_path / "a.txt")
    assert source.samples == 3 and not caplog.records


def test_the_loss_of_a_causal_model_is_its_own(models, tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat\na dog ran on\n")
    loaded = models["causal"]
    (batch,) = source_of(loaded, tmp_path / "a.txt", max_length=32)
    losses = []
    found = fastplastic.profile(
        loaded.model,
        [batch],
        loss_fn=lambda output, targets: losses.append(output.loss) or output.loss,
    )
    assert found["model.layers.0.mlp.gate_proj"].stats["n_g"].any()
    logits = loaded.model(batch["input_ids"]).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, batch["input_ids"][0, 1:])
    assert torch.allclose(losses[0], expected)


def test_an_encoder_gets_a_head_in_the_loss(models, tmp_path):
    file = write_texts(tmp_path / "a.jsonl", labels=(5, "x"))
    loaded = models["encoder"]
    names = list(loaded.model.state_dict())
    source = source_of(loaded, file, seed=3)
    assert source.num_classes == 2 and source.head.startswith("the model has none: a fresh head of")
    inputs, (mask, targets) = next(iter(source))
    output = loaded.model(**inputs)
    loss = source.loss_fn(output, (mask, targets))
    with torch.no_grad():  # what stands at padding does not count
        output.last_hidden_state[mask == 0] += 100
    assert torch.equal(source.loss_fn(output, (mask, targets)), loss)
    assert not torch.equal(source_of(loaded, file, seed=4).loss_fn(output, (mask, targets)), loss)
    found = fastplastic.profile(loaded.model, source, loss_fn=source.loss_fn)
    assert found["encoder.layer.0.intermediate.dense"].stats["n_g"].any()
    assert list(loaded.model.state_dict()) == names


@pytest.mark.parametrize("kind", ["classifier", "encoder"])
def test_texts_without_labels_are_run_forward(models, tmp_path, kind):
    source = source_of(models[kind], write_texts(tmp_path / "a.txt"))
    assert not source.labelled and source.head == ""
    assert source.says.endswith("(without labels, at most 32 tokens of a text)")
    found = fastplastic.profile(
        models[kind].model, source, backward=source.labelled, loss_fn=source.loss_fn
    )
    assert found.samples == 8


# Bad input


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.txt", b"", "a.txt: holds no text, expected a text file with one text a line, or a .js"),
        ("a.txt", b"\n  \n", "a.txt: holds no text, expected a text file"),
        ("a.txt", b"\x89PNG\r\n\x1a\n\xff\xfe", "a.txt: is not text in UTF-8 (byte 0), expected a"),
        ("a.txt", b"ab\0cd", "a.txt: is not text but binary, expected a text file"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl:2: no JSON (Expecting value: line 1"),
        ("a.jsonl", b'["a"]', "a.jsonl:1: a list, expected an object with a text: correct it"),
        ("a.jsonl", b'{"x": 1}', "a.jsonl:1: has the fields x, expected one named text or sent"),
        ("a.jsonl", b'{"text": 3}', "a.jsonl:1: text is 3, expected a text: correct or remove it"),
        ("a.jsonl", b'{"text": " "}', "a.jsonl:1: text is ' ', expected a text: correct or remo"),
        (
            "a.jsonl",
            b'{"text": "a", "label": 1.5}',
            "a.jsonl:1: label 1.5, expected a number or the name of a class: correct it",
        ),
        ("a.jsonl", b'{"text": "a", "label": true}', "a.jsonl:1: label True, expected a number or"),
        (
            "a.jsonl",
            b'{"text": "a", "label": 1}\n{"text": "b"}',
            "a.jsonl:2: has no label, though others in ",
        ),
        (
            "a.jsonl",
            b'{"text": "a", "label": 0}\n\n{"text": "b", "label": 2}',
            "a.jsonl:3: label 2, expected 0 to 1 or one of bad, good, the classes of hf:",
        ),
        ("a.jsonl", b'{"text": "a", "label": -1}', "a.jsonl:1: label -1, expected 0 to 1 or one o"),
        ("a.jsonl", b'{"text": "a", "label": "so"}', "a.jsonl:1: label 'so', expected 0 to 1 or o"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(models, tmp_path, name, content, text):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileError) as error:
        source_of(models["classifier"], tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path}/{text}")
    assert "\n" not in str(error.value)


def test_what_is_no_file_of_texts(models, tmp_path):
    with pytest.raises(FileError, match=r"nope.txt: no such file, expected a text file with one"):
        source_of(models["classifier"], "nope.txt")
    with pytest.raises(FileError, match="is a folder, expected a text file with one text a line"):
        source_of(models["classifier"], tmp_path)
    for name in ("sample", "noise"):
        with pytest.raises(InputError, match=rf"--data {name}: hf:.*/causal takes texts, expected"):
            source_of(models["causal"], name)


@pytest.mark.parametrize("length", [1, 33])
def test_more_tokens_than_the_model_takes(models, tmp_path, length):
    file = write_texts(tmp_path / "a.txt")
    with pytest.raises(InputError, match=f"max length {length}: expected 2 to 32, the tokens that"):
        source_of(models["classifier"], file, max_length=length)


def test_an_encoder_needs_two_classes(models, tmp_path):
    file = write_texts(tmp_path / "a.jsonl", labels=("x", "x"))
    with pytest.raises(FileError, match=r"a.jsonl: all labels are 'x', expected two classes or mo"):
        source_of(models["encoder"], file)
