"""What a calibration on disk saw of every site."""

from qmamba_cli.artifacts.calibration import CalibrationArtifact
from qmamba_cli.config import MambaConfig
from qmamba_cli.quant.coverage import Coverage, CoverageReport, coverage_report
from qmamba_cli.quant.observers import ObserverSet, Reduction


def coverage_of(artifact: CalibrationArtifact) -> CoverageReport:
    """The coverage of a calibration or of a shard; the growth is unknown where its format is version 1.

    Raises:
        ArtifactError: the statistics are not those of its model.
    """
    manifest = artifact.manifest
    n_layer = MambaConfig.from_dict(dict(manifest.model.config)).n_layer
    observers = ObserverSet.from_arrays(
        artifact.statistics, n_layer, alpha=manifest.alpha, reduction=Reduction(manifest.reduction)
    )
    coverage = Coverage.from_arrays(artifact.coverage, n_layer) if artifact.coverage else None
    absmaxes = {key: manifest.sites[key].absmax for key in observers if key in manifest.sites}
    return coverage_report(observers, coverage, absmaxes)
