"""A whole QLoRA training step, beside bf16 + PEFT and bitsandbytes + PEFT: seconds and memory.

Each variant trains the same small Llama in a process of its own; the processes take turns.

python benchmarks/bench_train_step.py [--rounds N] [--isa SET] [--goals] [--profile] [--json FILE]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

import report
from goals import judge
from harness import OURS, Row, restart_with, summarise
from isa import ISA_SETTINGS, isa_environment
from machine import OthersCpu, require_quiet
from train_step_variants import VARIANTS, Settings

_KEPT = ("losses", "peak_bytes")  # of a worker's last answer, in the JSON
_WORKER = Path(__file__).with_name("train_step_variants.py")


class Worker:
    """A process that trains a variant when it is told to."""

    def __init__(self, variant: str, settings: Settings, threads: int) -> None:
        command = [sys.executable, str(_WORKER), variant, json.dumps(asdict(settings))]
        self.variant = variant
        self.seconds: list[float] = []
        # A pipe that nobody reads would fill up.
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*command, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        self.built = self._answer()

    def order(self, text: str) -> dict:
        """Have it do something and wait."""
        print(text, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise SystemExit(f"{self.variant} failed:\n{self.log.read()[-4000:]}")
        return json.loads(line)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="in a round, timed")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before the first round")
    parser.add_argument("--vocabulary", type=int, default=Settings.vocabulary)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", choices=ISA_SETTINGS, help="of ours and of torch's")
    parser.add_argument("--goals", action="store_true", help="print which goals were met")
    parser.add_argument("--profile", action="store_true", help="show where our step's time goes")
    parser.add_argument("--force", action="store_true", help="run on a machine that is in use")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    restart_with(isa_environment(arguments.isa))
    require_quiet(arguments.force)
    others = OthersCpu()
    settings = Settings(vocabulary=arguments.vocabulary)
    # One after the other: building is timed as well.
    workers = [Worker(variant, settings, arguments.threads) for variant in VARIANTS]
    for worker in workers:
        worker.order(f"steps {arguments.warm_up}")
    for done in range(arguments.rounds):
        print(f"[{done + 1}/{arguments.rounds}] round ...", file=sys.stderr, flush=True)
        for worker in workers:
            time.sleep(0.05)  # the threads of the one before are asleep then
            # The first step of a turn has to get its weights into the caches again.
            result = worker.order(f"steps {1 + arguments.steps}")
            worker.seconds += result["seconds"][1:]
            worker.result = result

    header = report.describe_run(
        settings=asdict(settings),
        trainable=workers[0].built["trainable"],
        variants={w.variant: w.built | {k: w.result[k] for k in _KEPT} for w in workers},
    )
    times = {worker.variant: summarise([1e3 * s for s in worker.seconds]) for worker in workers}
    size = f"{settings.layers} layers of {settings.hidden}, {settings.batch}×{settings.tokens}"
    row = Row(f"training step, {size}", "training step", None, size, times)
    row.verdicts = judge(row, str(header["isa"]))
    _print_table(workers, row)
    for verdict in row.verdicts if arguments.goals else ():
        print(f"{'met' if verdict.met else 'MISSED'} {verdict.wanted} ({verdict.reached})")
    if arguments.profile:
        print(workers[0].order("profile 3")["table"])
    for worker in workers:
        worker.process.stdin.close()
        worker.process.wait()
    header["others_share_of_cpu"] = _others_share(others)
    if arguments.json:
        report.write_json(arguments.json, header, [row])
    if arguments.goals and any(not verdict.met for verdict in row.verdicts):
        sys.exit(1)


def _print_table(workers: list[Worker], row: Row) -> None:
    print("| Variant | step, s (p20–p80) | × ours | peak RSS, MB | build, s | losses |")
    print("|---|---|---|---|---|---|")
    for worker in workers:
        times, losses = row.times[worker.variant], worker.result["losses"]
        ratio = "" if worker.variant == OURS else f"{row.ratio(worker.variant):.2f}×"
        shown = ", ".join(
            f"{loss:.3f}" for loss in (losses[0], losses[len(losses) // 2], losses[-1])
        )
        print(
            f"| {worker.variant} | {times.median_ms / 1e3:.3f} ({times.p20_ms / 1e3:.3f}–"
            f"{times.p80_ms / 1e3:.3f}) | {ratio} | {worker.result['peak_bytes'] / 1e6:,.0f} "
            f"(built: {worker.built['built_bytes'] / 1e6:,.0f}) "
            f"| {worker.built['build_seconds']:.1f} | {shown} |"
        )


def _others_share(others: OthersCpu) -> float:
    """The workers have ended: their time counts as this process's children's."""
    share = others.share()
    if share > 0.03:
        print(f"WARNING: others used {share:.0%} of the processor meanwhile.")
    return round(share, 4)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
