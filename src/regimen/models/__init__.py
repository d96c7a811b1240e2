"""Networks that policies and rewards are made of."""

from .causal_lm import CausalLM
from .classifiers import ImageClassifier
from .comparators import Criteria, EncoderComparator, PastedComparator, labelled_pairs, preference
from .double_critic import DoubleCritic
from .encoders import MultimodalEncoder, SmallMultimodalEncoder, TransformersEncoder
from .flux_fill import FluxFillDenoiser
from .frame_costs import FrameCosts
from .generative_comparator import GenerativeComparator
from .heads import MultiHead, Tower, WithTasks
from .inpainting import InpaintingDenoiser, paste
from .kontext_denoiser import KontextDenoiser
from .latent_reward import ConcatenatingEncoder, LatentReward, Latents, PairEncoder, Pairs
from .linear_heads import LinearHeads
from .metaquery import MetaQueryConditioner, MetaQueryConnector
from .mlp_denoiser import MLPDenoiser
from .outlier_partition import OutlierPartition
from .process_value import ProcessValue
from .progress import ActionEncoder, PolicyEncoder, ProgressEstimator
from .q_network import ActionValues, DiscreteCritics, QNetwork
from .sd3 import SD3Denoiser, decode_latents, encode_images, sd3_sigmas
from .small_decoder import small_decoder, word_tokenizer
from .temperature import Temperature
from .text_torso import PooledTextTorso, TextTorso
from .torsos import ConvTorso, DictTorso, MLPTorso, OneHotTorso, torso_for
from .trajectory import DestinationNetwork, NextPositionNetwork, TrackTransformer, TrajectoryNetwork
from .value_head import ValueHead
from .value_network import ValueNetwork

__all__ = [
    "ActionEncoder",
    "ActionValues",
    "CausalLM",
    "ConcatenatingEncoder",
    "ConvTorso",
    "Criteria",
    "DestinationNetwork",
    "DictTorso",
    "DiscreteCritics",
    "DoubleCritic",
    "EncoderComparator",
    "FluxFillDenoiser",
    "FrameCosts",
    "GenerativeComparator",
    "ImageClassifier",
    "InpaintingDenoiser",
    "KontextDenoiser",
    "LatentReward",
    "Latents",
    "LinearHeads",
    "MLPDenoiser",
    "MLPTorso",
    "MetaQueryConditioner",
    "MetaQueryConnector",
    "MultiHead",
    "MultimodalEncoder",
    "NextPositionNetwork",
    "OneHotTorso",
    "OutlierPartition",
    "PairEncoder",
    "Pairs",
    "PastedComparator",
    "PolicyEncoder",
    "PooledTextTorso",
    "ProcessValue",
    "ProgressEstimator",
    "QNetwork",
    "SD3Denoiser",
    "SmallMultimodalEncoder",
    "Temperature",
    "TextTorso",
    "Tower",
    "TrackTransformer",
    "TrajectoryNetwork",
    "TransformersEncoder",
    "ValueHead",
    "ValueNetwork",
    "WithTasks",
    "decode_latents",
    "encode_images",
    "labelled_pairs",
    "paste",
    "preference",
    "sd3_sigmas",
    "small_decoder",
    "torso_for",
    "word_tokenizer",
]
