"""Classifiers of torchvision by name: weights, sizes, heads, and what is refused."""

import socket

import pytest
import torch
import torchvision

from fastplastic.errors import FileError, InputError
from fastplastic.files import save_state_dict
from fastplastic.model import Batch, output_layers, outputs_of
from fastplastic.sources import (
    InputShape,
    create_model,
    put_head,
    torchvision_names,
    torchvision_tags,
)

TINY = "torchvision:shufflenet_v2_x0_5"


@pytest.fixture(autouse=True)
def no_server(monkeypatch, tmp_path):
    """Let the server of weights be a port where nobody listens, and the cache an empty folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}/models/shuffle.pth"
    weights = torchvision.models.ShuffleNet_V2_X0_5_Weights.DEFAULT
    monkeypatch.setattr(type(weights), "url", address)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def flat(model):
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


def cached(tmp_path):
    """Put weights where torchvision keeps them, and return them."""
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(5)
    model = torchvision.models.get_model(TINY.partition(":")[2])
    torch.save(model.state_dict(), folder / "shuffle.pth")
    return model


def test_random_weights_depend_on_the_seed_alone():
    before = torch.get_rng_state()
    loaded = create_model(TINY, pretrained=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert (loaded.name, loaded.weights, loaded.warning) == (TINY, "random", None)
    torch.rand(3)
    assert torch.equal(flat(create_model(TINY, pretrained=False).model), flat(loaded.model))
    other = create_model(TINY, pretrained=False, seed=1).model
    assert not torch.equal(flat(other), flat(loaded.model))


def test_weights_of_the_cache(tmp_path, monkeypatch):
    saved = cached(tmp_path)
    monkeypatch.setattr(torch.hub, "HASH_REGEX", torch.hub.re.compile("no hash"))
    loaded = create_model(TINY)
    assert (loaded.weights, loaded.warning, loaded.head) == ("pretrained", None, "")
    assert torch.equal(flat(loaded.model), flat(saved))
    tagged = create_model(f"{TINY}.IMAGENET1K_V1", pretrained=True, num_classes=7)
    assert tagged.head == "fresh, of 7 classes: that of the weights has 1000"
    assert (tagged.model.num_classes, tagged.model.fc.out_features) == (7, 7)
    own, before = tagged.model.state_dict(), saved.state_dict()
    assert all(torch.equal(own[x], before[x]) for x in before if not x.startswith("fc."))


def test_a_file_of_the_cache_that_would_run_code_is_not_loaded(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    cached(tmp_path)
    torch.save({"a": Evil()}, tmp_path / "torch" / "hub" / "checkpoints" / "shuffle.pth")
    assert create_model(TINY).weights == "random"
    assert not (tmp_path / "ran").exists()


def test_the_server_out_of_reach():
    loaded = create_model(TINY)
    assert loaded.weights == "random"
    assert loaded.warning.startswith(
        f"RANDOM WEIGHTS: the pretrained weights of {TINY} cannot be had (URLError: "
    )
    assert torch.equal(flat(loaded.model), flat(create_model(TINY, pretrained=False).model))
    with pytest.raises(FileError, match=r"the pretrained weights cannot be had \(URLError: "):
        create_model(TINY, pretrained=True)


def test_weights_that_nobody_offers(monkeypatch):
    monkeypatch.setattr("fastplastic.sources.torchvision_models.torchvision_tags", lambda name: [])
    loaded = create_model(TINY)
    assert "(torchvision offers none for this model)" in loaded.warning
    with pytest.raises(InputError, match=r"no pretrained weights \(torchvision offers none for"):
        create_model(TINY, pretrained=True)


def test_images_are_prepared_as_for_the_weights():
    def shape(name, **sizes):
        return InputShape.of(create_model(name, pretrained=False, **sizes).model, None, None, None)

    known = shape(TINY).config
    assert (known["input_size"], known["crop_pct"]) == ((3, 224, 224), 224 / 256)
    assert (known["mean"], known["interpolation"]) == ((0.485, 0.456, 0.406), "bilinear")
    assert shape(TINY, img_size=64).config["input_size"] == (3, 64, 64)
    other = shape("torchvision:mobilenet_v3_small.IMAGENET1K_V1", input_size=(3, 32, 48)).config
    assert other["input_size"] == (3, 32, 48)


def test_the_transform_is_that_of_torchvision():
    from fastplastic.sources.images import Sample

    weights = torchvision.models.ShuffleNet_V2_X0_5_Weights.DEFAULT
    image = Sample().read(3)[0].convert("RGB").resize((300, 280))
    model = create_model(TINY, pretrained=False).model
    found = InputShape.of(model, None, None, None).pipeline().tensor(image)
    assert torch.allclose(found, weights.transforms()(image), atol=0.05)


def test_a_checkpoint(tmp_path):
    path = tmp_path / "a.safetensors"
    model = create_model(TINY, pretrained=False, num_classes=4, seed=3).model
    save_state_dict(path, model)
    loaded = create_model(TINY, checkpoint=path, num_classes=4)
    assert torch.equal(flat(loaded.model), flat(model)) and loaded.head == ""
    other = create_model(TINY, checkpoint=path, num_classes=6)
    assert other.head == "fresh, of 6 classes: that of the weights has 4"
    with pytest.raises(FileError, match="only the classifier differs: pass --num-classes 4 for"):
        create_model(TINY, checkpoint=path)


def test_arguments_for_the_constructor():
    name = "torchvision:mobilenet_v3_small"
    model = create_model(name, pretrained=False, model_kwargs={"width_mult": 0.5}).model
    assert model.features[0][0].out_channels == 8
    with pytest.raises(InputError, match=r"resnet18 cannot be made with fo=1 \(TypeError: "):
        create_model("torchvision:resnet18", pretrained=False, model_kwargs={"fo": 1})


# Every architecture has a head that can be replaced; the rest of each is left on the meta device.
@pytest.mark.parametrize(
    "name", ["alexnet", "resnet18", "squeezenet1_1", "densenet121", "googlenet", "inception_v3"]
)
def test_heads(name):
    side = 299 if name == "inception_v3" else 96
    loaded = create_model(f"torchvision:{name}", pretrained=False, img_size=side)
    model = loaded.model.eval()
    assert model.num_classes == 1000 and len(output_layers(model)) == 1
    put_head(model, 3, seed=0)
    images = torch.rand(2, 3, side, side)
    assert model(images).shape == (2, 3)
    # Auxiliary heads, which two have, keep their classes, and only the main one is trained.
    model.train()
    batch = Batch((images,), {}, None, False)
    assert outputs_of(model, batch).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "resnet5O",
            "unknown model 'torchvision:resnet5O': expected a model of torchvision: did you mean "
            "torchvision:resne",
        ),
        (
            "qqqqqqq",
            "unknown model 'torchvision:qqqqqqq': expected a model of torchvision: fastplastic "
            "list models torchvision: has the names",
        ),
        ("", "unknown model 'torchvision:': expected torchvision:NAME"),
        (
            "resnet18.V9",
            "unknown weights 'V9' of torchvision:resnet18: expected a tag of that model: did you "
            "mean IMAGENET1K_V1?",
        ),
        (
            "ssd300_vgg16",
            "torchvision:ssd300_vgg16 finds objects, expected a classifier of images: for others "
            "use the library: fastplastic.profile(model, batches, loss_fn=...)",
        ),
        ("fcn_resnet50", "torchvision:fcn_resnet50 labels pixels, expected a classifier of images"),
        ("r3d_18", "torchvision:r3d_18 takes videos, expected a classifier of images"),
        ("quantized_resnet18", "torchvision:quantized_resnet18 is quantised, expected a classifie"),
        ("raft_small", "torchvision:raft_small estimates motion, expected a classifier of images"),
    ],
)
def test_names_that_are_none(name, text):
    with pytest.raises(InputError) as error:
        create_model(f"torchvision:{name}")
    assert str(error.value).startswith(text)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"in_chans": 1}, "--in-chans 1: torchvision:vit_b_16 takes 3 channels (grey images are r"),
        ({"img_size": 50}, "torchvision:vit_b_16 cannot be made with its defaults (AssertionError"),
    ],
)
def test_arguments_that_do_not_suit_it(arguments, text):
    with pytest.raises(InputError) as error:
        create_model("torchvision:vit_b_16", pretrained=False, **arguments)
    assert str(error.value).startswith(text)


def test_weights_are_of_one_size_of_images(monkeypatch):
    monkeypatch.setattr("fastplastic.sources.torchvision_models.answers_not", lambda url: None)
    with pytest.raises(InputError) as error:
        create_model("torchvision:vit_b_16", img_size=112)
    assert str(error.value).startswith(
        "torchvision:vit_b_16 with pretrained weights does not take these arguments (ValueError: "
    )


def test_names_and_tags():
    assert {"resnet18", "vit_b_16"} <= set(torchvision_names())
    assert not {"fcn_resnet50", "r3d_18"} & set(torchvision_names())
    assert torchvision_tags("resnet50") == ["IMAGENET1K_V2", "IMAGENET1K_V1"]


def test_a_name_of_torchvision_without_its_prefix():
    with pytest.raises(InputError) as error:
        create_model("mnasnet1_3")
    assert "did you mean torchvision:mnasnet1_3" in str(error.value)
