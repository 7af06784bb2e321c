"""The process that touches the GPU: it takes the names of jobs, one a line, and answers with rows, as lines of JSON.

A kernel that hangs or breaks the CUDA context takes this process with it and not the suite, which starts another.
"""
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field


@dataclass
class Outcome:
    """What became of a job: its rows so far, why it failed (or None), whether its time ran out."""

    rows: list = field(default_factory=list)
    failed: str | None = None
    timed_out: bool = False
    seconds: float = 0.0


class Worker:
    """The other side of `serve`: a process that is started when needed, and again after it broke."""

    def __init__(self, command, environment=None):
        self.command, self.environment = command, environment
        self.process = None

    def _start(self):
        self.answers = answers = queue.Queue()
        self.process = process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                                  env=self.environment, text=True, start_new_session=True)

        def read():
            for line in process.stdout:
                answers.put(line)
            answers.put(None)

        threading.Thread(target=read, daemon=True).start()

    def run(self, name, seconds):
        """The Outcome of the job, after `seconds` at most."""
        outcome, began = Outcome(), time.monotonic()
        if self.process is None or self.process.poll() is not None:
            self._start()
        try:
            self.process.stdin.write(name + "\n")
            self.process.stdin.flush()
            while True:
                line = self.answers.get(timeout=max(began + seconds - time.monotonic(), 0))
                if line is None:
                    outcome.failed = f"the measuring process ended with status {self.process.wait()}"
                    self.stop()
                    break
                answer = json.loads(line)
                if "row" in answer:
                    outcome.rows.append(answer["row"])
                    continue
                outcome.failed = answer["failed"]
                if answer["broken"]:
                    self.stop()
                break
        except BrokenPipeError:
            outcome.failed = f"the measuring process ended with status {self.process.wait()}"
            self.stop()
        except queue.Empty:
            outcome.timed_out = True
            self.stop()
        outcome.seconds = time.monotonic() - began
        return outcome

    def stop(self):
        """End the process and what it started; nothing happens where there is none."""
        if self.process is not None:
            end_group(self.process)
            self.process = None


def end_group(process):
    """Kill a process of ours that leads its own session, with its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def serve(jobs, device, lines, answer):
    """Run the jobs {name: Job} that `lines` name, until one breaks the device; returns the exit code."""
    for line in lines:
        failed = None
        try:
            for row in jobs[line.strip()].run():
                answer({"row": row})
            device.synchronize()
        except Exception as error:  # noqa: BLE001  whatever it is, it is told and the other jobs go on
            traceback.print_exc()
            failed = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        broken = failed is not None and is_broken(device)
        if not broken:
            device.release()
        answer({"failed": failed, "broken": broken})
        if broken:
            return 1
    return 0


def is_broken(device):
    """Whether the device answers no more after an error: CUDA errors stay until the process ends."""
    try:
        device.synchronize()
    except RuntimeError:
        return True
    return False


def main(dry_run):
    """Serve this process's stdin. Answers go to the stdout it was given; whatever prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(message):
        answers.write(json.dumps(message, allow_nan=False) + "\n")
        answers.flush()

    from benchmarks import gpu  # after stdout is safe: torch takes seconds, and may print

    device = gpu.device_of(dry_run)
    device.install()
    return serve({job.name: job for job in gpu.all_jobs(device)}, device, sys.stdin, answer)


if __name__ == "__main__":
    sys.exit(main("--dry-run" in sys.argv[1:]))
