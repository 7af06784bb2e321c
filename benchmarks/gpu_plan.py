"""Ten minutes, shared out: which job of the hardware suite runs next, how long it may take, what was left out."""
import time
from collections.abc import Callable
from dataclasses import dataclass, field

TOTAL = 570.0  # seconds
RESERVE = 8.0  # of them for the last table
# Of the time of all chosen groups. A group that has used up its share waits until the others have had theirs; what is
# left at the end goes to the jobs that had to wait. The contract suite, last, may take all that is left when it begins.
SHARES = {"tests": 0.17, "ceilings": 0.04, "graphs": 0.04, "ops": 0.16, "model": 0.11, "compiled models": 0.30,
          "compiled ops": 0.06, "contract": 0.12}
OUT_OF_TIME = "out of time"


@dataclass(frozen=True)
class Job:
    """One thing to measure: `run()` yields rows. It is not begun with less than `least` seconds left.

    A job still running after `cap` seconds hangs, and has failed, unless it `may_be_cut`: compilers take their time.
    """

    part: str
    name: str
    run: Callable
    group: str
    least: float = 6.0
    cap: float = 60.0
    may_be_cut: bool = False


@dataclass
class Deadline:
    """When everything must be written. `since` is when the ten minutes began, on the clock of time.time()."""

    since: float
    total: float = TOTAL
    clock: Callable = time.time

    def left(self):
        """Seconds until nothing more may be measured."""
        return self.since + self.total - RESERVE - self.clock()


@dataclass
class Plan:
    """Deals jobs out. A group that has used up its share waits until every other group has had its own."""

    jobs: list
    deadline: Deadline
    spent: dict = field(default_factory=dict)  # group -> seconds
    left_out: list = field(default_factory=list)  # (job, why)

    def __post_init__(self):
        groups = {job.group for job in self.jobs}
        whole = sum(SHARES[group] for group in groups)
        time_left = max(self.deadline.left(), 0)
        self.shares = {group: time_left * SHARES[group] / whole for group in groups}

    def __iter__(self):
        """(job, seconds it may take), each job at most once."""
        waiting = list(self.jobs)
        for within_share in (True, False):
            for job in list(waiting):
                seconds = self.deadline.left()
                if within_share:
                    seconds = min(seconds, self.shares[job.group] - self.spent.get(job.group, 0))
                if seconds >= job.least:
                    waiting.remove(job)
                    before = self.deadline.left()
                    # a job begun within its share may finish: it is cut at its cap, and at the end of the ten minutes
                    yield job, min(job.cap, self.deadline.left())
                    self.spent[job.group] = self.spent.get(job.group, 0) + before - self.deadline.left()
        self.left_out += [(job, OUT_OF_TIME) for job in waiting]
