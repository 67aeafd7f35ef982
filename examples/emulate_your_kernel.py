"""A Triton kernel of one's own, compiled for an H100 and run without a GPU: python examples/emulate_your_kernel.py"""

import torch
import triton
import triton.language as tl

from genai_fast.emulator.findings import KernelFault
from genai_fast.testing import emulated_gpu


@triton.jit
def scaled_sum(x_ptr, y_ptr, out_ptr, count, scale, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count if MASKED else at >= 0
    total = tl.load(x_ptr + at, inside) * scale + tl.load(y_ptr + at, inside)
    tl.store(out_ptr + at, total, inside)


def main() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(1000), torch.randn(1000)
    out = torch.empty_like(x)
    with emulated_gpu(arch=90) as gpu:
        scaled_sum[(4,)](x, y, out, x.numel(), 2.0, BLOCK=256, MASKED=True)
    torch.testing.assert_close(out, 2.0 * x + y)
    print(gpu.report())  # instructions, bytes, sectors and bank conflicts of each launch

    try:  # and what a forgotten mask looks like
        with emulated_gpu(arch=90):
            scaled_sum[(4,)](x, y, out, x.numel(), 2.0, BLOCK=256, MASKED=False)
    except KernelFault as fault:
        print(f"\nwithout the mask:\n{fault}")


if __name__ == "__main__":
    main()
