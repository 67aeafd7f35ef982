"""Kernels work on the threads that are there: one that made threads at every call would be many times slower."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from genai_fast.kernels.common.extension import extension

ROOT = Path(__file__).resolve().parents[2]

COUNTER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
static int made;
int threads_made(void) { return __atomic_load_n(&made, __ATOMIC_SEQ_CST); }
int pthread_create(pthread_t *t, const pthread_attr_t *a, void *(*f)(void *), void *x) {
  int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *) = dlsym(RTLD_NEXT, "pthread_create");
  __atomic_add_fetch(&made, 1, __ATOMIC_SEQ_CST);
  return real(t, a, f, x);
}
"""
CALLS = """
import collections, ctypes
import torch
from bench.points import FUSED, points

torch.set_num_threads(2)
made, found, ran = ctypes.CDLL(None).threads_made, collections.Counter(), collections.Counter()
for point in points("cpu"):  # of sizes that are shared among threads
    tensors = [x for x in point.inputs().values() if isinstance(x, torch.Tensor)]
    if sum(x.numel() for x in tensors) <= 1 << 22:
        step = point.step(FUSED)
        step()
        before = made()
        step()
        found[point.op.name] += made() - before
        ran[point.op.name] += 1
assert len(ran) > 15 and made() > 0, (ran, made())
assert not +found, +found
"""


@pytest.mark.skipif(extension()[0] is None, reason="no C++ kernels here")
def test_no_call_makes_threads(tmp_path):
    (tmp_path / "counter.c").write_text(COUNTER)
    counter = tmp_path / "counter.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", counter, tmp_path / "counter.c", "-ldl"], check=True)
    variables = {**os.environ, "LD_PRELOAD": str(counter)}
    done = subprocess.run([sys.executable, "-c", CALLS], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
