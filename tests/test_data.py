"""Partitions, cohorts and batches."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgalore_jax.data import FederatedData, digits, partition

LABELS = np.random.default_rng(0).integers(0, 10, 600)


def split(kind="dirichlet", clients=8, alpha=0.3, seed=0, labels=LABELS):
    rng = np.random.default_rng(seed)
    return partition(labels, clients, kind=kind, alpha=alpha, rng=rng)


@settings(deadline=None, max_examples=40)
@given(
    clients=st.integers(1, 60),
    alpha=st.sampled_from([1e-6, 0.05, 0.5, 1e4]),
    kind=st.sampled_from(["dirichlet", "iid"]),
    seed=st.integers(0, 99),
)
def test_every_sample_goes_to_exactly_one_client(clients, alpha, kind, seed):
    parts = split(kind, clients, alpha, seed)
    assert len(parts) == clients
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(LABELS)))
    assert min(map(len, parts)) >= min(10, len(LABELS) // clients)


def test_small_alpha_skews_labels_and_large_alpha_does_not():
    def entropy(alpha):
        counts = [np.bincount(LABELS[part], minlength=10) for part in split(alpha=alpha)]
        shares = np.array([c / c.sum() for c in counts])
        return -(shares * np.log(np.maximum(shares, 1e-12))).sum(1).mean()

    assert entropy(0.05) < 1.3 < 2.1 < entropy(100.0)


def test_partition_is_a_function_of_the_seed():
    same, other = split(seed=1), split(seed=2)
    assert all(np.array_equal(a, b) for a, b in zip(split(seed=1), same, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(same, other, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clients": 601}, "clients=601 but there are only 600 training samples"),
        ({"alpha": 0.0}, "alpha=0.0 must be positive"),
        ({"kind": "dirichlett"}, "partition='dirichlett' is not one of dirichlet, domain,"),
    ],
)
def test_partitions_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        split(**arguments)


FEDERATION = FederatedData([np.arange(0, 3), np.arange(3, 13), np.arange(13, 33)], seed=5)


def test_a_client_sees_only_its_own_samples_epoch_by_epoch():
    plan = FEDERATION.plan(range(4), cohort=3, steps=5, batch_size=4)
    for r in range(4):
        for c, client in enumerate(plan.ids[r]):
            part = FEDERATION.parts[client]
            real = plan.samples[r, c][:, plan.weight[r, c] > 0]
            assert set(real.ravel()) <= set(part)
            seen = np.bincount(real.ravel(), minlength=33)[part]
            assert seen.max() - seen.min() <= 1
            assert plan.counts[r, c] == len(part)


def test_a_client_smaller_than_a_batch_is_masked():
    plan = FEDERATION.plan(range(1), cohort=3, steps=2, batch_size=4)
    assert plan.weight[0].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert sorted(plan.samples[0, 0, 1, :3]) == [0, 1, 2]
    assert set(plan.samples[0, 0].ravel()) == {0, 1, 2}, "padding is the client's own"


def test_rounds_can_be_planned_in_any_order_and_number():
    whole = FEDERATION.plan(range(6), cohort=2, steps=3, batch_size=4)
    late = FEDERATION.plan(range(4, 6), cohort=2, steps=3, batch_size=4)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(late), strict=True):
        np.testing.assert_array_equal(a[4:], b)


def test_padding_is_empty():
    plan = FEDERATION.plan(range(2), cohort=3, steps=2, batch_size=4, multiple_of=2)
    assert plan.ids.shape == (2, 4) and (plan.ids[:, 3] == 3).all()
    assert (plan.counts[:, 3] == 0).all() and (plan.weight[:, 3] == 0).all()


def test_cohorts_are_drawn_without_replacement_and_reach_everyone():
    cohorts = [FEDERATION.cohort(t, 2) for t in range(40)]
    assert all(len(set(c)) == 2 for c in cohorts)
    assert np.bincount(np.concatenate(cohorts), minlength=3).min() > 15


def test_digits_are_split_once_and_for_all():
    data = digits.load()
    sizes = [len(s.labels) for s in (data.train, data.validation, data.test)]
    assert sizes == [1200, 200, 397]
    pixels = data.train.inputs["pixel_values"]
    assert pixels.shape == (1200, 8, 8, 1) and pixels.dtype == np.float32
    assert pixels.min() == -1 and pixels.max() == 1
    assert data.num_labels == len(np.unique(data.test.labels)) == 10


def test_a_digest_tells_data_and_shares_apart():
    data, parts = digits.load(), split()
    found = {data.digest(parts), data.digest(split(seed=1)), data.digest(parts[::-1])}
    pixels = data.test.inputs["pixel_values"].copy()
    pixels[0] += 1
    changed = (
        {"classes": data.classes[::-1]},
        {"label_names": data.label_names[::-1]},
        {"test": data.test._replace(inputs={"pixel_values": pixels})},
        {"more_tests": {"own": data.test}},
    )
    found |= {data._replace(**change).digest(parts) for change in changed}
    assert len(found) == 7 and data.digest(split()) in found


def test_rounds_and_epochs_have_orders_of_their_own():
    rounds = [FEDERATION.batches(t, 2, 5, 4) for t in range(2)]
    assert (rounds[0] != rounds[1]).any()
    one, two = FEDERATION.batches(0, 1, 5, 4).reshape(2, 10)
    assert (one != two).any() and sorted(one) == sorted(two)
