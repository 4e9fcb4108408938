"""One engine or server: rows that decode together, simulated between events and not token by token.

All live rows advance one token a step, so a row that starts in step s and has n tokens ends with step
s + n - 1: ends are a heap of step numbers. Between two events the engine *jumps* over many steps at once;
whatever comes in meanwhile is looked at between two steps, as actors do, so a jump is cut at the next one.

::

    turn: take mail -> take weights -> admit what fits -> jump to the next end, whose work it includes -> turn
"""

import heapq
import math
from bisect import bisect_right
from collections import deque
from typing import Any, Protocol

from common.slowness import pause_s
from tools.simulate.clock import Clock, Processors, Task
from tools.simulate.settings import ActorPart

PREFILL_TOKENS = 8192  # as actor.engine.local.PREFILL_TOKENS
EARLIER = 1e-9  # of a step: what rounding may add to a number of whole steps


class Request:
    """Siblings that are sampled together: a group's, or those of a held-out question."""

    __slots__ = ("cancelled", "group", "lengths", "start")

    def __init__(self, group: Any, lengths: list[int], wanted: int) -> None:
        """``lengths`` ascending; siblings beyond the first ``wanted`` end with the last of those, in vain."""
        self.group = group  # what the owner knows it by
        self.lengths = lengths[:wanted]
        self.cancelled = len(lengths) - wanted
        self.start = 0  # steps done when it was admitted

    @property
    def rows(self) -> int:
        """Rows that it takes."""
        return len(self.lengths) + self.cancelled


class Ended:
    """Rows of one request that end with one step."""

    __slots__ = ("cancelled", "request", "rows", "tokens", "versions")

    def __init__(self, request: Request, rows: int, cancelled: int, tokens: int) -> None:
        self.request, self.rows, self.cancelled, self.tokens = request, rows, cancelled, tokens  # tokens: of each row
        self.versions: list[tuple[int, int]] = []  # (version, tokens of each row)


class Owner(Protocol):
    """Whose engine it is."""

    def between(self) -> None:
        """Between two steps: messages may be handled, requests added, :meth:`Engine.update` called."""

    def updated(self, version: int) -> None:
        """``version`` is in use."""

    def ended(self, rows: list[Ended]) -> None:
        """These have ended; the engine goes on."""

    def doing(self, state: str) -> None:
        """From now on the engine does this."""


class Engine:
    """Rows of one engine, on the machine that all share or on its own."""

    def __init__(self, owner: Owner, part: ActorPart, prompt_tokens: int, clock: Clock, cores: Processors) -> None:
        self._owner, self._part, self._prompt, self._clock, self._cores = owner, part, prompt_tokens, clock, cores
        self._slowdown = part.slowdown if cores.contended else 1.0  # a sleep takes no processor
        self._factor = 1.0 if cores.contended else part.slowdown
        self._sleeps = self._slowdown > 1 or part.pace_s > 0
        self._ending_s = 0.0 if part.servers else part.sequence_s  # a server's answers are its actor's work
        self.steps = 0  # done
        self.live = 0  # rows
        self.tokens = 0  # sampled
        self.version = 0
        self._waiting: deque[Request] = deque()
        self._ends: list[tuple[int, int, Request, int, int]] = []  # (last step, order, request, rows, cancelled)
        self._order = 0
        self._changes: list[tuple[int, int]] = [(0, 0)]  # (steps done when it came into use, version)
        self._starts: deque[int] = deque()  # steps done at each admission, oldest first
        self._rows_of: dict[int, int] = {}  # rows by the steps done at their start
        self._staged: deque[tuple[int, float]] = deque()  # versions to be taken into use, and for how long it takes
        self._jump: Task | None = None
        self._planned = 0  # steps of the jump
        self._new = 0  # rows whose first token its only step samples
        self._began = 0.0  # seconds
        self._sleeping = False
        self._occupied = False  # in a turn, or at work that cannot be cut

    @property
    def in_flight(self) -> int:
        """Rows waiting or live."""
        return self.live + sum(request.rows for request in self._waiting)

    @property
    def tokens_live(self) -> int:
        """Sampled of rows that have not ended."""
        return sum((self.steps - start) * rows for start, rows in self._rows_of.items() if rows)

    def add(self, request: Request) -> None:
        """Queue it; :meth:`wake` afterwards unless called from ``between``."""
        self._waiting.append(request)

    def update(self, version: int, seconds: float) -> None:
        """Take ``version`` into use between two steps, which takes so long; :meth:`wake` afterwards."""
        self._staged.append((version, seconds))

    def wake(self) -> None:
        """Something has come: look at it between two steps."""
        if self._jump is not None:
            self._cut(self._jump)
        elif self._sleeping:
            self._owner.between()  # as ActorService._slow_down: messages are answered
        elif not self._occupied:
            self._turn()

    # ---- a turn ---------------------------------------------------------------------------------

    def _turn(self) -> None:
        self._occupied = True
        self._owner.between()
        if self._staged:
            version, seconds = self._staged.popleft()
            self._owner.doing("swap")
            self._cores.start(seconds, self._use, version, threads=self._part.threads)
            return
        prompts = self._admit()
        if prompts:
            self._begin(1, self._cost(1) + self._prefill(prompts))
        elif self.live:
            self._plan_jump()
        else:
            self._occupied = False
            self._owner.doing("idle")

    def _use(self, version: int) -> None:
        self.version = version
        self._changes.append((self.steps, version))
        oldest = self._starts[0] if self._starts else self.steps
        while len(self._changes) > 1 and self._changes[1][0] <= oldest:
            self._changes.pop(0)
        self._owner.updated(version)
        self._turn()

    def _admit(self) -> int:
        """Rows for waiting requests, first in, first out; returns how many prompts are new."""
        prompts = 0
        while self._waiting and self._waiting[0].rows <= self._part.max_sequences - self.live - self._new:
            request = self._waiting.popleft()
            request.start = self.steps
            prompts += 1
            self._new += request.rows
            self._plan_ends(request)
        if prompts:
            self._starts.append(self.steps)
            self._rows_of[self.steps] = self._new
        return prompts

    def _plan_ends(self, request: Request) -> None:
        lengths, index = request.lengths, 0
        while index < len(lengths):
            after = bisect_right(lengths, lengths[index])
            cancelled = request.cancelled if after == len(lengths) else 0
            self._order += 1
            end = (self.steps + lengths[index], self._order, request, after - index, cancelled)
            heapq.heappush(self._ends, end)
            index = after

    # ---- costs ----------------------------------------------------------------------------------

    def _cost(self, steps: int) -> float:
        """Of decoding the live rows so many steps."""
        if not self.live:
            return 0.0
        part, context = self._part, self._context()
        of_context = self.live * part.context_s * (context * steps + steps * (steps - 1) / 2)
        return (steps * (part.step_s + self.live * part.row_s) + of_context) * self._factor

    def _context(self) -> int:
        """Tokens of the longest row when the next is sampled."""
        while self._starts and self._starts[0] not in self._rows_of:
            self._starts.popleft()
        return self._prompt + (self.steps - self._starts[0] if self._starts else 0)

    def _prefill(self, prompts: int) -> float:
        tokens, part = prompts * self._prompt, self._part
        passes = -(-tokens // PREFILL_TOKENS)
        return (passes * part.prefill_s + tokens * part.prefill_token_s) * self._factor

    def _steps_in(self, work: float) -> int:
        """The steps that will be done at the end of the one that ``work`` seconds into a jump is under way."""
        one = self._cost(1)
        grows = self.live * self._part.context_s * self._factor / 2  # the cost of k steps is (one - grows) k + grows k²
        if grows > 0:
            linear = one - grows
            steps = (-linear + math.sqrt(linear * linear + 4 * grows * work)) / (2 * grows)
        else:
            steps = work / one if one else 0.0
        return max(1, math.ceil(steps - EARLIER))

    # ---- jumps ----------------------------------------------------------------------------------

    def _plan_jump(self) -> None:
        until, steps = self._ends[0][0], 1 if self._sleeps else self._ends[0][0] - self.steps
        ending = self._ends[0][3] if steps == until - self.steps else 0
        self._begin(steps, self._cost(steps) + ending * self._ending_s)

    def _begin(self, steps: int, cost: float) -> None:
        self._owner.doing("sample")
        self._planned, self._began = steps, self._clock.now
        self._jump = self._cores.start(cost, self._landed, threads=self._part.threads)

    def _cut(self, jump: Task) -> None:
        """End the jump with the step that is under way."""
        done = self._cores.work - jump.start
        if self._planned == 1 or (steps := self._steps_in(done)) >= self._planned:
            return
        self._cores.stop(jump)
        self._planned = steps
        left = max(0.0, self._cost(steps) - done)
        self._jump = self._cores.start(left, self._landed, threads=self._part.threads)
        self._jump.start -= done  # the same jump, should it be cut again

    def _landed(self) -> None:
        self._jump = None
        if self._sleeps:
            self._sleeping = True
            took = self._clock.now - self._began
            self._clock.after(pause_s(self._slowdown, self._part.pace_s, took, took), self._stepped)
        else:
            self._stepped()

    def _stepped(self) -> None:
        self._sleeping = False
        self.live, self._new = self.live + self._new, 0
        self.steps += self._planned
        self.tokens += self.live * self._planned
        if self._ends and self._ends[0][0] <= self.steps:
            self._owner.ended(self._take_ended())
        self._turn()

    def _take_ended(self) -> list[Ended]:
        ended = []
        while self._ends and self._ends[0][0] <= self.steps:
            _, _, request, rows, cancelled = heapq.heappop(self._ends)
            one = Ended(request, rows, cancelled, self.steps - request.start)
            one.versions = self._versions(request.start)
            self.live -= rows + cancelled
            self._rows_of[request.start] -= rows + cancelled
            if not self._rows_of[request.start]:
                del self._rows_of[request.start]
            ended.append(one)
        return ended

    def _versions(self, start: int) -> list[tuple[int, int]]:
        """(version, tokens) of a row that was admitted when ``start`` steps were done and ends now."""
        found, end = [], self.steps
        for since, version in reversed(self._changes):
            begin = max(since, start)
            if end > begin:
                found.append((version, end - begin))
            end = min(end, begin)
            if since <= start:
                break
        return found
