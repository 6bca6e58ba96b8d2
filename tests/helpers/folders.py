"""Tiny Hugging Face model folders, made on the spot."""

import json

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from fastplastic.sources.transformers import quiet_transformers

WORDS = "a the cat dog sat ran on mat fast slow good bad".split()
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]"}
VOCABULARY = {word: i for i, word in enumerate([*SPECIAL.values(), *WORDS])}


def save_tokenizer(folder):
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=32, **SPECIAL
    ).save_pretrained(folder)


_TEXTS = {
    "vocab_size": len(VOCABULARY), "hidden_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 32,
    "pad_token_id": 0,
}  # fmt: skip


def _classifier(**more):
    names = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**_TEXTS | names | more)
    )


def _encoder():
    return transformers.BertModel(transformers.BertConfig(**_TEXTS))


def _masked():
    return transformers.BertForMaskedLM(transformers.BertConfig(**_TEXTS))


def _causal():
    config = transformers.LlamaConfig(**_TEXTS, eos_token_id=2, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config)


def _vit():
    config = transformers.ViTConfig(
        image_size=16, patch_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, num_labels=3,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def _resnet():
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config)


KINDS = {
    "classifier": _classifier, "encoder": _encoder, "causal": _causal, "vit": _vit,
    "resnet": _resnet, "masked": _masked,
}  # fmt: skip


def save_folder_model(folder, kind, *, dtype=torch.float32, shard="50GB", **more):
    """Write a model of a kind with random weights, and return it in eval mode."""
    state = torch.get_rng_state()
    torch.manual_seed(1)
    model = KINDS[kind](**more).to(dtype).eval()
    torch.set_rng_state(state)
    with quiet_transformers():
        model.save_pretrained(folder, max_shard_size=shard)
    if kind in ("classifier", "encoder", "causal", "masked"):
        save_tokenizer(folder)
    else:
        size = {"height": 16, "width": 16}
        prepared = {"size": size, "image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 3}
        (folder / "preprocessor_config.json").write_text(json.dumps(prepared))
    return model


def change_json(file, **changes):
    """Change entries of a JSON file; None removes one."""
    found = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: x for key, x in found.items() if x is not None}))


def write_texts(file, *, labels=("good", "bad"), count=8):
    """Write texts, with labels where the file is one of JSON lines."""
    lines = [" ".join(WORDS[i % 7 : i % 7 + 2 + i % 4]) for i in range(count)]
    if file.suffix == ".jsonl":
        pairs = [
            {"text": x} | ({"label": labels[i % 2]} if labels else {}) for i, x in enumerate(lines)
        ]
        lines = [json.dumps(pair) for pair in pairs]
    file.write_text("\n".join(lines) + "\n")
    return file
