"""Dynamic convolutions: operators, factory, conversion of static networks, temperature, diagnostics, ablation."""

from fedfmd.conv.ablation import only_attentions, recorded_attentions
from fedfmd.conv.attention import ATTENTION_INITS, AttentionValues
from fedfmd.conv.convert import load_static_state_dict, make_dynamic
from fedfmd.conv.diagnostics import (
    AttentionRecord,
    hearing_attention,
    record_attention,
    tell_attention,
    unrecorded_attention,
)
from fedfmd.conv.factory import CONVS, OPTIONS, has_kernel_attention, is_dynamic, make_conv, options_of
from fedfmd.conv.layers import DynamicConv2d, dynamic_layers, has_temperature, set_temperature
from fedfmd.conv.mixing import MIXINGS
from fedfmd.conv.operators.condconv import CondConv2d
from fedfmd.conv.operators.dyconv import DyConv2d
from fedfmd.conv.operators.fmdconv import ATTENTIONS, FMDConv2d
from fedfmd.conv.operators.odconv import ODConv2d
from fedfmd.conv.reference import load_reference_state_dict
from fedfmd.conv.temperature import TemperatureSchedule

__all__ = [
    "ATTENTIONS",
    "ATTENTION_INITS",
    "CONVS",
    "MIXINGS",
    "OPTIONS",
    "AttentionRecord",
    "AttentionValues",
    "CondConv2d",
    "DyConv2d",
    "DynamicConv2d",
    "FMDConv2d",
    "ODConv2d",
    "TemperatureSchedule",
    "dynamic_layers",
    "has_kernel_attention",
    "has_temperature",
    "hearing_attention",
    "is_dynamic",
    "load_reference_state_dict",
    "load_static_state_dict",
    "make_conv",
    "make_dynamic",
    "only_attentions",
    "options_of",
    "record_attention",
    "recorded_attentions",
    "set_temperature",
    "tell_attention",
    "unrecorded_attention",
]
