"""Compiled Triton kernels executed on the CPU: their PTX, for sm_80 and sm_90, checked and counted.

It lies in the package because `genai_fast.testing.emulated_gpu` is for users' kernels, too; its C++ sources are data of
the package, compiled when they are first needed (build.py).

    driver_triton.py  behind Triton's launch path: specialised, compiled and bound as for a GPU
    ptx.py            a PTX text -> statements       operands.py  where operands lie in a warp's register file
    decode.py, decode_memory.py  statements -> rows  kernel.py    rows in the engine; launches
    memory.py         the tensors of a launch        findings.py  races and the like, in words
    record.py         counters of a launch           devices.py   the GPUs
    engine/           machine.h first: the state; scheduler.cpp: who runs when; checks.cpp, clocks.cpp: what is checked

What is not implemented raises Unsupported, by name: local memory, calls, textures, TMA and mbarrier, clusters, matrices
of other types than 16-bit floats and TF32.
"""
