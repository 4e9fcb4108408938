"""The broker's side of a publish, driven by hand: readiness, lateness, loss, retries."""

from types import SimpleNamespace

import pytest

from broker.distribution import Distribution
from broker.publishing import LEARNER, MAX_REGROUPS, PublishCoordinator
from common.joint import JointSection
from common.wire import Applied, Go, Prepare, Publish, PublishDone, Published, PublishFailed, Ready, ReceiveFailed

NAMES = ["a", "b"]


def offer(version):
    return Publish(version, "127.0.0.1", 1234, "gloo", 1 << 20, [["w", "float32", [2]]])


def sent(outgoing, kind):
    return {name: m for name, m in outgoing if isinstance(m, kind)}


def prepare_all(c, version, names, now=0.0):
    prepares = sent(c.on_publish(offer(version), names, now), Prepare)
    out = []
    for name, message in prepares.items():
        out = c.on_ready(Ready(message.epoch, version), name, NAMES, now)
    return prepares, out


def settle(c, version, names):
    c.on_published(Published(c.epoch, version, "d", 0.1))
    out = []
    for name in names:
        out = c.on_applied(Applied(c.epoch, version, "d"), name)
    return out


def test_go_only_after_everyone_is_ready_and_done_only_after_everyone_applied():
    c = PublishCoordinator(10)
    prepares = sent(c.on_publish(offer(1), ["b", "a"], 0.0), Prepare)
    assert {n: (p.rank, p.world) for n, p in prepares.items()} == {"a": (1, 3), "b": (2, 3)}
    assert c.on_ready(Ready(c.epoch, 1), "a", NAMES, 0.0) == []
    go = sent(c.on_ready(Ready(c.epoch, 1), "b", NAMES, 0.0), Go)
    assert set(go) == {"a", "b", LEARNER} and go["a"].members == ["a", "b"]
    assert c.on_applied(Applied(c.epoch, 1, "d"), "a") == []
    assert c.on_applied(Applied(c.epoch, 1, "d"), "b") == []
    assert c.published == 0 and c.under_way == 1
    done = sent(c.on_published(Published(c.epoch, 1, "d", 0.1)), PublishDone)
    assert done[LEARNER].applied == ["a", "b"] and c.published == 1 and c.history == [1]


def test_the_epoch_lasts_while_the_members_do():
    c = PublishCoordinator(10)
    for version in (1, 2):
        prepare_all(c, version, ["a"])
        settle(c, version, ["a"])
    assert c.epoch == 1
    prepare_all(c, 3, ["a", "b"])
    assert c.epoch == 2


def test_who_is_not_ready_in_time_is_dropped_by_name_and_comes_back_with_a_sign():
    c = PublishCoordinator(10)
    c.on_publish(offer(1), ["a", "b"], 0.0)
    c.on_ready(Ready(c.epoch, 1), "a", NAMES, 1.0)
    assert c.on_tick(["a", "b"], 9.0) == []
    again = sent(c.on_tick(["a", "b"], 11.0), Prepare)
    assert set(again) == {"a"} and again["a"].epoch == 2
    assert c.late == {"b": 1} and c.is_suspended("b")
    c.on_ready(Ready(2, 1), "a", NAMES, 11.0)
    done = sent(settle(c, 1, ["a"]), PublishDone)
    assert done[LEARNER].dropped == ["b"]
    c.on_ready(Ready(1, 1), "b", NAMES, 12.0)
    assert set(sent(c.on_publish(offer(2), ["a", "b"], 13.0), Prepare)) == {"a", "b"}


def test_who_gave_no_sign_is_asked_for_one_once_a_deadline():
    """It may be idle: what it was to be told, or what it said, was lost with a connection."""
    c = PublishCoordinator(10)
    c.on_publish(offer(1), ["a", "b"], 0.0)
    c.on_ready(Ready(c.epoch, 1), "a", NAMES, 1.0)
    c.on_tick(NAMES, 11.0)
    c.on_ready(Ready(c.epoch, 1), "a", NAMES, 11.0)
    settle(c, 1, ["a"])
    asked = [now for now in range(12, 50) if sent(c.on_tick(["b"], float(now)), Prepare)]
    assert asked == [21, 31, 41] and c.is_suspended("b")
    assert c.on_tick([], 60.0) == []  # it holds the newest version now, or is gone
    (probe,) = sent(c.on_tick(["b"], 61.0), Prepare).values()
    c.on_ready(Ready(probe.epoch, 1), "b", NAMES, 62.0)
    assert not c.is_suspended("b") and c.on_tick(["b"], 99.0) == []
    assert set(sent(c.on_publish(offer(1), ["b"], 99.0), Prepare)) == {"b"}


def test_a_peer_lost_while_words_are_sent_leaves_nobody_with_the_older_word_last():
    """To send is how the broker learns that a connection is closed."""
    gone, told = {"a"}, []
    peers = {name: SimpleNamespace(name=name, leads=False, role="actor") for name in "abc"}

    def send(peer, message):
        if peer.name in gone:
            gone.remove(peer.name)
            del peers[peer.name]
            distribution.left(peer, 0.0)
        else:
            told.append((peer.name, message.epoch))

    roster = SimpleNamespace(
        learner=lambda: None, named=lambda name: peers.get(name), receivers=lambda version, roles: sorted(peers)
    )
    door = SimpleNamespace(send=send, roster=roster, version=0)
    distribution = Distribution(10.0, JointSection(), None, door, SimpleNamespace(generation=0))
    stream = distribution.streams.all[0]
    distribution._dispatch(stream, stream.on_publish(offer(1), sorted(peers), 0.0))
    assert told == [("b", 1), ("c", 1), ("b", 2), ("c", 2)] and stream.epoch == 2


def test_who_dies_before_go_or_does_not_apply_does_not_stop_the_others():
    c = PublishCoordinator(10)
    c.on_publish(offer(1), ["a", "b"], 0.0)
    again = sent(c.on_lost("b", ["a"], 0.0), Prepare)
    assert set(again) == {"a"}
    c.on_ready(Ready(c.epoch, 1), "a", NAMES, 0.0)
    settle(c, 1, ["a"])
    prepare_all(c, 2, ["a", "b"])
    c.on_published(Published(c.epoch, 2, "d", 0.1))
    c.on_applied(Applied(c.epoch, 2, "d"), "a")
    done = sent(c.on_receive_failed(ReceiveFailed(c.epoch, 2, "digest"), "b"), PublishDone)
    assert done[LEARNER].dropped == ["b"] and c.published == 2
    epoch = c.epoch
    prepare_all(c, 3, ["a", "b"])
    assert c.epoch == epoch + 1  # a broken group is never used again
    c.on_published(Published(c.epoch, 3, "d", 0.1))
    c.on_applied(Applied(c.epoch, 3, "d"), "a")
    assert sent(c.on_tick(["a", "b"], 1000.0), PublishDone)[LEARNER].dropped == ["b"]


def test_a_broken_collective_is_tried_again_in_a_new_epoch_and_not_for_ever():
    c = PublishCoordinator(10)
    prepare_all(c, 1, ["a"])
    for attempt in range(1, 5):
        epoch = c.epoch
        again = sent(c.on_publish_failed(PublishFailed(epoch, 1, "reset"), ["a"], 0.0), Prepare)
        assert c.epoch == epoch + 1 and set(again) == {"a"}, attempt
        c.on_ready(Ready(c.epoch, 1), "a", NAMES, 0.0)
    done = sent(c.on_publish_failed(PublishFailed(c.epoch, 1, "reset"), ["a"], 0.0), PublishDone)
    assert done[LEARNER].dropped == ["a"] and not c.busy
    assert sent(c.on_publish(offer(2), ["a"], 0.0), Prepare)["a"].epoch == c.epoch == 6  # nor met in once more


@pytest.mark.parametrize("ends", ["fails", "is lost"])
def test_a_group_is_left_for_good_by_a_member_that_ends_between_two_versions(ends):
    """Whoever comes under its name would wait for the others in a group that they have formed already."""
    c = PublishCoordinator(10)
    prepare_all(c, 1, NAMES)
    settle(c, 1, NAMES)
    prepare_all(c, 2, NAMES)
    settle(c, 2, NAMES)
    assert c.epoch == 1  # the same group as long as all stay
    if ends == "fails":
        c.on_receive_failed(ReceiveFailed(1, 2, "reset"), "a")
    else:
        assert c.on_lost("a", ["b"], 0.0) == [] and c.on_lost("stranger", NAMES, 0.0) == []
    prepare_all(c, 3, NAMES)
    assert c.epoch == 2
    c.on_lost("stranger", NAMES, 0.0)
    settle(c, 3, NAMES)
    prepare_all(c, 4, NAMES)
    assert c.epoch == 2


def test_a_group_that_cannot_meet_any_more_is_left_before_the_collective_starts():
    c = PublishCoordinator(10)
    prepare_all(c, 1, NAMES)
    settle(c, 1, NAMES)
    c.on_publish(offer(2), NAMES, 5.0)
    assert c.on_receive_failed(ReceiveFailed(1, 2, "a server of mine was never in it"), "a") == []
    again = sent(c.on_ready(Ready(1, 2), "a", NAMES, 7.0), Prepare)
    assert {name: p.epoch for name, p in again.items()} == {"a": 2, "b": 2}
    assert c.on_ready(Ready(1, 2), "b", NAMES, 7.0) == []  # of the group that was left
    c.on_ready(Ready(2, 2), "a", NAMES, 8.0)
    assert set(sent(c.on_ready(Ready(2, 2), "b", NAMES, 8.0), Go)) == {"a", "b", LEARNER}
    assert sent(settle(c, 2, NAMES), PublishDone)[LEARNER].applied == NAMES
    prepares = sent(c.on_publish(offer(3), NAMES, 9.0), Prepare)
    assert prepares["a"].epoch == 2 and c.late == {}


def test_who_says_so_of_every_group_is_left_out_of_the_version_and_the_others_are_served():
    c = PublishCoordinator(10)
    c.on_publish(offer(1), NAMES, 0.0)
    for _ in range(MAX_REGROUPS + 1):
        assert "a" in c._attempt.members
        c.on_receive_failed(ReceiveFailed(c.epoch, 1, "never"), "a")
        c.on_ready(Ready(c.epoch, 1), "a", NAMES, 0.0)
    assert set(c._attempt.members) == {"b"}
    c.on_ready(Ready(c.epoch, 1), "b", NAMES, 0.0)
    assert sent(settle(c, 1, ["b"]), PublishDone)[LEARNER].dropped == ["a"]


def test_without_receivers_a_version_is_settled_at_once():
    c = PublishCoordinator(10)
    assert sent(c.on_publish(offer(1), [], 0.0), PublishDone)[LEARNER].applied == []
    assert c.published == 1


def test_an_offer_during_a_publish_waits_its_turn_and_a_resend_is_not_a_new_version():
    c = PublishCoordinator(10)
    prepare_all(c, 1, ["a"])
    assert c.on_publish(offer(2), ["a"], 0.0) == []
    settle(c, 1, ["a"])
    assert set(sent(c.on_tick(["a"], 0.0), Prepare)) == {"a"}
    c.on_ready(Ready(c.epoch, 2), "a", NAMES, 0.0)
    settle(c, 2, ["a"])
    prepare_all(c, 2, ["a", "late"])
    settle(c, 2, ["a", "late"])
    assert c.history == [1, 2]


def test_a_lost_learner_ends_what_was_under_way():
    c = PublishCoordinator(10)
    prepare_all(c, 1, ["a"])
    c.on_learner_lost()
    assert not c.busy and c.on_applied(Applied(c.epoch, 1, "d"), "a") == []


def test_a_receiver_that_failed_after_it_was_late_is_served_the_next_version():
    c = PublishCoordinator(10)
    prepare_all(c, 1, ["a", "b"])
    c.on_published(Published(c.epoch, 1, "d", 0.1))
    c.on_applied(Applied(c.epoch, 1, "d"), "b")
    c.on_tick(["a", "b"], 1000.0)  # a was late
    assert c.is_suspended("a")
    c.on_receive_failed(ReceiveFailed(c.epoch, 1, "broken pipe"), "a")
    assert not c.is_suspended("a")
    assert set(sent(c.on_publish(offer(2), ["a", "b"], 1001.0), Prepare)) == {"a", "b"}


def test_a_receiver_with_several_ranks_gets_them_in_another_group():
    c = PublishCoordinator(10)
    c.on_publish(offer(1), NAMES, 0.0)
    assert c.on_ready(Ready(c.epoch, 1), "b", NAMES, 1.0) == []
    again = sent(c.on_ready(Ready(c.epoch, 1, 3), "a", NAMES, 2.0), Prepare)
    assert {n: (p.epoch, p.rank, p.ranks, p.world) for n, p in again.items()} == {"a": (2, 1, 3, 5), "b": (2, 4, 1, 5)}
    c.on_ready(Ready(2, 1, 3), "a", NAMES, 2.0)
    go = sent(c.on_ready(Ready(2, 1), "b", NAMES, 3.0), Go)
    assert go[LEARNER].world == 5 and go[LEARNER].members == NAMES
    settle(c, 1, NAMES)
    prepares, _ = prepare_all_ranks(c, 2, {"a": 3, "b": 1})
    assert c.epoch == 2 and prepares["a"].ranks == 3  # remembered


def prepare_all_ranks(c, version, ranks):
    prepares = sent(c.on_publish(offer(version), list(ranks), 0.0), Prepare)
    out = []
    for name in prepares:
        out = c.on_ready(Ready(c.epoch, version, ranks[name]), name, list(ranks), 0.0)
    return prepares, out


def test_a_receiver_without_ranks_is_left_out_this_time_only():
    c = PublishCoordinator(10)
    c.on_publish(offer(1), NAMES, 0.0)
    again = sent(c.on_ready(Ready(c.epoch, 1, 0), "a", NAMES, 1.0), Prepare)
    assert set(again) == {"b"}
    c.on_ready(Ready(c.epoch, 1), "b", NAMES, 1.0)
    c.on_published(Published(c.epoch, 1, "d", 0.1))
    done = sent(c.on_applied(Applied(c.epoch, 1, "d"), "b"), PublishDone)[LEARNER]
    assert done.applied == ["b"] and done.dropped == ["a"]
    assert set(sent(c.on_publish(offer(2), NAMES, 2.0), Prepare)) == {"a", "b"}


def test_ranks_that_change_for_ever_are_left_out():
    c = PublishCoordinator(10)
    outgoing = c.on_publish(offer(1), NAMES, 0.0)
    for ranks in range(2, 2 + MAX_REGROUPS + 1):
        outgoing = c.on_ready(Ready(c.epoch, 1, ranks), "a", NAMES, 9.0)
    assert set(sent(outgoing, Prepare)) == {"b"}
    assert c.on_tick(NAMES, 9.9) == []  # the deadline is still the first one
    assert sent(c.on_tick(NAMES, 10.5), PublishDone)[LEARNER].dropped == ["a", "b"]


def test_several_receivers_without_ranks_leave_the_others_alone():
    c = PublishCoordinator(10)
    names, messages = ["a", "b", "c"], 0
    waiting = list(sent(c.on_publish(offer(1), names, 0.0), Prepare).items())
    while waiting:
        name, prepare = waiting.pop(0)
        messages += 1
        assert messages < 20
        outgoing = c.on_ready(Ready(prepare.epoch, 1, 1 if name == "b" else 0), name, names, 0.0)
        waiting += sent(outgoing, Prepare).items()
        if go := sent(outgoing, Go):
            assert set(go) == {"b", LEARNER}
    assert c.under_way == 1


def test_one_that_dies_and_comes_back_again_and_again_holds_up_nobody():
    c = PublishCoordinator(10)
    c.on_publish(offer(1), NAMES, 0.0)
    prepared = sent(c.on_lost("b", ["a"], 1.0), Prepare)
    assert set(prepared) == {"a"}
    assert c.on_lost("b", NAMES, 2.0) == []  # it was back, in a group that does not count it
    go = sent(c.on_ready(Ready(c.epoch, 1), "a", NAMES, 3.0), Go)
    assert go["a"].members == ["a"]
    assert sent(settle(c, 1, ["a"]), PublishDone)[LEARNER].dropped == ["b"]
    assert set(sent(c.on_publish(offer(2), NAMES, 4.0), Prepare)) == {"a", "b"}
    c.on_lost("a", ["b"], 5.0)
    assert c.on_lost("a", NAMES, 5.5) == []
    assert set(sent(c.on_lost("b", NAMES, 6.0), Prepare)) == set() and c.published == 2  # nobody is left for it
