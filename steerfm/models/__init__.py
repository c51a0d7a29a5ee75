"""Other models as flow maps: pipelines of diffusers, and networks in any convention."""

from steerfm.models.diffusers import from_pipeline, save_lora, save_pipeline
from steerfm.models.network import VelocityModel

__all__ = ["VelocityModel", "from_pipeline", "save_lora", "save_pipeline"]
