"""What benchmarks read in the text of programs that were compiled for other machines."""

import pytest

from experiments.bench import ahead, pods
from experiments.bench.program import size

GPU = """
HloModule jit_f

%fused (param_0: f32[12,4,8], param_1: bf16[4,8]) -> bf16[4,8] {
  %param_0 = f32[12,4,8]{2,1,0} parameter(0)
  %slice.1 = f32[1,4,8]{2,1,0} slice(%param_0), slice={[3:4], [0:4], [0:8]}
  %bitcast.1 = f32[4,8]{1,0} bitcast(%slice.1)
  %param_1 = bf16[4,8]{1,0} parameter(1)
  %convert.1 = bf16[4,8]{1,0} convert(%bitcast.1)
  ROOT %add.1 = bf16[4,8]{1,0} add(%convert.1, %param_1)
}

%updated (param_2: f32[10,8], param_3: f32[1,8]) -> f32[10,8] {
  %param_2 = f32[10,8]{1,0} parameter(0)
  %param_3 = f32[1,8]{1,0} parameter(1)
  %zero = s32[] constant(0)
  ROOT %dynamic-update-slice.1 = f32[10,8]{1,0} dynamic-update-slice(%param_2, %param_3, %zero, %zero)
}

%body (arg: (f32[12,4,8], bf16[4,8])) -> (f32[12,4,8], bf16[4,8]) {
  %arg = (f32[12,4,8]{2,1,0}, bf16[4,8]{1,0}) parameter(0)
  %stack = f32[12,4,8]{2,1,0} get-tuple-element(%arg), index=0
  %x = bf16[4,8]{1,0} get-tuple-element(%arg), index=1
  %fusion.1 = bf16[4,8]{1,0} fusion(%stack, %x), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/add"}
  ROOT %tuple = (f32[12,4,8]{2,1,0}, bf16[4,8]{1,0}) tuple(%stack, %fusion.1)
}

ENTRY %main (p0: (f32[12,4,8], bf16[4,8]), p1: bf16[16,4], p2: f32[10,8], p3: f32[1,8]) -> bf16[16,8] {
  %p0 = (f32[12,4,8]{2,1,0}, bf16[4,8]{1,0}) parameter(0)
  %p1 = bf16[16,4]{1,0} parameter(1)
  %p2 = f32[10,8]{1,0} parameter(2)
  %p3 = f32[1,8]{1,0} parameter(3)
  %while.1 = (f32[12,4,8]{2,1,0}, bf16[4,8]{1,0}) while(%p0), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"7"}}
  %y = bf16[4,8]{1,0} get-tuple-element(%while.1), index=1
  %fusion.2 = f32[10,8]{1,0} fusion(%p2, %p3), kind=kInput, calls=%updated
  ROOT %gemm = (bf16[16,8]{1,0}, s8[4096]{0}) custom-call(%p1, %y), \
custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"lhs_contracting_dimensions":["1"]}}
}
"""
TPU = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%step (arg: f32[8]) -> f32[8] {
  %arg = f32[8]{0} parameter(0)
  ROOT %all-reduce.2 = (bf16[4,8]{1,0}, f32[2]{0}) all-reduce(%arg, %arg), channel_id=5, to_apply=%add
}

%starts (part: f32[8]) -> f32[16] {
  %all-gather.1 = f32[16]{0} all-gather(%part), channel_id=9, dimensions={0}
  ROOT %start = f32[16]{0} custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%ends (part: f32[8]) -> f32[16] {
  %all-gather.2 = f32[16]{0} all-gather(%part), channel_id=9, dimensions={0}
  ROOT %end = f32[16]{0} custom-call(%all-gather.2), custom_call_target="AsyncCollectiveDone"
}

%round (arg: f32[8]) -> f32[8] {
  %arg = f32[8]{0} parameter(0)
  %fusion.3 = f32[16]{0} fusion(%arg), calls=%starts
  %fusion.4 = f32[16]{0} fusion(%arg), calls=%ends
  %all-reduce.1 = f32[8]{0} all-reduce(%arg), channel_id=1, to_apply=%add
  ROOT %while.2 = f32[8]{0} while(%all-reduce.1), condition=%cond, body=%step
}

ENTRY %main (arg: f32[8]) -> f32[8] {
  %arg = f32[8]{0} parameter(0)
  ROOT %while.1 = f32[8]{0} while(%arg), condition=%cond, body=%round
}
"""


def test_sizes_of_types():
    assert size("bf16[4,8]{1,0}") == 64
    assert size("(f32[2,3]{1,0:T(8,128)}, pred[5]{0}, s32[], s8[4096]{0})") == 24 + 5 + 4


def test_what_a_round_launches_reads_and_computes():
    looped, updated, product = ahead.kernels(GPU)
    # Seven turns: one slice of twelve and the other operand are read, and one array is written.
    assert (looped.name, looped.times, looped.bytes, looped.scope) == (
        "fusion, Loop",
        7,
        128 + 64 + 64,
        "jit(f)/add",
    )
    assert (updated.times, updated.bytes) == (1, 32 + 32)  # in place: one row read, and written
    assert (product.name, product.bytes) == ("__cublas$lt$matmul bf16", 128 + 64 + 256)
    assert product.seconds == pytest.approx(
        max(2 * 16 * 4 * 8 / ahead.RATES["bf16"], product.bytes / ahead.BANDWIDTH)
    )


def test_what_chips_send_by_the_loop_it_stands_in():
    """One that is hidden behind other work counts once."""
    assert pods.collectives(TPU) == {
        ("round", "all-gather"): (1, 64),
        ("round", "all-reduce"): (1, 32),
        ("step", "all-reduce"): (1, 64 + 8),
    }
