import math
import re

import numpy as np
import pytest

from fedfmd.build import build_federation
from fedfmd.engines.inline import run_inline
from fedfmd.errors import SettingsError
from fedfmd.protocol import privacy
from fedfmd.protocol.state import pack, parameter_names
from fedfmd.runs import RunFolder, read_rounds
from fedfmd.server_app import prepare
from strategies import find_strategy, make_strategy
from strategies.privacy import sampling_rate, spent

HUGE = {"privacy.clip-norm": 1e6}


@pytest.fixture
def after(make_federation, make_grid, tmp_path):
    """How far one round moves each parameter; client c of three, with 10 (c + 1) images, moves it by c + 1."""

    def run(name="run", **changes):
        federation = make_federation({"server.rounds": 1} | changes)
        strategy = make_strategy(federation, RunFolder(tmp_path / name))
        before = pack(federation.model)
        strategy.run(make_grid([{}, {}]))
        ways = {n: array - before[n] for n, array in pack(strategy.federation.model).items()}
        return {n: ways[n] for n in parameter_names(federation.model)}, read_rounds(strategy.folder.rounds)

    return run


def total_norm(ways):
    return math.sqrt(sum(float(np.square(way, dtype=np.float64).sum()) for way in ways.values()))


@pytest.mark.parametrize("mode", ["central", "local"])
def test_without_noise_and_with_a_huge_norm_it_is_fedavg_with_equal_weights(after, mode):
    ways, (row,) = after(**HUGE, **{"privacy.mode": mode})
    for way in ways.values():
        np.testing.assert_allclose(way, 2, rtol=1e-5)
    assert row.epsilon == math.inf
    weighted, (row,) = after("weighted")
    assert weighted["fc.bias"] == pytest.approx((10 * 1 + 20 * 2 + 30 * 3) / 60)
    assert row.epsilon is None


def test_the_server_clips_each_client(after):
    """All of them move in the same direction, each by the norm."""
    ways, _ = after(**{"privacy.clip-norm": 0.5})
    assert total_norm(ways) == pytest.approx(0.5, rel=1e-3)


def test_the_servers_noise_has_the_standard_deviation(after, monkeypatch):
    monkeypatch.setattr("fedfmd.build.need", lambda *_: None)
    monkeypatch.setattr(privacy, "epsilon", lambda *_: 1.0)
    still, _ = after("still", **{"privacy.clip-norm": 2.0})
    ways, _ = after("noisy", **{"privacy.clip-norm": 2.0, "privacy.noise-multiplier": 1.5})
    noise = np.concatenate([(ways[name] - still[name]).ravel() for name in sorted(ways)])
    assert noise.std() == pytest.approx(1.5 * 2.0 / 3, rel=0.03)
    again, _ = after("again", **{"privacy.clip-norm": 2.0, "privacy.noise-multiplier": 1.5})
    assert all(np.array_equal(again[name], way) for name, way in ways.items())


def test_epsilon_adds_up_over_the_rounds(after):
    pytest.importorskip("opacus")
    noisy = {"privacy.clip-norm": 1.0, "privacy.noise-multiplier": 2.0, "privacy.delta": 1e-3}
    _, rows = after(**noisy, **{"server.rounds": 3, "server.clients-per-round": 1})
    assert [row.epsilon for row in rows] == [
        pytest.approx(privacy.epsilon(2.0, 1 / 3, releases, 1e-3)) for releases in (1, 2, 3)
    ]
    _, rows = after("local", **noisy, **{"server.rounds": 3, "privacy.mode": "local"})
    assert [row.epsilon for row in rows] == [
        pytest.approx(privacy.epsilon(1.0, 1.0, releases, 1e-3)) for releases in (1, 2, 3)
    ]


def test_a_discarded_round_makes_the_servers_mean_known_to_nobody(make_federation, make_grid, tmp_path):
    changes = {"server.rounds": 2, "server.max-failed-share": 1.0, "budget.min-reports": 1.0, **HUGE}
    for mode, counts in (("central", (1, 1, 1)), ("local", (2, 2, 2))):
        federation = make_federation(changes | {"privacy.mode": mode})
        strategy = make_strategy(federation, RunFolder(tmp_path / mode))
        strategy.run(make_grid(behave=lambda client, r: "no power" if (client, r) == (0, 1) else ""))
        assert strategy.progress.releases == counts


@pytest.mark.parametrize(
    ("changes", "rate"),
    [
        ({}, 1),
        ({"server.clients-per-round": 1}, 1 / 3),
        ({"server.clients-per-round": 1, "budget.over-select": 2}, 2 / 3),
    ],
)
def test_the_rate_is_the_share_of_the_clients_that_are_asked(tiny_settings, changes, rate):
    assert sampling_rate(tiny_settings(**changes)) == pytest.approx(rate)


def test_without_a_norm_nothing_is_told(tiny_settings):
    assert spent(tiny_settings(), 5) is None


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"privacy.clip-norm": 0, "privacy.noise-multiplier": 1}, "privacy.noise-multiplier = 1 is a multiple of "),
        ({"budget.policy": "kernels"}, "and budget.policy = 'kernels': which kernels a client trains would tell"),
        ({"budget.policy": "partial+kernels"}, "and budget.policy = 'partial+kernels'"),
        ({"budget.policy": "mine:plan"}, "and budget.policy = 'mine:plan'"),
        ({"transport.upload": "int8"}, "and transport.upload = 'int8': what rounding leaves over"),
        ({"server.max-update-norm": 2}, "and server.max-update-norm = 2 both limit updates"),
        ({"server.max-update-ratio": 2}, "and server.max-update-ratio = 2 both limit updates"),
        ({"model.norm": "batch"}, "and a model with statistics of its images (bn1.num_batches_tracked)"),
        *(({"server.strategy": name}, f"and server.strategy = '{name}', whose server needs more")
          for name in ("fedbuff", "fednova", "fedbn", "fedmedian", "fedtrimmedavg", "krum", "multikrum")),
        ({"privacy.mode": "both"}, "privacy.mode = 'both': "),
        ({"privacy.delta": 0}, "privacy.delta = 0: "),
    ],
)  # fmt: skip
def test_what_breaks_privacy_is_refused_before_the_run(tiny_settings, changes, line):
    with pytest.raises(SettingsError, match=re.escape(line)):
        prepare(tiny_settings(**{"privacy.clip-norm": 1} | changes))


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedavgm", "fedadagrad", "fedadam", "fedyogi"])
def test_what_needs_only_the_mean_is_allowed(tiny_settings, name):
    find_strategy(
        tiny_settings(**{"privacy.clip-norm": 1, "server.strategy": name, "train.proximal-mu": 0.1})
    )


def test_noise_without_the_accountant_says_what_to_install(tiny_settings, monkeypatch):
    monkeypatch.setattr("fedfmd.errors.find_spec", lambda name: None if name == "opacus" else name)
    with pytest.raises(SettingsError, match=r"needs opacus: pip install 'fedfmd\[privacy\]'"):
        build_federation(tiny_settings(**{"privacy.clip-norm": 1, "privacy.noise-multiplier": 1}))


NOISY = {"privacy.clip-norm": 1.0, "privacy.noise-multiplier": 0.1, "server.rounds": 3}


@pytest.mark.parametrize("mode", ["central", "local"])
def test_noise_survives_a_resume_and_any_number_of_workers_byte_for_byte(
    mode, tiny_settings, tmp_path, monkeypatch
):
    from fedfmd.client_app import app as client_app
    from fedfmd.server_app import app as server_app

    monkeypatch.setattr("fedfmd.build.need", lambda *_: None)
    monkeypatch.setattr(privacy, "epsilon", lambda noise, rate, releases, delta: float(releases))

    def models(name, workers=1, rounds=3):
        settings = tiny_settings(**NOISY, **{"privacy.mode": mode}).in_folder(tmp_path / name)
        save = "strategies.tracked.save_checkpoint"
        with monkeypatch.context() as patch:
            if rounds < 3:
                patch.setattr(save, stop_after(rounds))
                with pytest.raises(KeyboardInterrupt):
                    run_inline(server_app, client_app, settings.flat(), workers)
                return None
            run_inline(server_app, client_app, settings.flat(), workers)
        folder = tmp_path / name
        epsilons = [row.epsilon for row in read_rounds(folder / "rounds.csv")]
        return epsilons, {p.name: p.read_bytes() for p in (folder / "checkpoints").glob("*.safetensors")}

    whole = models("whole")
    models("stopped", rounds=2)
    assert models("stopped", workers=2) == whole
    assert whole[0] == [1, 2, 3]


def stop_after(rounds):
    from fedfmd.runs import save_checkpoint

    def save(folder, server_round, *args, **kwargs):
        if server_round > rounds:
            raise KeyboardInterrupt
        save_checkpoint(folder, server_round, *args, **kwargs)

    return save
