"""KV records on the RTL move as the functional level says: bytes from memory and buffer, and the same sums."""

import dataclasses

import pytest
from skipopu.host.kv_bench import geometry, make_pattern, measure
from skipopu.hw.config import preset

CONFIG, LAYERS, CONTEXTS = preset("tiny"), 5, (7, 48, 130)
COUNTED = ("tokens", "pattern", "buffer_bytes", "memory_bytes", "buffer_bytes_served", "hit_rate", "storage_saved",
           "result")


@pytest.mark.parametrize("memory, kv_format", [("ideal", "fp16"), ("hbm", "fp16"), ("hbm", "12"), ("ideal", "8")])
def test_the_rtl_reads_buffers_and_computes_what_the_functional_level_does(memory, kv_format):
    model = geometry(LAYERS, 2, 16)
    patterns = [make_pattern(name, LAYERS, max(CONTEXTS), 0.35, 5) for name in
                ("dense", "random", "alternate", "layerwise")]
    sizes = (0, 512, 1536, None)  # a few records of each port, more, all
    rows = {device: list(measure(CONFIG, model, CONTEXTS, patterns, sizes, device, kv_format=kv_format, **options))
            for device, options in (("functional", {}), ("rtl", {"memory": memory}))}
    for want, got in zip(rows["functional"], rows["rtl"], strict=True):
        assert {key: getattr(got, key) for key in COUNTED} == {key: getattr(want, key) for key in COUNTED}
        assert got.cycles and 0 < got.physical_share <= got.effective_share
    assert any(row.buffer_bytes_served for row in rows["rtl"])
    served = {(row.pattern, row.tokens, row.buffer_bytes): row for row in rows["rtl"]}
    few, many = (served["layerwise", 130, size] for size in (0, max(row.buffer_bytes for row in rows["rtl"])))
    assert dataclasses.asdict(few)["result"] == many.result and many.memory_bytes < few.memory_bytes
