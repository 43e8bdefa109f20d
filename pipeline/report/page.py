"""One page about one run or several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape

import numpy as np

from pipeline.report import accounting
from pipeline.report.chart import Figure
from pipeline.report.document import charts, document
from pipeline.report.figures import COLOURS, ENDINGS
from pipeline.report.ledger import Epoch
from pipeline.report.markup import Cell, Html, cards, key, table, tag
from pipeline.report.record import Run
from pipeline.report.words import APART, NEVER, differing, duration, fraction, value_of, written


def page(
    runs: Sequence[Run],
    sections: Sequence[tuple[str, Sequence[Figure]]],
    targets: Sequence[float],
    ledgers: Mapping[str, Sequence[Epoch]],
    *,
    command: str,
    now: datetime,
) -> str:
    """targets: top-1 that are asked for. ledgers: by the name of a run. command: that makes the page again."""
    names = ", ".join(run.name for run in runs)
    body: list[Html] = [
        tag("h1", names),
        tag("p", f"{_what(runs)} · {now.astimezone(UTC):%Y-%m-%d %H:%M} UTC", kind="soft"),
        *(Html(f'<p class="warn">{escape(run.name)}: {escape(note)}</p>') for run in runs for note in run.notes),
        *(
            Html(f'<p class="warn">{escape(_of(runs, run))}{escape(sentence)}</p>')
            for run in runs
            for sentence in run.ranks.sentences(run.train)
        ),
        _overview(runs),
        tag("h2", "Steps to target"),
        _targets(runs, targets),
    ]
    for title, figures in sections:
        if figures:
            body += [tag("h2", title), *([_legend(runs)] if len(runs) > 1 else []), charts(figures)]
    body += [_layers(runs)]
    body += [tag("h2", "Starts"), _starts(runs), tag("h2", "Machines"), _machines(runs)]
    if ledgers:
        body += [tag("h2", "Samples"), _ledgers(runs, ledgers)]
    body += [tag("h2", "Config"), _config(runs)]
    return document(names, body, command)


def _of(runs: Sequence[Run], run: Run) -> str:
    return f"{run.name}: " if len(runs) > 1 else ""


def _what(runs: Sequence[Run]) -> str:
    return "A run of pipeline" if len(runs) == 1 else f"{len(runs)} runs of pipeline"


def _legend(runs: Sequence[Run]) -> Html:
    items = "".join(f"<span>{key(number % COLOURS).text}{escape(run.name)}</span>" for number, run in enumerate(runs))
    return Html(f'<div class="legend">{items}</div>')


def _named(number: int, name: str) -> Html:
    """The number-th run by its colour and name."""
    return Html(f'<span class="run">{key(number % COLOURS).text}{escape(name)}</span>')


def _overview(runs: Sequence[Run]) -> Html:
    if len(runs) == 1:
        return cards([("state", runs[0].state), *_facts(runs[0])])
    facts = [_facts(run) for run in runs]
    rows: list[list[Cell]] = [
        [_named(number, run.name), _state(run), *(value for _, value in values)]
        for number, (run, values) in enumerate(zip(runs, facts, strict=True))
    ]
    return table(["run", "state", *(name for name, _ in facts[0])], rows, numbers=range(2, 2 + len(facts[0])))


def _facts(run: Run) -> list[tuple[str, str]]:
    speed = run.train["images_per_s"]
    speed = speed[np.isfinite(speed)]
    found = accounting.account(run)
    epochs = max((float(t["epoch"][-1]) for t in (run.train, run.val) if len(t["epoch"])), default=0.0)
    hours = max((float(accounting.running_hours(run, t)[-1]) for t in (run.train, run.val) if len(t["step"])),
                default=math.nan)  # fmt: skip
    return [
        ("best top-1", fraction(accounting.best_top1(run))),
        ("newest top-1", fraction(float(run.val["top1"][-1]) if len(run.val["top1"]) else math.nan)),
        ("steps", f"{run.steps:,}"),
        ("epochs", f"{epochs:.4g}"),
        ("running", duration(hours)),
        ("goodput", fraction(found.goodput if found else math.nan)),
        ("images/s, median", f"{float(np.median(speed)):,.0f}" if len(speed) else "–"),
        ("starts", str(len(run.starts))),
    ]


def _state(run: Run) -> Html:
    colour = ENDINGS.get(run.state, 7)
    return Html(f'<span class="state" style="color:var(--c{colour})">{escape(run.state)}</span>')


def _targets(runs: Sequence[Run], targets: Sequence[float]) -> Html:
    """Figure 3 of Ioffe & Szegedy 2015: steps to the target, and the most that was reached."""
    if not any(len(run.val["top1"]) for run in runs):
        return tag("p", "No validation yet.", kind="soft")
    head = ["run", *(f"steps to {fraction(target)}" for target in targets), "max top-1", "at step"]
    if len(targets) == 1:
        head[2:2] = ["epochs", "time", "× fewer steps"]
    reference = accounting.first_at(runs[0], targets[0])
    rows: list[list[Cell]] = []
    for number, run in enumerate(runs):
        reached = [accounting.first_at(run, target) for target in targets]
        row: list[Cell] = [_named(number, run.name)]
        row += [f"{each.step:,}" if each else NEVER for each in reached]
        first = reached[0]
        if len(targets) == 1:
            ratio = f"{reference.step / first.step:.3g}" if reference and first else "–"
            row += [f"{first.epoch:.4g}", duration(first.hours), ratio] if first else ["–", "–", "–"]
        best = accounting.best_top1(run)
        top = accounting.first_at(run, best) if math.isfinite(best) else None
        row += [fraction(best), f"{top.step:,}" if top else "–"]
        rows.append(row)
    return table(head, rows, numbers=range(1, len(head)))


def _layers(runs: Sequence[Run]) -> Html:
    """Of each figure the layers that stand out at the newest look."""
    rows: list[list[Cell]] = []
    for number, run in enumerate(runs):
        for name, values in run.norms.values.items() if run.norms else ():
            newest = np.where(np.isfinite(values[-1]), values[-1], -math.inf)
            most = [i for i in np.argsort(-newest, kind="stable")[:3] if newest[i] > 0]
            if most and run.norms:
                said = ", ".join(f"{run.norms.layers[i]} ({newest[i]:.3g})" for i in most)
                rows.append([_named(number, run.name), name.replace("_", " "), said])
    if not rows:
        return Html("")
    return Html(f"<details><summary>Layers that stand out at the newest look</summary>"
                f"{table(['run', 'figure', 'most'], rows).text}</details>")  # fmt: skip


def _starts(runs: Sequence[Run]) -> Html:
    rows: list[list[Cell]] = []
    for number, run in enumerate(runs):
        ended = accounting.ends(run)
        again = [*accounting.lost_steps(run)[1:], 0][: len(ended)]
        for count, (start, end, lost) in enumerate(zip(run.starts, ended, again, strict=True), 1):
            follower = run.starts[count] if count < len(run.starts) else None
            torch, code = f", torch {start.torch}" * bool(start.torch), f", code {start.code}" * bool(start.code)
            device = f"{start.device or '–'}{torch}{code}"
            rows.append([
                _named(number, f"{run.name} {count}"),
                f"{datetime.fromtimestamp(start.at, tz=UTC):%Y-%m-%d %H:%M:%S}",
                duration((end - start.at) / 3600),
                f"{start.step:,}", f"{follower.step if follower else run.steps:,}", f"{lost:,}" if lost else "–",
                str(start.ranks), device, start.ended,
            ])  # fmt: skip
    if not rows:
        return tag("p", "Nothing is known of starts.", kind="soft")
    head = ["start", "at (UTC)", "for", "from step", "kept to step", "steps done again", "ranks", "on", "ended"]
    return table(head, rows, numbers=(2, 3, 4, 5, 6))


def _machines(runs: Sequence[Run]) -> Html:
    seen: dict[str, list[tuple[str, int]]] = {}
    for run in runs:
        for count, start in enumerate(run.starts, 1):
            for machine, ranks in start.machines:
                seen.setdefault(machine, []).append((f"{run.name} {count}", ranks))
    if not seen:
        return tag("p", "These runs noted none.", kind="soft")
    rows: list[list[Cell]] = []
    for machine, uses in sorted(seen.items()):
        counts = sorted({ranks for _, ranks in uses})
        rows.append([machine, f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0]),
                     _listed([name for name, _ in uses])])  # fmt: skip
    return table(["machine", "ranks on it", "starts"], rows, numbers=(1,))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:5])} and {len(names) - 5} more"


def _ledgers(runs: Sequence[Run], ledgers: Mapping[str, Sequence[Epoch]]) -> Html:
    rows: list[list[Cell]] = []
    for number, run in enumerate(runs):
        for each in ledgers.get(run.name, ()):
            left = run.images - each.samples if run.images else 0
            rows.append([
                _named(number, run.name), str(each.epoch), f"{each.steps:,}",
                f"{each.samples:,}", f"{left:,}" if run.images else "–", f"{each.twice:,}",
                _verdict(run, each, ledgers[run.name]),
            ])  # fmt: skip
    head = ["run", "epoch", "steps", "samples", "not trained on", "twice", ""]
    twice = sum(each.twice for found in ledgers.values() for each in found)
    samples = sum(each.samples for found in ledgers.values() for each in found)
    said = (
        f"{samples:,} samples, none of them twice in an epoch." if not twice
        else f"{twice:,} of {samples:,} samples stand twice in an epoch."
    )  # fmt: skip
    summary = tag("p", said, kind="warn" if twice else "")
    return Html(
        f"{summary.text}<details><summary>Every epoch</summary>{table(head, rows, (1, 2, 3, 4, 5)).text}</details>"
    )


def _verdict(run: Run, epoch: Epoch, found: Sequence[Epoch]) -> str:
    if epoch.twice:
        return "samples stand twice: where a bad one was replaced (bad-samples/), or a fault"
    batch = run.config.get("data.global_batch_size")
    if run.images and isinstance(batch, int) and epoch.steps == run.images // batch:
        return "exactly once, the epoch is whole" if epoch.samples == epoch.steps * batch else "steps are left out"
    return "exactly once, so far" if epoch is found[-1] else "exactly once, of the steps that are there"


def _config(runs: Sequence[Run]) -> Html:
    if len(runs) == 1:
        rows: list[list[Cell]] = [[tag("code", name), written(value)] for name, value in runs[0].config.items()]
        axes = " × ".join(str(runs[0].config.get(f"run.{axis}") or "–") for axis in ("recipe", "data", "cluster"))
        return Html(f"{tag('p', axes).text}<details><summary>All {len(rows)} keys</summary>"
                    f"{table(['key', 'value'], rows).text}</details>")  # fmt: skip
    keys = dict.fromkeys(name for run in runs for name in run.config)
    names = differing(runs)
    if not names:
        return tag("p", "The runs have the same config.", kind="soft")
    heads = [_named(number, run.name) for number, run in enumerate(runs)]
    same = f"{len(keys) - len(names) - len([name for name in APART if name in keys])} other keys are the same."
    rows = [[tag("code", name), *(value_of(run, name) for run in runs)] for name in names]
    return Html(f"{table(['key', *heads], rows).text}{tag('p', same, kind='soft').text}")
