"""The `best` recipe: activation scales and W4 matrices chosen for the least error of what they feed.

The scales come from the stored histograms. The matrices need the activations themselves, so the calibration's
text is run again, one block at a time: the float block says what should come out, the quantized blocks before
it say what really goes in. Formats, sizes and kernels are those of the plain recipe.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from qmamba_cli import sites
from qmamba_cli.artifacts.checkpoint import Checkpoint
from qmamba_cli.artifacts.manifest import CalibrationManifest, SiteRecord
from qmamba_cli.config import MambaConfig
from qmamba_cli.errors import ArtifactError
from qmamba_cli.kernels.backend import Backend, select_backend
from qmamba_cli.model.block import block_forward
from qmamba_cli.model.prepare import Load, float_block, rotate_inputs
from qmamba_cli.model.quantize import Recipe, block_tensors, group_tensors, quantized_block
from qmamba_cli.model.weights import BlockWeights, on_device
from qmamba_cli.modes import DEFAULT_MODE, MODES
from qmamba_cli.progress import Progress, silent
from qmamba_cli.quant.clipping import least_error_absmax
from qmamba_cli.quant.gptq import Moments, least_squares_weight, quantize_groups_gptq, second_moments
from qmamba_cli.quant.grid import CHANNEL_SCALES, QMAX, Scale, dequantize, scale_from_absmax
from qmamba_cli.quant.observers import ObserverSet
from qmamba_cli.quant.weights import quantize_rows
from qmamba_cli.stages.calibrate import CalibrateOptions
from qmamba_cli.stages.calibration_text import all_samples
from qmamba_cli.stages.spooled import text_writer
from qmamba_cli.text import SELF
from qmamba_cli.tokenizer import Tokenizer

if TYPE_CHECKING:
    from qmamba_cli.stages.export import ExportOptions

# The power of the error that a site's clip keeps small. The large values of u and of the state sit in few
# channels, and what one of them can do is bounded: docs/recipes.md has the measurement.
_POWERS = {sites.X_PROJ_INPUT: 1.5, sites.SSM_STATE: 1.5}
_SQUARED = 2.0
# Samples that the matrices are fitted to: the residual streams of all of them are held.
SAMPLES = 128


def best_scales(
    observers: ObserverSet, coverage: Mapping[str, NDArray[np.generic]]
) -> tuple[dict[str, Scale], dict[str, SiteRecord]]:
    """The scale of every site key, and its record.

    Every clip is the one of least expected error, from the stored histograms; u has a scale for each channel
    that holds the channel's largest value, where the calibration knows it.

    Args:
        observers: of a calibration.
        coverage: its arrays, or none where it is of version 1.

    Raises:
        QmambaError: a site was not observed.
    """
    absmaxes = least_error_absmaxes(observers)
    scales: dict[str, Scale] = {key: scale_from_absmax(absmax) for key, absmax in absmaxes.items()}
    records = least_error_records(observers, absmaxes)
    for key, record in records.items():
        found = coverage.get(f"{key}.channel_absmax")
        if key.rpartition(".")[2] != sites.X_PROJ_INPUT or found is None or not found.size:
            continue
        largest = torch.from_numpy(found.astype(np.float32))
        scales[key] = (largest / torch.full_like(largest, QMAX)).clamp_(*CHANNEL_SCALES)
        changes = {"observer": sites.ObserverKind.MINMAX, "absmax": float(largest.max())}
        records[key] = record.model_copy(update=changes)
    return scales, records


def least_error_absmaxes(observers: ObserverSet) -> dict[str, float]:
    """Site key → the absmax of least expected error, from the histograms alone.

    Raises:
        QmambaError: a site was not observed.
    """
    return {
        key: least_error_absmax(observers[key].histogram, power=_POWERS.get(key.rpartition(".")[2], _SQUARED))
        for key in observers
    }


def least_error_records(observers: ObserverSet, absmaxes: Mapping[str, float]) -> dict[str, SiteRecord]:
    """Manifest records of the sites as `least_error_absmaxes` chose them."""
    return {
        key: SiteRecord(
            observer=sites.ObserverKind.LEAST_ERROR,
            alpha=None,
            absmax=absmaxes[key],
            observations=observers[key].histogram.count,
        )
        for key in observers
    }


def calibration_samples(
    checkpoint: Checkpoint,
    manifest: CalibrationManifest,
    backend: Backend,
    *,
    folder: Path,
    offline: bool,
    progress: Progress,
) -> NDArray[np.int32]:
    """The first `SAMPLES` token windows that a calibration observed, read from its source again.

    Args:
        checkpoint: the float checkpoint.
        manifest: of the calibration.
        backend: where a model runs that wrote its own text.
        folder: where the blocks of such a model wait if it is large.
        offline: use only the Hub's local cache.
        progress: told of every token that is written.

    Returns:
        (n, seqlen) int32.

    Raises:
        DatasetError: the text is missing or malformed.
        ArtifactError: the text is not the one that was observed.
    """
    record = manifest.dataset
    options = CalibrateOptions(
        model=checkpoint.source,
        samples=record.samples,
        seqlen=record.seqlen,
        batch_size=record.batch_size,
        dataset=record.dataset,
        text_column=record.text_column or "text",
        seed=record.seed,
        shuffle=record.shuffle,
        offline=offline,
    )
    writer = text_writer(checkpoint, backend, folder) if record.dataset == SELF else None
    samples = all_samples(options, Tokenizer.from_files(checkpoint.tokenizer_files), writer, progress)
    if samples is None or samples.digest != record.digest or list(samples.ids) != record.sample_ids:
        raise ArtifactError(
            f"the calibration text `{record.dataset}` is not the one that was observed: its digest differs",
            hint="`--recipe best` reads the text again; restore it, or calibrate anew",
        )
    return samples.tokens[:SAMPLES]


def fitted_blocks(
    options: "ExportOptions",
    checkpoint: Checkpoint,
    manifest: CalibrationManifest,
    scales: Mapping[str, Scale],
    progress: Progress,
) -> Iterator[Mapping[str, torch.Tensor]] | None:
    """The blocks of `FittedBlocks`, or None where no matrix has 4 bits and there is nothing to fit.

    Raises:
        DeviceError: the device is missing.
        DatasetError: the calibration's text is missing or malformed.
        ArtifactError: the text is not the one that was observed.
    """
    config, recipe = checkpoint.config, options.recipe
    names = [f"layers.{layer}.{name}" for layer in range(config.n_layer) for name in ("in_proj", "out_proj")]
    if all(recipe.projection_bits(name) == 8 for name in names):
        return None
    backend = select_backend(options.device)
    tokens = calibration_samples(
        checkpoint,
        manifest,
        backend,
        folder=options.out.parent,
        offline=options.offline,
        progress=progress,
    )
    return iter(FittedBlocks(config, checkpoint.load, recipe, scales, tokens, backend, progress=progress))


class FittedBlocks:
    """The tensors of each block in turn, its W4 matrices fitted to the activations.

    Two residual streams are carried through the blocks: the float model's, and that of the blocks as they
    were quantized so far. in_proj is fitted to give the float block's product from the quantized stream;
    out_proj to bring the quantized stream back to the float one. One block and both streams,
    ``2 · n · seqlen · d_model`` float32, are held.

    A token's errors count by what they do to its prediction: the final norm divides them by the root mean
    square of the float model's last residual, so their squares are weighed by its inverse mean square.

    Args:
        config: sizes.
        load: reads a float checkpoint tensor by name.
        recipe: formats.
        scales: activation scale of every site key.
        tokens: (n, seqlen) of the calibration's text.
        backend: the operators.
        batch_size: windows a forward pass.
        progress: of the float model's run before the first block.
    """

    def __init__(
        self,
        config: MambaConfig,
        load: Load,
        recipe: Recipe,
        scales: Mapping[str, Scale],
        tokens: NDArray[np.int32],
        backend: Backend,
        *,
        batch_size: int = 8,
        progress: Progress = silent,
    ) -> None:
        self._config = config
        self._load = load
        self._recipe = recipe
        self._scales = scales
        self._backend = backend
        table = load("backbone.embeddings.weight")
        batches = torch.from_numpy(tokens.astype(np.int64)).split(batch_size)  # type: ignore[no-untyped-call]
        self._float = [self._embedded(table, ids, coarse=False) for ids in batches]
        # Before there is a second stream: this needs one of its own.
        self._roots = self._token_roots(progress)
        coarse = recipe.table_bits("embeddings") == 8
        self._coarse = [self._embedded(table, ids, coarse=coarse) for ids in batches]

    def _token_roots(self, progress: Progress) -> list[torch.Tensor]:
        """Square roots of the tokens' weights, (b, l, 1) a batch; their squares are 1 on average."""
        with torch.inference_mode(), progress("weighing tokens", self._config.n_layer) as advance:
            last = list(self._float)
            for layer in range(self._config.n_layer):
                block = on_device(float_block(self._config, self._load, layer), self._backend.device)
                last = [self._run(block, "fp", batch)[0] for batch in last]
                advance(1)
            squares = [x.square().mean(dim=-1, keepdim=True) + self._config.norm_eps for x in last]
        mean = torch.cat([x.reciprocal().flatten() for x in squares]).mean(dtype=torch.float64).float()
        return [(x * mean).rsqrt() for x in squares]

    def _embedded(self, table: torch.Tensor, ids: torch.Tensor, *, coarse: bool) -> torch.Tensor:
        """The residual (b, l, d_model) that the blocks start from."""
        rows = table[ids.flatten()].to(torch.float32)
        if coarse:
            rows = quantize_rows(rows, name="embeddings").dequantize()
        return rotate_inputs(rows).view(*ids.shape, -1).to(self._backend.device)

    def __iter__(self) -> Iterator[Mapping[str, torch.Tensor]]:
        with torch.inference_mode():
            for layer in range(self._config.n_layer):
                yield self._block(layer)

    def _block(self, layer: int) -> Mapping[str, torch.Tensor]:
        prefix, site = f"layers.{layer}", sites.site_key(sites.OUT_PROJ_INPUT, layer)
        tensors = dict(block_tensors(self._config, self._load, self._recipe, layer, self._scales))
        block = on_device(float_block(self._config, self._load, layer), self._backend.device)
        wanted = [self._run(block, "fp", batch)[0] for batch in self._float]
        if self._recipe.projection_bits(f"{prefix}.in_proj") == 4:
            matrix = block.in_proj.matrix.double()
            pairs = [
                (self._normed(coarse, layer), self._normed(real, None))
                for coarse, real in zip(self._coarse, self._float, strict=True)
            ]
            halves = [(moments, matrix @ cross) for moments, cross in self._halves(pairs)]
            tensors |= self._fitted(f"{prefix}.in_proj", matrix, halves)
        quantized = self._quantized(tensors, layer)
        outputs = [self._run(quantized, DEFAULT_MODE, batch)[1] for batch in self._coarse]
        if self._recipe.projection_bits(f"{prefix}.out_proj") == 4:
            bias = 0.0 if block.out_proj.bias is None else block.out_proj.bias
            pairs = [
                (dequantize(y, self._scales[site]), real - coarse - bias)
                for y, real, coarse in zip(outputs, wanted, self._coarse, strict=True)
            ]
            matrix = block.out_proj.matrix.double()
            tensors |= self._fitted(f"{prefix}.out_proj", matrix, self._halves(pairs))
            quantized = self._quantized(tensors, layer)
        out = quantized.out_proj
        self._coarse = [
            self._backend.linear(
                y,
                out.weight,
                out.bias,
                x_scale=self._scales[site],
                weight_scale=out.scale,
                out_scale=None,
                residual=coarse,
            )
            for y, coarse in zip(outputs, self._coarse, strict=True)
        ]
        self._float = wanted
        return tensors

    def _run(
        self, block: BlockWeights, mode: str, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The new residual, and out_proj's input as the block has it."""
        seen: dict[str, torch.Tensor] = {}
        after, _ = block_forward(
            block,
            MODES[mode],
            self._backend,
            residual,
            None,
            norm_eps=self._config.norm_eps,
            hook=seen.__setitem__,
        )
        return after, seen[sites.OUT_PROJ_INPUT]

    def _normed(self, residual: torch.Tensor, layer: int | None) -> torch.Tensor:
        """in_proj's input: float, or as the grid of a layer gives it back."""
        scale = None if layer is None else self._scales[sites.site_key(sites.IN_PROJ_INPUT, layer)]
        normed = self._backend.rms_norm(residual, None, eps=self._config.norm_eps, out_scale=scale)
        return normed if scale is None else dequantize(normed, scale)

    def _quantized(self, tensors: Mapping[str, torch.Tensor], layer: int) -> BlockWeights:
        return quantized_block(
            self._config,
            tensors,
            self._scales,
            layer,
            group_size=self._recipe.group_size,
            device=self._backend.device,
        )

    def _fitted(
        self, module: str, weight: torch.Tensor, halves: Sequence[Moments]
    ) -> dict[str, torch.Tensor]:
        target = least_squares_weight(weight, halves)
        moments = halves[0][0] + halves[1][0]
        groups = quantize_groups_gptq(target, moments, self._recipe.group_size, name=module)
        return {name: tensor.cpu() for name, tensor in group_tensors(module, groups)}

    def _halves(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[Moments]:
        """Second moments of every other batch and of those between; of one batch, of its tokens."""
        pairs = [(x * root, t * root) for (x, t), root in zip(pairs, self._roots, strict=True)]
        if len(pairs) == 1:
            x, t = (tensor.flatten(0, 1) for tensor in pairs[0])
            pairs = [(x[0::2], t[0::2]), (x[1::2], t[1::2])]
        return [second_moments(pairs[start::2]) for start in (0, 1)]
