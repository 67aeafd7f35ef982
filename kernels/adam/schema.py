"""The library ops of adam_step: schemas, fakes, and which backends serve them."""

import torch

from genai_fast.kernels.common.schema import LibraryOp


def _fake(*arguments):
    return None


LIBRARY = (
    LibraryOp(
        "adam_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
        " Tensor(d!)[] steps, float lr, float beta1, float beta2, float eps, float weight_decay, bool decoupled,"
        " str backend) -> ()",
        _fake,
        kernels=("cpu",),
        dtypes=(torch.float32,),
    ),
)
