"""Networks that policies and rewards are made of."""

from .causal_lm import CausalLM
from .classifiers import ImageClassifier
from .encoders import MultimodalEncoder, SmallMultimodalEncoder, TransformersEncoder
from .kontext_denoiser import KontextDenoiser
from .latent_reward import ConcatenatingEncoder, LatentReward, Latents, PairEncoder, Pairs
from .metaquery import MetaQueryConditioner, MetaQueryConnector
from .mlp_denoiser import MLPDenoiser
from .outlier_partition import OutlierPartition
from .q_network import ActionValues, QNetwork
from .sd3 import SD3Denoiser, decode_latents, encode_images, sd3_sigmas
from .small_decoder import small_decoder, word_tokenizer
from .temperature import Temperature
from .torsos import ConvTorso, DictTorso, MLPTorso, OneHotTorso, torso_for
from .trajectory import DestinationNetwork, NextPositionNetwork, TrackTransformer, TrajectoryNetwork
from .value_head import ValueHead
from .value_network import ValueNetwork

__all__ = [
    "ActionValues",
    "CausalLM",
    "ConcatenatingEncoder",
    "ConvTorso",
    "DestinationNetwork",
    "DictTorso",
    "ImageClassifier",
    "KontextDenoiser",
    "LatentReward",
    "Latents",
    "MLPDenoiser",
    "MLPTorso",
    "MetaQueryConditioner",
    "MetaQueryConnector",
    "MultimodalEncoder",
    "NextPositionNetwork",
    "OneHotTorso",
    "OutlierPartition",
    "PairEncoder",
    "Pairs",
    "QNetwork",
    "SD3Denoiser",
    "SmallMultimodalEncoder",
    "Temperature",
    "TrackTransformer",
    "TrajectoryNetwork",
    "TransformersEncoder",
    "ValueHead",
    "ValueNetwork",
    "decode_latents",
    "encode_images",
    "sd3_sigmas",
    "small_decoder",
    "torso_for",
    "word_tokenizer",
]
