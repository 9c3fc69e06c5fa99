"""The page of `qmamba bench`, from its JSON alone."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qmamba_cli.html.charts import Bar, bar_chart
from qmamba_cli.html.page import Block, Column, Figure, Section, Subheading, Table, Text, render_page
from qmamba_cli.html.scale import number, percent, real

_QUANTITIES = (("First token", "first_token_ms"), ("Each token after it", "token_ms"))
_FLOAT, _QUANTIZED = 7, 0


def bench_page(record: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        record: what `qmamba bench --json` prints.
    """
    settings, own = record["settings"], record.get("qmamba") or {}
    artifact = own.get("artifact")
    facts = {
        "model": f"{record['model']}{', partial' if record.get('partial') else ''}",
        **({} if artifact is None else {"file": artifact["digest"][:12]}),
        "device": record["machine"].get("device", "n/a"),
        "prompts timed": f"{settings['repeat']:,}",
        "steps timed": f"{settings['new_tokens']:,}",
        "version": record["machine"].get("qmamba-cli", "n/a"),
    }
    return render_page(
        f"Times of {record['model']}",
        bench_sections(record),
        lead=headline(record),
        facts=facts,
        footer=f"Made by: {record['command']}" if record.get("command") else "",
    )


def headline(record: Mapping[str, Any]) -> str:
    """The finding in one sentence: the quantized mode that gains most on the float model."""
    rows = [row for row in record["rows"] if row["measured"] is not None and _tone(row) == _QUANTIZED]
    compared = [row for row in rows if row["token_speedup"] is not None]
    if not compared:
        return ""
    best = max(compared, key=lambda row: float(row["token_speedup"]))
    spread = best["measured"]["token_ms"]
    return (
        f"On {record['machine'].get('device', 'this machine')} mode {best['mode']}, {best['weights']}, makes "
        f"a token in {number(real(spread['median']))} ms at batch {best['batch_size']} (quartiles "
        f"{number(real(spread['low']))} to {number(real(spread['high']))}, "
        f"{record['settings']['new_tokens']} steps), {number(real(best['token_speedup']))} times the float "
        "model's speed, the most of all modes."
    )


def bench_sections(record: Mapping[str, Any]) -> list[Section]:
    """The sections, for a page of several commands' outcomes."""
    cases: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for row in record["rows"]:
        cases.setdefault((row["batch_size"], row["prompt_length"]), []).append(row)
    sections = [
        Section(
            heading=f"Batch {batch}, prompts of {length:,} tokens", blocks=_case(rows, record["settings"])
        )
        for (batch, length), rows in cases.items()
    ]
    machine = ", ".join(f"{name} {value}" for name, value in record["machine"].items())
    notes: list[Block] = [Text(text=f"{_capital(machine)}.")]
    notes += [Text(text=f"{_capital(note)}.") for note in record["notes"]]
    return [*sections, Section(heading="Machine", blocks=notes)]


def _case(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    for title, field in _QUANTITIES:
        bars = [
            Bar(
                label=f"{row['mode']}, {row['weights']}",
                value=None if row["measured"] is None else real(row["measured"][field]["median"]),
                interval=None
                if row["measured"] is None
                else (float(row["measured"][field]["low"]), float(row["measured"][field]["high"])),
                tone=_tone(row),
            )
            for row in rows
        ]
        chart = bar_chart(title, bars, unit="milliseconds; shorter is better")
        count = settings["repeat"] if field == "first_token_ms" else settings["new_tokens"]
        caption = f"{title}: median and quartiles, n = {count}. Grey: the float model."
        blocks.append(Figure(svg=chart, caption=caption))
    blocks.append(_table(rows))
    for row in rows:
        blocks += _stages(row)
    return blocks


def _stages(row: Mapping[str, Any]) -> list[Block]:
    """Where the time of one model goes, if it was asked for."""
    measured = row["measured"] or {}
    prompt, step = measured.get("prompt_breakdown") or {}, measured.get("decode_breakdown") or {}
    if not prompt:
        return []
    wholes = [math.fsum(map(float, parts.values())) for parts in (prompt, step)]
    cells = []
    for stage in dict.fromkeys((*prompt, *step)):
        cell = [stage]
        for parts, whole in zip((prompt, step), wholes, strict=True):
            ms = float(parts.get(stage, 0.0))
            cell += [number(ms), percent(ms / whole if whole else None)]
        cells.append(cell)
    headings = ("prompt, ms", "share", "step, ms", "share")
    return [
        Subheading(text=f"Mode {row['mode']}, {row['weights']}, by stage"),
        Table(
            columns=(
                Column(heading="stage"),
                *(Column(heading=heading, number=True) for heading in headings),
            ),
            rows=cells,
            caption="each operator by itself; rest: what no operator does",
        ),
    ]


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    cells = []
    for row in rows:
        measured = row["measured"]
        named = (row["mode"], row["weights"])
        if measured is None:
            cells.append((*named, "-", "-", "-", "-", "-", row["error"] or "did not run"))
            continue
        cells.append(
            (
                *named,
                _spread(measured["first_token_ms"]),
                _spread(measured["token_ms"]),
                number(real(row["first_token_speedup"])),
                number(real(row["token_speedup"])),
                number(real(row["tokens_per_s"])),
                "",
            )
        )
    headings = ("first token, ms", "step, ms", "first token, of float", "step, of float", "tokens/s")
    return Table(
        columns=(
            Column(heading="mode"),
            Column(heading="weights"),
            *(Column(heading=heading, number=True) for heading in headings),
            Column(heading=""),
        ),
        rows=cells,
        caption="in brackets: quartiles; of float: the float model's time over this one's",
    )


def _spread(spread: Mapping[str, Any]) -> str:
    median, low, high = (number(real(spread[key])) for key in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def _tone(row: Mapping[str, Any]) -> int:
    return _QUANTIZED if str(row["weights"]).startswith("W") else _FLOAT


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
