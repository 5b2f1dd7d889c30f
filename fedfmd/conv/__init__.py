"""Dynamic convolutions: the operators, their factory, temperature, diagnostics, ablation, reference weights."""

from fedfmd.conv.ablation import only_attentions, recorded_attentions
from fedfmd.conv.attention import ATTENTION_INITS
from fedfmd.conv.diagnostics import AttentionRecord, record_attention
from fedfmd.conv.factory import CONVS, make_conv
from fedfmd.conv.layers import CondConv2d, DyConv2d, DynamicConv2d, FMDConv2d, ODConv2d
from fedfmd.conv.mixing import MIXINGS
from fedfmd.conv.reference import load_reference_state_dict
from fedfmd.conv.temperature import TemperatureSchedule, has_temperature, set_temperature

__all__ = [
    "ATTENTION_INITS",
    "CONVS",
    "MIXINGS",
    "AttentionRecord",
    "CondConv2d",
    "DyConv2d",
    "DynamicConv2d",
    "FMDConv2d",
    "ODConv2d",
    "TemperatureSchedule",
    "has_temperature",
    "load_reference_state_dict",
    "make_conv",
    "only_attentions",
    "record_attention",
    "recorded_attentions",
    "set_temperature",
]
