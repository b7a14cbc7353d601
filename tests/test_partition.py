"""Every way of dealing samples to clients, and what is shown of it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import report
from fedgalore_jax.data import PARTITIONS, partition
from fedgalore_jax.data.partition import counts, owners, table

RNG = np.random.default_rng(0)
CLASSES, DOMAINS = RNG.integers(0, 10, 600), np.sort(RNG.choice(4, 600, p=[0.5, 0.3, 0.15, 0.05]))


def split(kind, clients=8, seed=0, **options):
    rng = np.random.default_rng(seed)
    options = {"alpha": 0.1, "domains": DOMAINS} | options
    return partition(CLASSES, clients, kind=kind, rng=rng, **options)


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(PARTITIONS),
    clients=st.integers(4, 60),
    alpha=st.sampled_from([1e-6, 0.1, 10.0]),
    shards=st.integers(1, 10),
    sigma=st.sampled_from([0.0, 1.0, 4.0]),
    seed=st.integers(0, 99),
)
def test_every_sample_is_in_one_part_and_no_client_is_empty(kind, clients, seed, **options):
    parts = split(kind, clients, seed, **options)
    assert len(parts) == clients and min(map(len, parts)) >= 1
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(600))
    again = split(kind, clients, seed, **options)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


@pytest.mark.parametrize("kind", ["domain", "domain+dirichlet"])
def test_a_client_has_one_domain_and_domains_have_clients_in_proportion(kind):
    parts = split(kind, 20)
    assert all(len(set(DOMAINS[part])) == 1 for part in parts)
    clients = np.bincount([DOMAINS[part[0]] for part in parts])
    np.testing.assert_allclose(clients, np.bincount(DOMAINS) / 30, atol=1)
    own = split("domain", 4)
    assert all(np.array_equal(part, np.flatnonzero(d == DOMAINS)) for d, part in enumerate(own))


def test_shards_bound_the_classes_of_a_client():
    assert max(len(set(CLASSES[part])) for part in split("shards", 20, shards=2)) <= 4
    assert np.ptp([len(part) for part in split("quantity", sigma=0.0)]) <= 1
    assert np.ptp([len(part) for part in split("quantity", sigma=1.0)]) > 50
    assert sorted(len(part) for part in split("quantity", sigma=1e3)) == [10] * 7 + [530]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("domain", {"clients": 3}, "clients=3 but there are 4 domains"),
        ("domain", {"domains": None}, "this data has no domains; set --client_column"),
        ("shards", {"shards": 99}, "shards=99: 8 clients need 792 of 600 samples"),
        ("quantity", {"sigma": -1.0}, "sigma=-1.0 must be finite"),
        ("domain+dirichlet", {"alpha": 0.0}, "alpha=0.0 must be positive"),
    ],
)
def test_what_cannot_be_dealt(kind, options, message):
    with pytest.raises(ValueError, match=message):
        split(kind, **options)


@pytest.mark.parametrize("clients", [4, 10, 500])
def test_a_table_is_short_and_adds_up(clients, tmp_path):
    parts = split("domain", clients)
    lines = table(parts, CLASSES, DOMAINS, ("a", "b", "c", "d")).splitlines()
    assert len(lines) == 2 + min(clients, 10) and f"{clients} clients" in lines[-1]
    smallest, largest = min(map(len, parts)), max(map(len, parts))
    assert int(lines[1].split()[1]) == smallest and int(lines[-2].split()[1]) == largest
    assert counts(parts, CLASSES).sum() == 600
    report.heat_map(tmp_path / "map.png", counts(parts, CLASSES), "0123456789")
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"


def test_shards_are_dealt_at_random():
    classes = np.repeat(np.arange(20), 10)
    dealt = [
        {
            tuple(np.unique(classes[part]))
            for part in partition(classes, 10, kind="shards", alpha=1.0, rng=np.random.default_rng(seed))
        }
        for seed in (0, 1)
    ]
    assert dealt[0] != dealt[1]


def test_classes_are_skewed_within_domains():
    rng = np.random.default_rng(0)
    classes, domains = rng.integers(0, 10, 600), np.sort(rng.choice(4, 600, p=[0.5, 0.3, 0.15, 0.05]))
    parts = partition(classes, 12, kind="domain+dirichlet", alpha=1e-3, rng=rng, domains=domains)
    largest = [np.bincount(classes[part]).max() / len(part) for part in parts]
    alike = partition(classes, 12, kind="domain+dirichlet", alpha=1e3, rng=rng, domains=domains)
    assert np.mean(largest) > 0.4 > max(np.bincount(classes[part]).max() / len(part) for part in alike[:5])


def test_classes_that_nobody_has_go_by_size():
    parts = [np.arange(90), np.arange(90, 100)]
    whose = owners(np.full(1000, 5), parts, np.zeros(100, int), np.random.default_rng(0))
    assert 0.05 < whose.mean() < 0.15
