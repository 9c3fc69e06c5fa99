"""The models behind a table of sensitivities, and its rows as far as they have been measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from qmamba_cli.evaluation.batches import Batch
from qmamba_cli.evaluation.divergence import Outcome, Tally, compare_with_float
from qmamba_cli.evaluation.sensitivity import Row, Target, TensorError, against_everything, alone
from qmamba_cli.progress import Progress
from qmamba_cli.stages.fake_quantized import (
    TABLES,
    FakeQuantizer,
    activation_targets,
    part_targets,
    per_token_targets,
    weight_targets,
)
from qmamba_cli.stages.partial import Arrays, Keeper

# What is quantized, and which of it with one scale a token.
_Choice: TypeAlias = tuple[frozenset[Target], frozenset[Target]]
_NONE: frozenset[Target] = frozenset()
_EVERYTHING = frozenset([*activation_targets(), *weight_targets()])


@dataclass(frozen=True, slots=True, kw_only=True)
class Views:
    """Which tables are asked for.

    Attributes:
        sites: each tensor in all layers at once.
        layers: each layer's tensors one at a time.
        leave_one_out: everything but one tensor.
        per_token: everything, one tensor with one scale a token.
    """

    sites: bool = True
    layers: bool = False
    leave_one_out: bool = True
    per_token: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The tables; a partial one has the rows that were measured.

    Attributes:
        alone: tensors quantized one at a time, the most expensive first.
        parts: the tensors that share a site's scale, likewise.
        left_out: everything quantized but one tensor, the one that helps most first.
        per_token: everything quantized, one tensor with one scale a token, likewise; the row without a layer
            or part whose site is `EVERY_SITE` is all of them at once.
        everything: all tensors quantized.
        partial: whether the measurement was interrupted.
    """

    alone: Sequence[Row]
    parts: Sequence[Row]
    left_out: Sequence[Row]
    per_token: Sequence[Row]
    everything: Outcome
    partial: bool


EVERY_SITE = Target(site="every activation")
"""The row of all sites with one scale a token each."""


class Plan:
    """Which models are measured for which row.

    Args:
        views: what is asked for.
        layers: of the model.
    """

    def __init__(self, views: Views, layers: int) -> None:
        every = sorted(_EVERYTHING, key=lambda target: target.label)
        self._layers = layers
        self._sites = every if views.sites else []
        self._single = [
            target
            for layer in range(layers if views.layers else 0)
            for target in (*activation_targets(layer), *weight_targets(layer))
        ]
        if self._single:
            self._single.append(Target(site=TABLES))
        self._parts = part_targets()
        self._left_out = {target: (_EVERYTHING - {target}, _NONE) for target in every if views.leave_one_out}
        self._per_token: dict[Target, _Choice] = {}
        if views.per_token:
            targets = per_token_targets()
            self._per_token = {target: (_EVERYTHING, frozenset([target])) for target in targets}
            sites = frozenset(target for target in targets if target.part is None)
            self._per_token[EVERY_SITE] = (_EVERYTHING, sites)
        # Each model once, whichever rows need it; what the other rows are held against first.
        self.choices: list[_Choice] = list(
            dict.fromkeys(
                [
                    (_EVERYTHING, _NONE),
                    *((frozenset([target]), _NONE) for target in (*self._sites, *self._single, *self._parts)),
                    *self._left_out.values(),
                    *self._per_token.values(),
                ]
            )
        )

    def record(self) -> list[Any]:
        """The models as JSON, for a fingerprint."""
        return [[sorted(target.label for target in part) for part in choice] for choice in self.choices]

    def rows(
        self, measured: Sequence[Outcome | None], errors: Mapping[Target, TensorError], *, partial: bool
    ) -> Rows:
        """The tables.

        Args:
            measured: one entry a choice, None where there is nothing yet; the first is there.
            errors: own errors of the single tensors.
            partial: whether the measurement was interrupted.
        """
        found = {
            choice: outcome
            for choice, outcome in zip(self.choices, measured, strict=True)
            if outcome is not None
        }
        everything = found[_EVERYTHING, _NONE]

        def rank(targets: Sequence[Target]) -> list[Row]:
            keys = {target: (frozenset([target]), _NONE) for target in targets}
            return alone({t: found[key] for t, key in keys.items() if key in found}, errors, self._layers)

        def against(choices: Mapping[Target, _Choice], own: Mapping[Target, TensorError]) -> list[Row]:
            outcomes = {target: found[key] for target, key in choices.items() if key in found}
            return against_everything(outcomes, everything, own, self._layers)

        rows = {row.target: row for row in (*rank(self._single), *rank(self._sites))}
        return Rows(
            alone=sorted(rows.values(), key=lambda row: row.cost, reverse=True),
            parts=rank(self._parts),
            left_out=against(self._left_out, errors),
            # The own errors are those of the site's one scale.
            per_token=against(self._per_token, {}),
            everything=everything,
            partial=partial,
        )


def own_errors(
    quantizer: FakeQuantizer, batches: Sequence[Batch], progress: Progress
) -> dict[Target, TensorError]:
    """Errors of every tensor's own grid, activations as the float model makes them."""
    errors, observe = quantizer.observe_errors()
    model = quantizer.float_model()
    with progress("observing the float model", len(batches)) as advance:
        for batch in batches:
            model.forward(batch.ids, hook=observe)
            advance(1)
    return errors | quantizer.errors


def measured_rows(
    quantizer: FakeQuantizer,
    plan: Plan,
    batches: Sequence[Batch],
    errors: Mapping[Target, TensorError],
    *,
    keeper: Keeper | None,
    fingerprint: str,
    progress: Progress,
) -> Rows:
    """Measure the plan's models and make rows of them, of what there is when it is interrupted.

    Raises:
        KeyboardInterrupt: it was interrupted before the first models were measured, or has no keeper.
        ArtifactError: what an interrupted command kept is damaged, or belongs to something else.
    """
    tally = Tally.empty(len(plan.choices), batches)
    kept = None if keeper is None else keeper.load(fingerprint)
    if keeper is not None and kept is not None:
        tally = _tally(keeper, *kept, tally)
    models = [quantizer.model(*choice) for choice in plan.choices]
    partial = False
    try:
        with progress("measuring tensors", len(models) * len(batches)) as advance:
            advance(tally.units)
            compare_with_float(quantizer.float_model(), models, batches, tally=tally, advance=advance)
    except KeyboardInterrupt:
        if keeper is None or not tally.done:
            raise
        keeper.save(fingerprint, {"sums": tally.sums, "tokens": tally.tokens}, tally.done)
        partial = True
    return plan.rows(tally.outcomes(batches), errors, partial=partial)


def _tally(keeper: Keeper, arrays: Arrays, done: int, empty: Tally) -> Tally:
    """The tally that was kept."""
    tally = Tally(sums=arrays.get("sums", empty.tokens), tokens=arrays.get("tokens", empty.sums), done=done)
    if tally.sums.shape != empty.sums.shape or tally.tokens.tolist() != empty.tokens.tolist():
        raise keeper.damaged("another shape")
    return tally
