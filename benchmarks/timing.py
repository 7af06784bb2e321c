"""Timing contenders against each other: in turns, in one process, medians.

A ratio is only worth printing if both sides met the same machine, so every repetition times every contender once, and
the order rotates from one repetition to the next. A short call is repeated until one measurement lasts long enough for
the clock; everything is called at least twice before it counts.
"""
import gc
import math
import statistics
import time
from dataclasses import asdict, dataclass

RUNS = 7
LEAST = 2e-3  # seconds that one measurement lasts at least


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of `runs` measurements of `inner` calls each."""

    seconds: float
    spread: float  # inter-quartile range over median
    runs: int
    inner: int


def interleaved(contenders, runs=RUNS, least=LEAST, seconds=None, pause=0.0):
    """{name: Timing} of the functions in `contenders` {name: function without arguments}.

    seconds(function, inner) measures `inner` calls and returns the seconds of one; default: this process's clock.
    pause: seconds before every measurement. Engines with threads of their own need it: these go on spinning for a
    while when their call is done, on the cores of whoever comes next.
    """
    if runs < RUNS:
        raise ValueError(f"interleaved: {runs} runs; expected at least {RUNS} for a median")
    seconds = seconds or _seconds
    inner = {name: _warm_up(function, least, seconds) for name, function in contenders.items()}
    samples = {name: [] for name in contenders}
    names = list(contenders)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection would hit whichever contender happens to run
    try:
        for run in range(runs):
            first = run % len(names)
            for name in names[first:] + names[:first]:
                time.sleep(pause)
                samples[name].append(seconds(contenders[name], inner[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: summary(samples[name], inner[name]) for name in names}


def versus(contenders, ours="difuse", **options):
    """The part of a row that holds speeds: "times" per contender and "ratios", how many times faster `ours` is.

    options: those of `interleaved`.
    """
    timings = interleaved(contenders, **({"least": LEAST} | options))
    ratios = {name: timing.seconds / timings[ours].seconds for name, timing in timings.items() if name != ours}
    return {"times": {name: asdict(timing) for name, timing in timings.items()}, "ratios": ratios}


def summary(samples, inner):
    """Median and spread of measurements given in seconds per call."""
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, (high - low) / median, len(samples), inner)


def _warm_up(function, least, seconds):
    """Calls until caches, allocators and clocks have settled; returns how many calls last `least` seconds."""
    function()
    inner = 1
    while (one := seconds(function, inner)) * inner < least:
        inner = max(2 * inner, math.ceil(least / max(one, 1e-9)))
    return inner


def _seconds(function, inner):
    began = time.perf_counter()
    for _ in range(inner):
        function()
    return (time.perf_counter() - began) / inner
