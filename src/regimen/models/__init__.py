"""Networks that policies and rewards are made of."""

from .classifiers import ImageClassifier
from .encoders import MultimodalEncoder, SmallMultimodalEncoder, TransformersEncoder
from .kontext_denoiser import KontextDenoiser
from .metaquery import MetaQueryConditioner, MetaQueryConnector
from .mlp_denoiser import MLPDenoiser
from .sd3 import SD3Denoiser, decode_latents, encode_images, sd3_sigmas

__all__ = [
    "ImageClassifier",
    "KontextDenoiser",
    "MLPDenoiser",
    "MetaQueryConditioner",
    "MetaQueryConnector",
    "MultimodalEncoder",
    "SD3Denoiser",
    "SmallMultimodalEncoder",
    "TransformersEncoder",
    "decode_latents",
    "encode_images",
    "sd3_sigmas",
]
