from io import BytesIO

import pytest
import torch
from matplotlib.figure import Figure

from fedfmd.build import build_model
from fedfmd.conv import record_attention
from fedfmd.data import ImageSet, load_dataset
from fedfmd.serving.cam import Column, explain, plot_cam, write_cam
from fedfmd.serving.gradcam import grad_cam_pp

COLUMNS = {
    "static": ["static"],
    "condconv": ["kernel"],
    "dyconv": ["kernel"],
    "odconv": [
        "input only",
        "kernel only",
        "output only",
        "spatial only",
        "input + kernel + output + spatial",
    ],
    "fmdconv": ["input only", "kernel only", "output only", "input + kernel + output"],
}


@pytest.fixture
def inputs():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("conv", COLUMNS)
def test_a_column_for_each_attention_that_the_model_has_and_one_for_all(conv, tiny_settings, inputs):
    changes = {"model.conv": conv, "model.attention-init": "kaiming"}  # attentions that depend on the image
    model = build_model(tiny_settings(**changes), classes=10).eval()
    with record_attention(model) as usual:
        logits = model(inputs)
    classes = torch.tensor([3, 4])
    columns = explain(model, "layer2", inputs, classes, usual)
    assert [column.title for column in columns] == COLUMNS[conv]
    assert torch.equal(columns[-1].maps, grad_cam_pp(model, "layer2", inputs, classes))
    assert torch.equal(columns[-1].probabilities, logits.softmax(1))
    assert len({column.probabilities[0, 0].item() for column in columns}) == len(columns)


def test_the_grid_names_images_classes_and_predictions():
    shown = ImageSet(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([1, -1]))
    maps = torch.rand(2, 4, 4)
    probabilities = torch.tensor([[0.25, 0.75], [0.6, 0.4]])
    columns = [Column("kernel only", maps, probabilities), Column("all", maps / 2, probabilities.flip(1))]
    figure = plot_cam(shown, ["test:3", "pet.png"], torch.tensor([1, 0]), columns, ["cat", "dog"], "layer2")
    figure.savefig(BytesIO(), format="png")
    *grid, bar = figure.axes
    assert figure.get_suptitle() == "Grad-CAM++ at layer2"
    assert [axes.get_title() for axes in grid[:3]] == ["image", "kernel only", "all"]
    assert [axes.get_xlabel() for axes in grid] == [
        *("test:3 (label dog)", "dog: 75%", "cat: 75%, dog: 25%"),
        *("pet.png", "cat: 60%", "dog: 60%, cat: 40%"),
    ]
    assert [grid[row].get_ylabel() for row in (0, 3)] == ["maps of class dog", "maps of class cat"]
    assert torch.equal(torch.from_numpy(grid[5].images[1].get_array().filled()), maps[1] / 2)
    assert bar.get_ylabel() == "share of the map's highest value"


@pytest.mark.parametrize(
    ("options", "classes", "layer"),
    [
        ({}, "predicted", "layer1"),  # of 8 x 8 pixels; layer2 has 4 x 4
        ({"layer": "layer2.0"}, "predicted", "layer2.0"),
        ({"class_index": 0}, [0, 0], "layer1"),
    ],
)
def test_predicted_classes_are_explained_at_a_layer_that_can_show_a_place_unless_others_are_named(
    options, classes, layer, write_checkpoint, tmp_path, monkeypatch
):
    labels = load_dataset("digits").test.labels[[0, 8]].tolist()
    drawn = []
    monkeypatch.setattr("fedfmd.serving.cam.plot_cam", lambda *given: drawn.append(given) or Figure())
    out = write_cam(write_checkpoint(), ["test:0", "test:8"], tmp_path / "new" / "cam.png", **options)
    assert out.read_bytes().startswith(b"\x89PNG")
    ((shown, names, explained, columns, class_names, at),) = drawn
    predicted = columns[-1].probabilities.argmax(1).tolist()
    assert explained.tolist() == (predicted if classes == "predicted" else classes)
    assert (shown.labels.tolist(), names, at) == (labels, ["test:0", "test:8"], layer)
    assert list(class_names) == list("0123456789")
