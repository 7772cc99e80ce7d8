"""A roofline model: minimum times of a skipped model, from its operations and bytes and the limits of the hardware."""

from adaskip.roofline.ceilings import Ceilings, known_ceilings, known_devices, measure_ceilings
from adaskip.roofline.predict import Times, forward_seconds, kv_bytes_per_token, predict
from adaskip.roofline.shape import ModelShape, SublayerShape
from adaskip.roofline.work import Work, attention_work, ffn_work, head_work, sublayer_seconds

__all__ = [
    "Ceilings",
    "ModelShape",
    "SublayerShape",
    "Times",
    "Work",
    "attention_work",
    "ffn_work",
    "forward_seconds",
    "head_work",
    "known_ceilings",
    "known_devices",
    "kv_bytes_per_token",
    "measure_ceilings",
    "predict",
    "sublayer_seconds",
]
