"""Segmentation and detection through the library: what they return goes to a loss_fn."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.segmentation.fcn import FCN, FCNHead

import fastplastic


class Backbone(nn.Module):
    """Two layers, the features under a name as torchvision has them."""

    out_channels = 8

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, stride=4, padding=1), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU())

    def forward(self, images):
        return {"out": self.body(self.stem(images))}


def segmentation():
    torch.manual_seed(0)
    model = FCN(Backbone(), FCNHead(8, 3)).eval()
    with torch.no_grad():
        model.backbone.stem[0].weight[2] = 0
        model.backbone.stem[0].bias[2] = -1
    return model


def pixels(count=2):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(4, 3, 32, 32, generator=generator)
    labels = torch.randint(3, (4, 32, 32), generator=generator)
    return [(images, labels)] * count


def pixel_loss(output, targets):
    return cross_entropy(output["out"], targets)


def test_segmentation():
    model = segmentation()
    found = fastplastic.profile(model, pixels(), loss_fn=pixel_loss)
    assert found.coverage.skipped == () and found.coverage.found == len(found.layers) == 4
    stem = found["backbone.stem.0"]
    assert stem.dead.nonzero().flatten().tolist() == [2]
    assert stem.hidden.all() and stem.consumers[0].name == "backbone.body.0"
    # A mean over pixels, so that each gradient is small but there.
    assert found["backbone.body.0"].stats["n_g"].all()


def test_segmentation_is_re_initialised():
    model = segmentation()
    chosen = fastplastic.plan(
        fastplastic.profile(model, pixels(), loss_fn=pixel_loss), criterion="dead", threshold=0.0
    )
    assert chosen.units["backbone.stem.0"].tolist() == [2]
    before = model(pixels()[0][0])["out"]
    fastplastic.reinit_(model, chosen)
    assert model.backbone.stem[0].weight[2].any()
    assert torch.allclose(model(pixels()[0][0])["out"], before, atol=1e-6)


def detection():
    torch.manual_seed(0)
    return RetinaNet(
        Backbone(), num_classes=3, min_size=32, max_size=32,
        anchor_generator=AnchorGenerator(sizes=((8,),), aspect_ratios=((1.0,),)),
    ).train()  # fmt: skip


def objects(count=2):
    images = [torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    own = {"boxes": torch.tensor([[4.0, 4.0, 20.0, 20.0]]), "labels": torch.tensor([1])}
    return [((images, [own, own]), None)] * count


def losses(output, _):
    return sum(output.values())


def test_detection_gives_its_losses_in_train_mode():
    """It cannot be traced, and the profile says so and takes no unit for hidden."""
    model = detection()
    names = {name for name, x in model.named_modules() if isinstance(x, nn.Conv2d)}
    found = fastplastic.profile(model, objects(), loss_fn=losses)
    assert found.mode == "train"
    assert {layer.name for layer in found.layers} == names
    assert any(note.startswith("the model could not be traced (") for note in found.notes)
    assert found.totals.hidden_units == 0
    assert found["backbone.stem.0"].stats["n_g"].all()
    assert found["backbone.stem.0"].activation == "relu"
