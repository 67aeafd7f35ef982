"""OPS: every public op. A new op is a folder in kernels/ and a line here."""

from genai_fast.kernels.act_dropout.spec import ACT_DROPOUT
from genai_fast.kernels.adam.spec import ADAM_STEP
from genai_fast.kernels.batch_norm_act.spec import BATCH_NORM_ACT
from genai_fast.kernels.bias_act.spec import BIAS_ACT
from genai_fast.kernels.causal_attention.decode_spec import DECODE_ATTENTION
from genai_fast.kernels.causal_attention.spec import CAUSAL_ATTENTION
from genai_fast.kernels.common.spec import OpSpec
from genai_fast.kernels.conv_transpose.conv2d_spec import CONV2D
from genai_fast.kernels.conv_transpose.spec import (
    CONV_TRANSPOSE1D,
    CONV_TRANSPOSE2D,
    CONV_TRANSPOSE2D_BATCH_NORM_ACT,
    UPSAMPLE_CONV2D,
)
from genai_fast.kernels.cross_entropy.linear_spec import LINEAR_CROSS_ENTROPY
from genai_fast.kernels.cross_entropy.spec import CROSS_ENTROPY
from genai_fast.kernels.decode_linear.spec import DECODE_LINEAR
from genai_fast.kernels.gated_act.spec import GATED_ACT
from genai_fast.kernels.gpt_decode.spec import GPT_DECODE
from genai_fast.kernels.layer_norm.spec import LAYER_NORM, RMS_NORM
from genai_fast.kernels.recurrent.spec import GRU, LSTM
from genai_fast.kernels.reparameterize.spec import REPARAMETERIZE, REPARAMETERIZE_KL
from genai_fast.kernels.rotary.spec import ROTARY
from genai_fast.kernels.vae_loss.spec import VAE_LOSS

OPS: dict[str, OpSpec] = {
    op.name: op
    for op in (
        REPARAMETERIZE,
        REPARAMETERIZE_KL,
        VAE_LOSS,
        ADAM_STEP,
        BATCH_NORM_ACT,
        BIAS_ACT,
        ACT_DROPOUT,
        CONV_TRANSPOSE2D,
        CONV_TRANSPOSE1D,
        UPSAMPLE_CONV2D,
        CONV_TRANSPOSE2D_BATCH_NORM_ACT,
        CONV2D,
        CROSS_ENTROPY,
        LINEAR_CROSS_ENTROPY,
        GATED_ACT,
        ROTARY,
        LAYER_NORM,
        RMS_NORM,
        GRU,
        LSTM,
        CAUSAL_ATTENTION,
        DECODE_ATTENTION,
        DECODE_LINEAR,
        GPT_DECODE,
    )
}
