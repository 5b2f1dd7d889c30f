import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from fedfmd.build import build_dataset, build_model, build_sgd
from fedfmd.data import ImageFormat
from fedfmd.errors import SettingsError
from fedfmd.runs import save_tensors
from fedfmd.serving.classifier import Classifier, load_classifier
from fedfmd.settings import Settings
from fedfmd.training import evaluate, train

IMAGES = ImageFormat(("cat", "dog", "owl"), 8, (0.5, 0.4, 0.3), (0.25, 0.2, 0.1), "crop+flip")


@pytest.fixture
def classifier(tiny_settings):
    settings = tiny_settings()
    return Classifier(build_model(settings, classes=3).eval(), settings, IMAGES)


@pytest.fixture
def picture(tmp_path):
    """A file of 8 x 8 random pixels, and these as uint8 1 x 3 x 8 x 8."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png", torch.from_numpy(pixels).permute(2, 0, 1)[None]


def test_probabilities_are_those_of_the_normalised_image(classifier, picture):
    _, pixels = picture
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGES.mean, IMAGES.std))
    logits = classifier.model((pixels / 255 - mean) / std)
    torch.testing.assert_close(classifier.probabilities(pixels), logits.softmax(1))


def test_an_image_file_gets_its_classes_the_most_probable_first(classifier, picture):
    path, pixels = picture
    told = classifier(path)
    expected = dict(zip(IMAGES.class_names, classifier.probabilities(pixels)[0].tolist(), strict=True))
    assert told == pytest.approx(expected)
    assert list(told.values()) == sorted(told.values(), reverse=True)


def test_images_of_another_size_are_made_to_fit(classifier, picture):
    _, pixels = picture
    doubled = pixels.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., :20]
    assert classifier.probabilities(doubled.expand(70, -1, -1, -1)).shape == (70, 3)


def test_a_saved_classifier_is_the_same_and_needs_nothing_else(classifier, picture, tmp_path):
    with torch.no_grad():
        classifier.model.fc.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    classifier.save(tmp_path / "model.safetensors")
    loaded = load_classifier(tmp_path / "model.safetensors")
    assert loaded.images == IMAGES
    assert not loaded.model.training
    assert loaded(picture[0]) == pytest.approx(classifier(picture[0]))


@pytest.mark.parametrize("version", [None, 1, 2])
def test_older_files_are_read_and_newer_ones_refused(classifier, tmp_path, version):
    path = tmp_path / "model.safetensors"
    header = {"settings": classifier.settings.kept(), "images": dataclasses.asdict(IMAGES)}
    header |= {} if version is None else {"version": version}
    save_tensors(path, classifier.model.state_dict(), {"classifier": json.dumps(header)})
    if version == 2:
        with pytest.raises(SettingsError, match=r"model\.safetensors has format 2, and .* up to 1"):
            load_classifier(path)
    else:
        assert load_classifier(path).images == IMAGES


def test_a_saved_classifier_has_a_version(classifier, tmp_path):
    classifier.save(tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["classifier"])["version"] == 1


@pytest.fixture(scope="module")
def trained():
    """A classifier that has learnt the digits in a few seconds, and its test accuracy."""
    settings = Settings.from_mapping({"model.conv": "static", "model.width": 0.5})
    digits, model = build_dataset(settings), build_model(settings, classes=10)
    generator = torch.Generator().manual_seed(0)
    for lr, steps in ((0.05, 400), (0.005, 100)):
        sgd = dataclasses.replace(build_sgd(settings), lr=lr, batch_size=16)
        train(model, digits.train, digits, sgd, steps, generator)
    return Classifier(model.eval(), settings, digits.format), evaluate(model, digits.test, digits).accuracy


@pytest.mark.parametrize("how", ["NEAREST", "BILINEAR", "BICUBIC"])
def test_digits_are_known_however_a_user_enlarges_them(trained, how):
    classifier, accuracy = trained
    everything = load_digits()
    _, small, _, labels = train_test_split(
        np.uint8(everything.images * 255 / 16),
        everything.target,
        test_size=0.2,
        stratify=everything.target,
        random_state=0,
    )
    size = (classifier.images.image_size,) * 2
    large = np.stack([Image.fromarray(image).resize(size, Image.Resampling[how]) for image in small])
    told = classifier.probabilities(torch.from_numpy(large)[:, None].expand(-1, 3, -1, -1)).argmax(1)
    assert accuracy > 0.9
    assert (told.numpy() == labels).mean() > accuracy - 0.03


@pytest.mark.parametrize(("kept", "augment"), [(True, "crop+flip"), (False, "none")])
def test_an_older_classifier_says_whether_to_augment(classifier, tmp_path, kept, augment):
    dataclasses.replace(classifier, images=dataclasses.replace(IMAGES, augment=kept)).save(
        tmp_path / "old.safetensors"
    )
    assert load_classifier(tmp_path / "old.safetensors").images.augment == augment


def test_what_is_no_classifier_is_one_line(tmp_path, write_checkpoint):
    with pytest.raises(SettingsError, match=r"cannot read the classifier .*none\.safetensors"):
        load_classifier(tmp_path / "none.safetensors")
    with pytest.raises(SettingsError, match=r"holds no classifier: .*fedfmd export"):
        load_classifier(write_checkpoint())
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(SettingsError, match=r"cannot read the classifier .*broken"):
        load_classifier(tmp_path / "broken.safetensors")
