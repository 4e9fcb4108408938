"""A strict reader of Chrome traces, with the rules by which Perfetto's importer draws them. It knows no croupier.

Perfetto itself, as its page brings it along, is asked in tests/browser.
"""

import gzip
import json
from collections import defaultdict


def load_trace(path):
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return json.loads(text)


def check_trace(trace):
    """Raises AssertionError, naming the event; returns the slices by (process name, thread name)."""
    events = trace["traceEvents"]
    processes, threads = names_of(events)
    rows = defaultdict(list)
    flows = defaultdict(list)
    numbers = {}
    for event in events:
        phase = event["ph"]
        assert phase in ("X", "i", "C", "M", "s", "t", "f"), event
        assert isinstance(event["pid"], int) and event["pid"] in processes, event
        if phase == "M":
            continue
        assert isinstance(event["ts"], int | float) and event["ts"] >= 0, event
        assert isinstance(event["name"], str) and event["name"], event
        if phase == "C":
            assert event["args"] and all(isinstance(v, int | float) for v in event["args"].values()), event
            continue
        where = event["pid"], event["tid"]
        assert where in threads, event
        if phase == "X":
            assert event["dur"] >= 0, event
            rows[where].append((ns(event["ts"]), ns(event["ts"]) + ns(event["dur"]), event["name"]))
        elif phase == "i":
            assert event["s"] in ("t", "p", "g"), event
        else:
            assert isinstance(event["id"], int) and numbers.setdefault(event["id"], event["cat"]) == event["cat"], event
            flows[event["cat"], event["id"]].append((phase, ns(event["ts"]), where, event.get("bp")))
    for where, slices in rows.items():
        check_nesting(threads[where], slices)
    for number, hops in flows.items():
        check_flow(number, hops, rows)
    return {(processes[pid], threads[pid, tid]): slices for (pid, tid), slices in rows.items()}


def ns(us):
    return round(us * 1000)


def names_of(events):
    """Every process and thread is named once, and has a place of its own."""
    processes, threads, places = {}, {}, defaultdict(set)
    for event in events:
        if event["ph"] != "M":
            continue
        where = (event["pid"], event["tid"])
        if event["name"] == "process_name":
            assert event["pid"] not in processes, event
            processes[event["pid"]] = event["args"]["name"]
        elif event["name"] == "thread_name":
            assert where not in threads, event
            threads[where] = event["args"]["name"]
        elif event["name"].endswith("sort_index"):
            place = event["args"]["sort_index"]
            kind = (event["name"], event["pid"] if event["name"].startswith("thread") else 0)
            assert place not in places[kind], event
            places[kind].add(place)
    assert len(set(processes.values())) == len(processes)
    return processes, threads


def check_nesting(thread, slices):
    """On a thread, two slices are apart or one lies within the other; the outer one comes first."""
    around = []
    for start, end, name in sorted(slices, key=lambda s: (s[0], -s[1])):
        while around and around[-1][0] <= start:
            around.pop()
        assert not around or end <= around[-1][0], f"{thread}: {name} overlaps {around[-1][1]}"
        around.append((end, name))


def check_flow(number, hops, rows):
    """One beginning, one end, in the order of time, each within a slice of its thread."""
    phases = [phase for phase, *_ in sorted(hops, key=lambda hop: hop[1])]
    assert phases[0] == "s" and phases[-1] == "f" and set(phases[1:-1]) <= {"t"} and len(phases) >= 2, (number, hops)
    for phase, at, where, binding in hops:
        assert any(start <= at <= end for start, end, _ in rows[where]), (number, phase, at)
        assert phase != "f" or binding == "e"
    if number[0] == "trajectory":  # ours are never on an edge, where the neighbour might be meant
        moments = [at for _, at, _, _ in hops]
        assert moments == sorted(set(moments)), (number, hops)
        for _, at, where, _ in hops:
            assert any(start < at < end for start, end, _ in rows[where]), (number, at)
