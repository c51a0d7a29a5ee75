"""Training of flow maps, classifiers and image-text models with Lightning: modules, objectives, data and the run."""

from steerfm.training.checkpoints import newest_checkpoint, save_checkpoint
from steerfm.training.classifier import ClassifierTraining
from steerfm.training.contrastive import ContrastiveTraining, RobustTraining
from steerfm.training.flow_map import FlowMapTraining, SampleGrid
from steerfm.training.log import Metrics, history
from steerfm.training.module import Trained
from steerfm.training.run import NothingTrainedError, check_trained, fit

__all__ = [
    "ClassifierTraining", "ContrastiveTraining", "FlowMapTraining", "Metrics", "NothingTrainedError", "RobustTraining",
    "SampleGrid", "Trained", "check_trained", "fit", "history", "newest_checkpoint", "save_checkpoint",
]  # fmt: skip
