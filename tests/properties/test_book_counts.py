"""What the group book keeps count of equals what it holds, whatever happens to groups."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from broker.groups import GroupBook
from tests.properties.made import trajectory

SIZE, GROUPS, ACTORS = 3, 4, ("a0", "a1")


def one(group, sibling, tokens):
    roles = [0] + [1] * (tokens - 1)
    return trajectory(group, sibling, 1.0, roles, np.random.default_rng(0), event=group * SIZE + sibling)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["grant", "add", "add", "add", "fail", "take", "tombstone", "restart"]),
            st.integers(0, GROUPS - 1), st.integers(-1, SIZE - 1), st.integers(2, 9),
        ),
        max_size=60,
    )
)  # fmt: skip
def test_counts_are_those_of_what_is_held(moves):
    book, known = GroupBook(SIZE), {}
    for what, group, sibling, tokens in moves:
        if what == "restart":
            state, book = book.state(), GroupBook(SIZE)
            book.restore(state, lambda *place: known[place])
        elif what == "grant" and group not in book:
            book.grant(group, group, ACTORS[group % 2], 0)
        elif group not in book:
            continue
        elif what == "add" and sibling >= 0:
            sample = one(group, sibling, tokens)
            if book.add(sample)[0]:
                known[tuple(sample.place)] = sample
        elif what == "fail":
            book.fail(group, sibling)
        elif what == "take":
            book.take(group)
        elif what == "tombstone":
            book.tombstone(group, "actor_lost")
        held = [t for g in book.groups() for t in book.members(g)]
        assert (book.held, book.nbytes) == (len(held), sum(t.nbytes for t in held))
        owed = Counter({actor: len(book.of_actor(actor)) for actor in ACTORS})
        assert {a: book.in_flight(a) for a in ACTORS} == dict(owed)
        assert book.actors() == {actor for actor in ACTORS if owed[actor]}
