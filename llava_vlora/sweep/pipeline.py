"""A whole sweep: data, trainings, answers, tables."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from ..benchmarks import find
from ..demo.process import progress_bar
from ..errors import ConfigError, listing
from ..evaluation.files import alone, write_json, write_text
from ..sceneqa import write_benchmarks
from . import results, state, tables
from .flags import lost_files
from .plan import Run, Step, plan
from .running import Place, run_steps
from .spec import Spec


@dataclass(frozen=True)
class Sweep:
    """A sweep file, and which part of it to do now."""

    spec: Spec
    console: Console
    place: Place
    only: tuple[str, ...] = ()
    """Names of variants; all without any."""

    def run(self) -> int:
        """Do what is left; returns 0, or 1 if a step failed.

        Raises:
            VLoRAError: Data are missing, a variant of ``only`` is unknown, or another sweep works in the folder.
        """
        chosen = self._chosen()
        lost = self._lost()
        if lost:
            raise ConfigError(f"{lost[0]}, which is not there. Put it there, or correct the path.")
        for launcher in (self.spec.launcher, self.spec.evaluate.launcher):
            self.place.check(launcher)
        with alone(self.spec.out / ".lock", "sweep"):
            self._write_scenes()
            for name in self.spec.evaluate.benchmarks:
                find(name).read(self.spec.evaluate.data)  # now, and not after days of training
            runs = plan(self.spec)
            steps = self._todo(runs, chosen)
            self._say(self._counted(runs, steps, chosen))
            failures = run_steps(steps, self.place, self.console)
            self.report()
        for failure in failures:
            self._say(f"\n{failure.reason}", "bold red")
        if failures:
            self._say(f"\n{len(failures)} steps have no result; the same command tries them again.")
        return 1 if failures else 0

    def dry_run(self) -> None:
        """Print the commands that are left, in their order, and their number; nothing is written."""
        chosen, runs = self._chosen(), plan(self.spec)
        steps = self._todo(runs, chosen)
        for step in steps:
            self._say(f"# {step.title}: {self._users(step, runs)}\n{shlex.join(step.command)}\n")
        for lost in self._lost():
            self._say(f"MISSING: {lost}", "bold red")
        self._say(self._counted(runs, steps, chosen))

    def report(self) -> None:
        """Write ``sweep.json``, ``sweep.md``, ``sweep.csv`` and ``sweep.png``, and print the tables."""
        from ..report.plots import save
        from .plot import sweep_plot

        out, result = self.spec.out, results.collect(self.spec, plan(self.spec))
        write_json(out / "sweep.json", result)
        write_text(out / "sweep.md", tables.markdown(result))
        write_text(out / "sweep.csv", tables.comma_separated(result))
        save(sweep_plot(result), out / "sweep.png")
        tables.show(result, self.console)
        self._say(f"Written: {out}/sweep.json, sweep.md, sweep.csv, sweep.png")

    def _lost(self) -> list[str]:
        """Data of trainings that are not there, each named once with a variant that needs it."""
        found: dict[str, str] = {}
        for variant in self.spec.variants:
            for what in lost_files(variant.flags, self.spec.out):
                found.setdefault(what, f"{variant.place} ({variant.name}): {what}")
        return list(found.values())

    def _chosen(self) -> tuple[str, ...]:
        names = [variant.name for variant in self.spec.variants]
        unknown = [name for name in self.only if name not in names]
        if unknown:
            raise ConfigError(
                f"--only: {self.spec.file} has no variant {listing(unknown)}; valid: {listing(names)}."
            )
        return self.only or tuple(names)

    def _todo(self, runs: Sequence[Run], chosen: Sequence[str]) -> list[Step]:
        steps = [
            s for run in runs if run.variant.name in chosen for s in state.todo(self.spec, run)
        ]
        return list({step.key: step for step in steps}.values())

    def _counted(self, runs: Sequence[Run], todo: Sequence[Step], chosen: Sequence[str]) -> str:
        all_ = {s.key: s for run in runs if run.variant.name in chosen for s in run.steps}
        kinds = dict.fromkeys(step.kind for step in all_.values())
        parts = [
            f"{sum(s.kind == kind for s in todo)} of {sum(s.kind == kind for s in all_.values())} {kind}"
            for kind in kinds
        ]
        return (
            f"{len(chosen)} variants, {len(self.spec.seeds)} seeds: {len(todo)} of {len(all_)} steps to do "
            f"({', '.join(parts)})"
        )

    def _users(self, step: Step, runs: Sequence[Run]) -> str:
        names = [r.variant.name for r in runs if step.key in {s.key for s in r.steps}]
        return f"for {', '.join(names)}"

    def _write_scenes(self) -> None:
        scenes = self.spec.scenes
        if scenes is None or scenes.root(self.spec.out).exists():
            return
        root = scenes.root(self.spec.out)
        with progress_bar(self.console) as progress:
            progress.disable = not self.console.is_terminal
            task = progress.add_task("draw images", total=scenes.train_images + scenes.test_images)
            write_benchmarks(
                root,
                scenes.size,
                scenes.seed,
                scenes.train_images,
                scenes.test_images,
                progress=lambda done, _: progress.update(task, completed=done),
            )

    def _say(self, text: str, style: str = "") -> None:
        self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
