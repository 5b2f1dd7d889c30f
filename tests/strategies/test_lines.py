from fedfmd.build import build_federation
from strategies.lines import header_lines


def test_the_header_counts_images_and_epochs(tiny_settings):
    even = tiny_settings(**{"partition.scheme": "iid", "train.local-epochs": 1})
    _, clients, rounds, *_ = header_lines(build_federation(even))
    assert clients.startswith("3 clients (iid, 479 images each) on ")
    assert ", 1 local epoch of batch " in rounds

    uneven = tiny_settings(
        **{
            "partition.scheme": "iid",
            "partition.clients": 4,
            "fleet.devices": "pi-4:4",
            "train.local-epochs": 2,
        }
    )
    _, clients, rounds, *_ = header_lines(build_federation(uneven))
    assert clients.startswith("4 clients (iid, 359 to 360 images each) on ")
    assert ", 2 local epochs of batch " in rounds
