import multiprocessing
import re
import sys

import pytest
import torch

from fedfmd.algorithms import find_algorithm
from fedfmd.build import build_dataset, build_federation, build_model, build_sgd, own_sources
from fedfmd.conv import FMDConv2d
from fedfmd.data import StreamedImages
from fedfmd.engines.centralised import run_centralised
from fedfmd.errors import RunError, SettingsError
from fedfmd.experiment import load_experiment
from fedfmd.own_code import FOLDER, call, files_of, find, look_in, sources_of
from fedfmd.run_folder import open_run_folder, run_path
from fedfmd.runs import code_digest, latest_checkpoint, save_checkpoint

MINE = """
import torch
from torch import nn
from torchvision.transforms.functional import to_pil_image

def make(classes, image_size, conv, norm, channels=8):
    flat = nn.Linear(channels * image_size**2, classes)
    return nn.Sequential(conv(3, channels, 3, padding=1), norm(channels), nn.Flatten(), flat)

def wrong(classes, image_size, conv, norm):
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten())

def nothing(**given):
    pass

def breaks(classes, image_size, conv, norm):
    return {}["no such key"]

class Late(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size, **geometry):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        return self.conv(x)  # whatever the stride is

def many(logits, labels):
    return logits.sum(1)

def free(logits, labels):
    return logits.detach().sum()

def swapped(labels):
    return labels.sum()

def no_optimiser(parameters, lr):
    return "sgd"

def needs_more(parameters, lr, kick):
    return None

def shares(shares):  # of a split that returns these, whatever it is asked
    return lambda labels, clients, rng: shares(labels, rng)

two = shares(lambda labels, rng: [[0], [1]])
out = shares(lambda labels, rng: [[0], [1], [len(labels)]])
twice = shares(lambda labels, rng: [[0], [1], [1]])
none = shares(lambda labels, rng: [[0], [1], []])
texts = shares(lambda labels, rng: [["a"], ["b"], ["c"]])
number = shares(lambda labels, rng: 3)
moods = iter(range(100))
moody = shares(lambda labels, rng: [[next(moods)], [200], [201]])

def images(pixels, labels, test_labels=None):
    import numpy as np
    make = lambda labels: (np.zeros((len(labels), *pixels), np.uint8), np.array(labels))
    return lambda: (make(labels), make(labels if test_labels is None else test_labels))

flat = images((8, 8), [0, 1])
gap = images((8, 8, 3), [0, 2])
unknown = images((8, 8, 3), [0, 1], [0, 5])
odd = lambda: 3

class Pictures(torch.utils.data.Dataset):  # of 8 × 10 pixels, as PIL's images and as tensors in turn
    def __init__(self, labels, broken=()):
        self.targets, self.broken = labels, broken

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        if index in self.broken:
            raise OSError("no such picture")
        grey = torch.full((3, 8, 10), 10 * index, dtype=torch.uint8)
        return (grey if index % 2 else to_pil_image(grey)), self.targets[index]

pictures = lambda: (Pictures([0, 1] * 8), Pictures([1, 0, 1]))
breaking = lambda: (Pictures([0, 1] * 8, broken=[5]), Pictures([1, 0, 1]))
three = lambda: [Pictures([0, 1])] * 3
unlabelled = lambda: [torch.utils.data.TensorDataset(torch.zeros(2, 3, 8, 8), torch.zeros(2))] * 2
unseen = lambda: (Pictures([0, 1] * 8), Pictures([2]))

class Floats(Pictures):
    def __getitem__(self, index):
        return torch.zeros(3, 8, 8), 0

floats = lambda: [Floats([0, 1])] * 2

def decide(full, plan):
    return plan(steps=0)

def decides_nothing(full, plan):
    return None

def fixed(classes, image_size, conv, norm):
    return nn.Flatten()

class Wavy(nn.Conv2d):  # of a state that can't be sent
    def __init__(self, in_channels, out_channels, kernel_size, **geometry):
        super().__init__(in_channels, out_channels, kernel_size, **geometry)
        self.register_buffer("waves", torch.zeros(2, dtype=torch.complex64))

class Noted(nn.Conv2d):
    def get_extra_state(self):
        return {"made": "today"}

class Auxiliary(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.body = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, classes))

    def forward(self, x):
        return (self.body(x), x) if self.training else self.body(x)

def auxiliary(classes, image_size, conv, norm):
    return Auxiliary(classes)

class Turning(torch.optim.SGD):  # its rate follows a list of steps
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                steps = self.state[parameter].setdefault("steps", [])
                steps.append(len(steps))
                group["lr"] = 0.1 / len(steps)
        return super().step(closure)

class Gained(nn.Conv2d):  # one option has no default, another None
    def __init__(self, *sizes, gain, mode=None, **geometry):
        super().__init__(*sizes, **geometry)
        self.chosen = gain, mode

def in_place(logits, labels):
    logits /= 2
    return nn.functional.cross_entropy(logits, labels)

def banked(classes, image_size, conv, norm):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, classes))
    network.add_module("bank", nn.Linear(classes, classes))
    return network

def open_sizes(classes, image_size, conv, norm):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))

def uncopied(classes, image_size, conv, norm):
    network = make(classes, image_size, conv, norm)
    import threading
    network.lock = threading.Lock()
    return network

def never(logits, labels):
    return logits.mean() * float("nan")

class Slower(torch.optim.SGD):  # all parameters but the first at a hundredth of the rate
    def __init__(self, parameters, lr):
        first, *others = parameters
        super().__init__([{"params": [first]}, {"params": others, "lr": lr / 100}], lr=lr)

    def step(self, closure=None):
        rates.append([group["lr"] for group in self.param_groups])
        return super().step(closure)

rates = []

class Told(torch.optim.SGD):
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["told"] = object()
        return super().step(closure)
"""


@pytest.fixture(autouse=True)
def clean_path(monkeypatch):
    """Where modules are looked for, as it was before the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv(FOLDER, "")


@pytest.fixture
def mine(tmp_path):
    """A folder with a user's module `mine`, which is found there as long as the test runs."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "mine.py").write_text(MINE)
    look_in(folder)
    yield folder
    sys.modules.pop("mine", None)
    code_digest.cache_clear()


@pytest.fixture
def own(tiny_settings, mine):
    """Makes settings of a run of the user's network."""

    def make(**changes):
        return tiny_settings(**{"model.arch": "mine:make", "model.width": 1.0} | changes)

    return make


def test_code_beside_an_experiment_file_is_found_here_and_in_other_processes(write_yaml, tmp_path):
    (tmp_path / "beside_it.py").write_text("RATE = 0.5\n")
    load_experiment(write_yaml())
    assert find("a.setting", "beside_it:RATE") == 0.5
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(find, ("a.setting", "beside_it:RATE")) == 0.5


def test_no_file_there_hides_a_library(tmp_path):
    (tmp_path / "wave.py").write_text("class Wave_read: own = True\n")
    look_in(tmp_path)
    assert not hasattr(find("a.setting", "wave:Wave_read"), "own")


def test_the_file_of_own_code_is_known(mine):
    assert sources_of(find("model.arch", "mine:make")) == (mine / "mine.py",)


@pytest.mark.parametrize("name", ["PART", "INSTANCE", "CACHED"])
def test_the_file_of_what_stands_for_a_function_is_known_too(name, mine):
    made = mine / f"made_{name.lower()}.py"
    made.write_text(
        "from functools import lru_cache, partial\nimport mine\nPART = partial(mine.make, channels=2)\n"
        "INSTANCE = mine.Wavy(3, 3, 1)\nCACHED = lru_cache(mine.make)\n"
    )
    assert files_of("a.setting", f"{made.stem}:{name}") == (made, mine / "mine.py")


def test_experiments_of_two_folders_have_each_their_own_code(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "of_one_name.py").write_text(f"from its_part import WORD\nNAME = {name!r}\n")
        (tmp_path / name / "its_part.py").write_text(f"WORD = {name!r}\n")
        look_in(tmp_path / name)
        assert find("a.setting", "of_one_name:NAME") == find("a.setting", "of_one_name:WORD") == name


def test_a_module_that_fails_is_one_line(tmp_path):
    (tmp_path / "half_written.py").write_text("def loss(:\n")
    look_in(tmp_path)
    with pytest.raises(
        SettingsError, match=r"train\.loss = 'half_written:loss' can't be imported: SyntaxError: .*line 1"
    ):
        find("train.loss", "half_written:loss")


def test_a_strategy_may_stand_beside_the_experiment_file(write_yaml, tmp_path):
    (tmp_path / "strategy_beside_it.py").write_text(
        "from flwr.serverapp.strategy import FedAvg\nclass Mine(FedAvg): pass\n"
    )
    file = write_yaml(**{"server.strategy": "strategy_beside_it:Mine"})
    settings = load_experiment(file).runs[0].settings
    find_algorithm(settings)
    assert own_sources(settings) == (tmp_path / "strategy_beside_it.py",)


@pytest.mark.parametrize("streaming", ["always", "never"])
def test_datasets_of_torchs_are_decoded_on_the_way_or_into_memory(streaming, mine, tiny_settings):
    settings = tiny_settings(**{"data.dataset": "mine:pictures", "data.streaming": streaming})
    dataset = build_dataset(settings)
    assert isinstance(dataset.train, StreamedImages) == (streaming == "always")
    images = dataset.train.in_memory()
    assert images.images[:, 0, 0, 0].tolist() == [10 * index for index in range(16)]
    assert images.labels.tolist() == [0, 1] * 8
    assert (dataset.classes, dataset.image_size, len(dataset.test)) == (2, 8, 3)


def test_an_own_network_gets_what_the_settings_say(own):
    settings = own(**{"model.options": {"channels": 16}, "model.norm": "group", "temperature.initial": 7})
    model = build_model(settings, 5)
    assert isinstance(model[0], FMDConv2d)
    assert (model[0].kernels, model[0].out_channels, float(model[0].temperature)) == (2, 16, 7.0)
    assert isinstance(model[1], torch.nn.GroupNorm)
    assert (model[3].in_features, model[3].out_features) == (16 * 8 * 8, 5)
    assert model.training
    assert torch.equal(model[3].weight, build_model(settings, 5)[3].weight)


@pytest.mark.parametrize("kind", ["federated", "centralised"])
def test_its_source_counts_as_code_of_the_run(kind, own, mine, tmp_path):
    settings = own(kind=kind).in_folder(tmp_path / "run")
    assert own_sources(settings) == (mine / "mine.py",)
    with open_run_folder(settings):
        pass
    run_path(settings)
    code_digest.cache_clear()
    (mine / "mine.py").write_text(f"{MINE}\n# changed")
    with pytest.raises(SettingsError, match="holds a run of other code"):
        run_path(settings)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model.arch": "mine:mak"}, "can't be imported (module 'mine' has no attribute 'mak'): the module is"),
        ({"model.arch": "random:make"}, "random.py"),  # a library's
        ({"model.arch": "nowhere:make"}, "'nowhere:make' can't be imported (No module named 'nowhere'): put "),
        ({"model.arch": "mine.make"}, "or module:function of your own; did you mean 'mine:make'?"),
        ({"model.arch": ":make"}, "model.arch = ':make' can't be imported"),
        ({"model.arch": "mine:wrong"}, "B×3×8×8 to logits B×10; in evaluation a batch of 1 gave (1, 192)"),
        ({"model.arch": "mine:auxiliary"}, "to logits B×10; in training a batch of 2 gave a tuple"),
        ({"model.arch": "mine:fixed"}, "model.arch = 'mine:fixed' has no parameters to train"),
        ({"model.arch": "resnet8", "model.conv": "mine:Wavy"}, ".waves in its state, which is complex: only real ten"),
        ({"model.arch": "mine:banked"}, "has bank.bias in its state, which reads as a kernel of a dynamic convol"),
        ({"model.arch": "mine:open_sizes"}, "has 1.weight, whose shape is still open: tell its layer all sizes"),
        ({"model.arch": "mine:uncopied"}, "fails in evaluation on a batch of 1×3×8×8: TypeError: cannot pickle"),
        ({"model.arch": "resnet8", "model.conv": "mine:Noted"}, "_extra_state in its state, which is a dict: only re"),
        ({"model.arch": "mine:nothing"}, "must return an nn.Module, and returned a NoneType"),
        ({"model.options": "chanels:16"}, "can't be called (got an unexpected keyword argument 'chanels'): it gets"),
        ({"model.arch": "mine:breaks"}, "'mine:breaks' fails in mine.py, line 17: KeyError: 'no such key'"),
        (
            {"model.arch": "resnet8", "model.conv": "mine:Late"},
            "model.conv = 'mine:Late' fails in evaluation on a batch of 1×3×8×8: RuntimeError: The size of tensor a",
        ),
        ({"model.width": 0.5}, "model.width = 0.5 has no effect with model.arch = 'mine:make': leave it out"),
        ({"model.arch": "resnet8", "model.options": "a:1"}, "model.options = 'a:1': model.arch = 'resnet8' has none"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_clear_line(changes, line, own):
    with pytest.raises(SettingsError, match=re.escape(line)):
        build_model(own(**changes), 10)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"train.loss": "mine:many"}, "'mine:many' must return the mean loss, a tensor without dimensions"),
        ({"train.loss": "mine:free"}, "'mine:free' must return the mean loss, a tensor without dimensions"),
        (
            {"train.loss": "mine:swapped"},
            "can't be called (too many positional arguments): it gets logits, labels",
        ),
        (
            {"train.optimiser": "torch.optim:Muon"},
            "'torch.optim:Muon' fails: ValueError: Muon only supports 2D parameters",
        ),
        ({"train.optimiser": "mine:no_optimiser"}, "must make a torch.optim.Optimizer, and made a str"),
        (
            {"train.optimiser": "mine:needs_more"},
            "(missing a required argument: 'kick'): it gets parameters, lr, and",
        ),
        (
            {"train.optimiser": "torch.optim:LBFGS"},
            "train.optimiser = 'torch.optim:LBFGS' can't take a step: TypeErr",
        ),
        ({"partition.scheme": "mine:two"}, "partition.clients = 3, and it returned 2 lists"),
        (
            {"partition.scheme": "mine:out"},
            "client 2 has indices 1437 to 1437, the training images' are 0 to 1436",
        ),
        ({"partition.scheme": "mine:twice"}, "each image once: image 1 is there twice"),
        ({"partition.scheme": "mine:none"}, "client 2 has 0 images, and partition.min-images = 1"),
        ({"partition.scheme": "mine:texts"}, "client 0 has <U1 of shape (1,), not whole numbers"),
        (
            {"partition.scheme": "mine:number"},
            "must return the image indices of each client, and returned int",
        ),
        ({"partition.scheme": "mine:moody"}, "splits otherwise each time: draw from its argument rng alone"),
        (
            {"data.dataset": "mine:flat"},
            "training set: 'images' must be uint8 N x H x W x 3, not uint8 2 x 8 x 8",
        ),
        ({"data.dataset": "mine:gap"}, "labels must be 0, 1, 2, … without gaps, but 1 has no image"),
        ({"data.dataset": "mine:unknown"}, "'mine:unknown', test set: label 5 is outside the classes 0..1"),
        (
            {"data.dataset": "mine:odd"},
            "must return (images, labels), (test images, test labels), or two datasets of torch's, and returned a int",
        ),
        ({"data.dataset": "mine:three"}, "must return a training and a test set, and returned 3 datasets"),
        (
            {"data.dataset": "mine:unlabelled"},
            "training set: needs a length, and the labels of its images in",
        ),
        ({"data.dataset": "mine:unseen"}, "'mine:unseen', test set: label 2 is outside the classes 0..1"),
        (
            {"data.dataset": "mine:floats"},
            r"image 0 must be a uint8 tensor 3×H×W or a PIL image, and is torch.fl",
        ),
        (
            {"data.dataset": "mine:breaking"},
            "'mine:breaking', training set: image 5 fails in mine.py, line 73: no such picture",
        ),
        (
            {"data.dataset": "mine:pictures", "data.image-size": 0},
            "its first image, of 8×10, is not square; set data.image-size",
        ),
        (
            {"data.dataset": "mine:flat", "data.streaming": "always"},
            "data.streaming = 'always' and data.dataset = 'mine:flat', which returns arrays: leave it out",
        ),
        (
            {"budget.policy": "mine:decide"},
            "budget.policy = 'mine:decide' fails in mine.py, line 90: ValueError: ste",
        ),
        (
            {"budget.policy": "mine:decides_nothing"},
            "must return a plan, full or plan(steps, kernels), and returned",
        ),
        ({"budget.policy": "mine:nowhere"}, "budget.policy = 'mine:nowhere' can't be imported"),
        (
            {"model.conv": "torch.nn:Conv2d", "budget.policy": "kernels"},
            "budget.policy = 'kernels' trains some kernels of each bank, and the network has no banks",
        ),
    ],
)
def test_a_run_that_cannot_use_own_code_does_not_start(changes, line, tiny_settings, mine):
    with pytest.raises(SettingsError, match=re.escape(line)):
        build_federation(tiny_settings(**changes))


def test_optimisers_of_pytorchs_are_named_in_the_same_way(tiny_settings):
    settings = tiny_settings(
        **{"train.optimiser": "torch.optim:RMSprop", "train.momentum": 0.5, "train.lr": 0.01}
    )
    optimiser = build_sgd(settings).optimiser([torch.nn.Parameter(torch.zeros(1))])
    assert isinstance(optimiser, torch.optim.RMSprop)
    assert (optimiser.defaults["lr"], optimiser.defaults["momentum"]) == (0.01, 0.5)
    assert build_federation(settings).optimiser_states == 2


def test_what_has_the_arguments_gets_them():
    def own(a, *, b=1, c=2):
        return a, b, c

    module = sys.modules["tests_own"] = type(sys)("tests_own")
    module.own, module.length = own, len
    try:
        assert call("x", "tests_own:own", {"a": 3}, {"c": 5, "d": 6}) == (3, 1, 5)
        assert call("x", "tests_own:own", {"b": 4}, first={"one": 3}) == (3, 4, 2)
        assert call("x", "tests_own:length", first={"list": [1, 2]}) == 2
        with pytest.raises(
            SettingsError, match=r"'tests_own:own' can't be called .*'a'.*: it gets b, and what"
        ):
            call("x", "tests_own:own", {"b": 4}, {"c": 5})
        assert sources_of(len) == ()
    finally:
        del sys.modules["tests_own"]


def test_all_own_code_counts_as_code_of_the_run(tiny_settings, mine, tmp_path):
    (mine / "other.py").write_text("def loss(logits, labels):\n    return logits.sum()\n")
    own = {"partition.scheme": "mine:two", "train.loss": "other:loss", "budget.policy": "mine:decide"}
    settings = tiny_settings(**own)
    assert own_sources(settings) == (mine / "mine.py", mine / "other.py")
    centralised = tiny_settings(kind="centralised", **{"train.loss": "other:loss"})
    assert own_sources(centralised) == (mine / "other.py",)
    sys.modules.pop("other")


def test_a_file_that_exits_when_it_is_imported_is_one_line(tmp_path):
    (tmp_path / "exits.py").write_text("raise SystemExit(0)")
    look_in(tmp_path)
    with pytest.raises(
        SettingsError, match=r"^a\.setting = 'exits:X' can't be imported: it calls sys\.exit$"
    ):
        find("a.setting", "exits:X")


def test_options_of_a_convolution_need_no_default(own):
    changes = {"model.arch": "resnet8", "model.conv": "mine:Gained"}
    network = build_model(own(**changes, **{"model.conv-options": {"gain": 2.5, "mode": "fast"}}), 10)
    assert {layer.chosen for layer in network.modules() if hasattr(layer, "chosen")} == {(2.5, "fast")}
    with pytest.raises(
        SettingsError, match=r"model\.conv = 'mine:Gained' .*missing a required argument: 'gain'"
    ):
        build_model(own(**changes), 10)


def test_the_groups_of_an_optimiser_keep_their_shares_of_the_rate(own, tmp_path):
    changes = {"train.optimiser": "mine:Slower", "train.epochs": 2, "train.batch-size": 2048, "train.lr": 0.1}
    run_centralised(own(kind="centralised", **changes).in_folder(tmp_path / "run"), threads=1)
    rates = find("train.optimiser", "mine:rates")[-2:]
    assert rates == [pytest.approx([0.1, 0.001]), pytest.approx([0.05, 0.0005])]  # the cosine's


def test_a_loss_may_change_its_logits(own):
    assert build_federation(own(**{"train.loss": "mine:in_place"})).settings.train.loss == "mine:in_place"


def test_a_loss_that_is_not_a_number_is_named(own, tmp_path):
    settings = own(kind="centralised", **{"train.loss": "mine:never", "train.batch-size": 2048})
    with pytest.raises(
        RunError, match=r"clip-norm=1, or see what train\.loss = mine:never returns, and another"
    ):
        run_centralised(settings.in_folder(tmp_path / "run"), threads=1)


def test_an_optimisers_lists_are_kept_over_a_stop(own, tmp_path, monkeypatch):
    changes = {
        "kind": "centralised",
        "train.optimiser": "mine:Turning",
        "train.epochs": 2,
        "train.batch-size": 256,
    }
    run_centralised(own(**changes).in_folder(tmp_path / "whole"), threads=1)

    def stop(*arguments, **options):
        save_checkpoint(*arguments, **options)
        raise KeyboardInterrupt

    stopped = own(**changes).in_folder(tmp_path / "stopped")
    with monkeypatch.context() as patch:
        patch.setattr("fedfmd.engines.centralised.save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            run_centralised(stopped, threads=1)
    run_centralised(stopped, threads=1)
    ends = [latest_checkpoint(tmp_path / name / "checkpoints") for name in ("whole", "stopped")]
    assert all(torch.equal(ends[0].arrays[name], array) for name, array in ends[1].arrays.items())


def test_an_optimiser_that_keeps_what_no_checkpoint_holds_is_refused(own, tmp_path):
    settings = own(**{"kind": "centralised", "train.optimiser": "mine:Told"}).in_folder(tmp_path / "run")
    with pytest.raises(
        SettingsError, match=r"train\.optimiser = Told: 0/told of its state is of type object: keep tensors"
    ):
        run_centralised(settings, threads=1)
