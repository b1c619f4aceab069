"""examples.merge_cost times what it says, on a block small enough for a test."""

from examples import merge_cost


def test_a_row_has_the_times_and_shares_of_both_forms() -> None:
    row = merge_cost.measured(64, 2, 1, 0.2)
    assert (row["channels"], row["batch"]) == (64, 2)
    assert 0 < row["block"]["min_ms"] <= row["block"]["median_ms"]
    for form in merge_cost.FORMS:
        share = row[form]["min_ms"] / row["block"]["min_ms"]
        assert row[form]["share_of_minima"] == share
