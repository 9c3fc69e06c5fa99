"""The sections of `qmamba bench`, from its JSON alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from qmamba_cli.html.charts import Bar, bar_chart
from qmamba_cli.html.page import Block, Column, Figure, Section, Table, Text
from qmamba_cli.html.scale import number, real

_QUANTITIES = (("First token", "first_token_ms"), ("Each token after it", "token_ms"))
_FLOAT, _QUANTIZED = 7, 0


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
        Section(heading=f"Batch {batch}, prompts of {length} tokens", blocks=_case(rows, record["settings"]))
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
    return [*blocks, _table(rows)]


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
