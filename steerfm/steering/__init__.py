"""Steering: four orthogonal parts (look-ahead, value, transition, correction and selection), one engine, many presets."""

from steerfm.steering.corrections import Jarzynski, Twisted, Uncorrected
from steerfm.steering.engine import Method, Outcome, Steering, SteeringResult, Trace, steer
from steerfm.steering.lookahead import Denoise, Endpoints, Jump
from steerfm.steering.methods import DPS, FMRGE, FMRGJ, METHODS, BestOfN, FeynmanKac
from steerfm.steering.value import EndpointAscent, EndpointGradient, Exponential, MapGradient, Power
from steerfm.steering.weights import Resample

__all__ = [
    "DPS", "FMRGE", "FMRGJ", "METHODS", "BestOfN", "Denoise", "EndpointAscent", "EndpointGradient", "Endpoints",
    "Exponential", "FeynmanKac", "Jarzynski", "Jump", "MapGradient", "Method", "Outcome", "Power", "Resample", "Steering",
    "SteeringResult", "Trace", "Twisted", "Uncorrected", "steer",
]  # fmt: skip
