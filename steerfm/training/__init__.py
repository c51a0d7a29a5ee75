"""Training of flow maps, classifiers and image-text models with Lightning: modules, objectives, data and the run."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steerfm.training.checkpoints import newest_checkpoint, save_checkpoint
    from steerfm.training.classifier import ClassifierTraining
    from steerfm.training.contrastive import ContrastiveTraining, RobustTraining
    from steerfm.training.flow_map import FlowMapTraining, SampleGrid, grid_rows
    from steerfm.training.log import LOGGERS, Metrics, check_logger, history, log_picture
    from steerfm.training.module import Trained
    from steerfm.training.run import NothingTrainedError, check_trained, fit

__all__ = [
    "LOGGERS", "ClassifierTraining", "ContrastiveTraining", "FlowMapTraining", "Metrics", "NothingTrainedError",
    "RobustTraining", "SampleGrid", "Trained", "check_logger", "check_trained", "fit", "grid_rows", "history",
    "log_picture", "newest_checkpoint", "save_checkpoint",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Names are imported on first use: Lightning takes seconds, which the objectives and the data need not wait."""
    homes = {
        "checkpoints": ("newest_checkpoint", "save_checkpoint"),
        "classifier": ("ClassifierTraining",),
        "contrastive": ("ContrastiveTraining", "RobustTraining"),
        "flow_map": ("FlowMapTraining", "SampleGrid", "grid_rows"),
        "log": ("LOGGERS", "Metrics", "check_logger", "history", "log_picture"),
        "module": ("Trained",),
        "run": ("NothingTrainedError", "check_trained", "fit"),
    }
    for home, names in homes.items():
        if name in names:
            return getattr(import_module(f"steerfm.training.{home}"), name)
    raise AttributeError(f"module 'steerfm.training' has no attribute {name!r}")
