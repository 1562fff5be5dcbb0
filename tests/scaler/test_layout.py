"""How the global batch is laid over processes: exactly, and over fewer of them when machines were lost."""

from __future__ import annotations

import pytest

from scaler.layout import Layout, batch_layout, elastic_layouts


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "expected"), [(96, None, 3, (32, 1)), (96, 8, 3, (8, 4)), (7, None, 1, (7, 1))]
)
def test_batches_multiply_out(batch, micro, ranks, expected):
    assert batch_layout(batch, micro_batch_size=micro, ranks=ranks) == Layout(ranks, *expected)


@pytest.mark.parametrize(("batch", "micro", "ranks"), [(96, 7, 1), (100, None, 3), (2, None, 3), (96, 40, 2)])
def test_batches_that_do_not_are_refused_with_the_nearest_choice(batch, micro, ranks):
    with pytest.raises(ValueError, match="nearest valid choices") as error:
        batch_layout(batch, micro_batch_size=micro, ranks=ranks)
    assert str(batch) in str(error.value)


def elastic(batch, micro, started, min_ranks, check=lambda layout: None):
    (layout,) = elastic_layouts(
        [batch], micro_batch_size=micro, started=started, min_ranks=min_ranks, check=check
    ).values()
    assert layout.ranks * layout.micro_batch_size * layout.num_micro_batches == batch
    return layout


@pytest.mark.parametrize(
    ("batch", "micro", "started", "expected"),
    [
        (96, 16, 6, Layout(6, 16, 1)),
        (96, 16, 5, Layout(4, 12, 2)),  # 96 does not divide by 5, nor 24 by 16
        (96, 8, 5, Layout(4, 8, 3)),
        (96, None, 5, Layout(4, 24, 1)),
        (97, 16, 8, Layout(1, 1, 97)),
        (4, None, 8, Layout(4, 1, 1)),
    ],
)
def test_as_many_ranks_train_as_can_share_the_batch(batch, micro, started, expected):
    assert elastic(batch, micro, started, 1) == expected


def test_a_layout_that_the_method_refuses_is_passed_over():
    def whole_groups(layout: Layout) -> None:
        if layout.micro_batch_size % 8:
            raise ValueError(f"micro-batch {layout.micro_batch_size} holds no whole groups")

    assert elastic(96, 12, 5, 1, whole_groups) == Layout(4, 8, 3)
    assert elastic(96, 4, 5, 1, lambda layout: None) == Layout(4, 4, 6)
    with pytest.raises(ValueError, match=r"96 cannot be laid over 4 to 5 ranks .*micro-batch 1 holds no whole groups"):
        elastic(96, 4, 5, 4, whole_groups)


def test_never_fewer_than_wanted():
    with pytest.raises(ValueError, match=r"3 processes were started and strategy\.min_ranks is 4"):
        elastic(96, 16, 3, 4)
    with pytest.raises(ValueError, match="97 cannot be laid over 2 to 8 ranks"):
        elastic(97, 16, 8, 2)


def test_every_batch_size_of_a_run_is_laid_over_the_same_ranks():
    layouts = elastic_layouts([64, 96, 256], micro_batch_size=32, started=7, min_ranks=1, check=lambda layout: None)
    assert layouts == {
        64: Layout(4, 16, 1),
        96: Layout(4, 24, 1),
        256: Layout(4, 32, 2),
    }  # 6 of 7 would do for 96 alone
