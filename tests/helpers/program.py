"""What the tests of the command line share."""

# A model that timm has for tests, on few and small images.
MODEL = "test_resnet"


SMALL = (MODEL, "--no-pretrained", "--img-size", "32", "-b", "4", "--batches", "2")


def refused(outcome, code, text):
    assert outcome.code == code
    assert outcome.output == ""
    assert text in outcome.error
    assert outcome.error.startswith("fastplastic: error: ")
    assert outcome.error.count("\n") == 1


def weights_before(**keywords):
    return fastplastic_model(**keywords).state_dict()


def fastplastic_model(**keywords):
    from fastplastic.sources import create_model

    return create_model(MODEL, pretrained=False, img_size=32, **keywords).model
