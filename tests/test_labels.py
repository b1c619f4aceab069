"""Labels of channels: classes by union, and pins that spread to what they meet."""

from effopt.labels import Labels


def test_pinned_labels_pin_what_they_meet() -> None:
    labels = Labels()
    a, b, c = labels.fresh(4), labels.fresh(4), labels.fresh(2, 4)
    labels.unite(a, b, cause=1)
    assert (labels.roots(a) == labels.roots(b)).all()
    labels.pin(b[:1], cause=2)
    labels.unite(c, a, cause=3)
    assert labels.roots(c).tolist() == [[0, *labels.roots(a).tolist()[1:]]] * 2
    assert labels.causes(a).tolist()[0] == 2
    assert labels.causes(c)[:, 0].tolist() == [3, 3]


def test_a_chain_of_unions_in_one_call_is_one_class() -> None:
    labels = Labels()
    chain = labels.fresh(5000)
    labels.unite(chain[1:], chain[:-1], cause=1)
    assert len(set(labels.roots(chain).tolist())) == 1
