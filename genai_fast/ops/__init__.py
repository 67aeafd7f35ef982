"""The public functional ops: validated, differentiable, one call each."""

from genai_fast.ops import register  # noqa: F401  (defines torch.ops.genai_fast)
from genai_fast.ops.act_dropout import act_dropout
from genai_fast.ops.adam import adam_step
from genai_fast.ops.batch_norm_act import batch_norm_act
from genai_fast.ops.bias_act import bias_act, bias_gelu
from genai_fast.ops.causal_attention import causal_attention
from genai_fast.ops.causal_conv1d import causal_conv1d, depthwise_causal_conv1d
from genai_fast.ops.conv2d import conv2d
from genai_fast.ops.conv_transpose import (
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose2d_batch_norm_act,
    upsample_conv2d,
)
from genai_fast.ops.cross_entropy import CrossEntropyOutput, cross_entropy
from genai_fast.ops.decode_attention import decode_attention
from genai_fast.ops.decode_linear import decode_linear
from genai_fast.ops.gated_act import gated_act, geglu, swiglu
from genai_fast.ops.gpt_decode import GPTDecoder, gpt_decode
from genai_fast.ops.group_norm_act import group_norm_act, instance_norm_act
from genai_fast.ops.layer_norm import layer_norm, rms_norm
from genai_fast.ops.linear_cross_entropy import linear_cross_entropy
from genai_fast.ops.llama_decode import LlamaDecoder, llama_decode
from genai_fast.ops.recurrent import gru, lstm
from genai_fast.ops.reparameterize import reparameterize, reparameterize_kl
from genai_fast.ops.rotary import rotary, rotary_tables
from genai_fast.ops.upfirdn2d import upfirdn2d
from genai_fast.ops.vae_loss import VAELoss, vae_loss
from genai_fast.ops.vector_quantize import segment_sum, vector_quantize
from genai_fast.ops.wavenet_decode import wavenet_decode

__all__ = [
    "CrossEntropyOutput", "GPTDecoder", "LlamaDecoder", "VAELoss", "act_dropout", "adam_step", "batch_norm_act",
    "bias_act", "bias_gelu", "causal_attention", "causal_conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose2d_batch_norm_act", "cross_entropy", "decode_attention", "decode_linear", "depthwise_causal_conv1d",
    "gated_act", "geglu", "gpt_decode", "group_norm_act", "gru", "instance_norm_act", "layer_norm",
    "linear_cross_entropy", "llama_decode", "lstm", "reparameterize", "reparameterize_kl", "rms_norm", "rotary",
    "rotary_tables", "segment_sum", "swiglu", "upfirdn2d", "upsample_conv2d", "vae_loss", "vector_quantize",
    "wavenet_decode",
]  # fmt: skip
