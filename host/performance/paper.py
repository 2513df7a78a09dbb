"""The paper's tables beside ours: SkipOPU's value (arXiv 2603.14785), ours, its label, the gap, the command.

What synthesis and the cycle model say is computed here; figures of KV memory come from a results file of
``skipopu bench kv``, because their RTL takes longer than all the rest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from skipopu.hw.config import OverlayConfig

from ..errors import CompileError, RequestError
from ..timeline import blocks
from .fit import Fit, Workload, fit, run_at
from .geometries import find_geometry
from .outline import outline

__all__ = [
    "Row", "SYNTHESIS", "Section", "decode_section", "document", "kv_section", "prefill_section", "sections",
    "unit_section", "whole_section",
]

Log = Callable[[str], None]
_LAYERS = 4  # of the shape whose prompts are predicted: attention costs the same in each
_PROMPTS = (128, 256, 512, 1024)
_PEAK_GB, _PAPER_GB = 460.8, 2.84  # of the U280 in a second; a token of the paper's, see the notes on Table 3
_KINDS = ("q4_g128", "q4_0")  # a scale for as many weights as the paper has, and GGUF's


@dataclass(frozen=True)
class Row:
    """One figure. paper, ours : numbers in the unit of ``form``, None where there is none; label : of ours"""

    what: str
    paper: float | None
    ours: float | None
    label: str
    command: str
    form: str = "{:.1%}"

    def cells(self) -> list[str]:
        """Markdown cells: what, paper, ours, label, gap, command."""
        def text(value: float | None) -> str:
            return "-" if value is None else self.form.format(value)
        gap = "-"
        if self.paper is not None and self.ours is not None:
            points = self.form.replace("{:", "{:+").replace("%", "f")
            gap = (f"{points.format(100 * (self.ours - self.paper))} points" if "%" in self.form else
                   f"{self.ours / self.paper - 1:+.1%}")
        return [self.what, text(self.paper), text(self.ours), self.label if self.ours is not None else "-", gap,
                f"`{self.command}`" if self.command else ""]


@dataclass(frozen=True)
class Section:
    """One table of the paper. notes : what a reader has to know about the gaps"""

    title: str
    rows: list[Row]
    notes: list[str]


def unit_section(config: OverlayConfig, log: Log) -> Section:
    """Table 1: the arithmetic unit against conventional FP16."""
    log("synthesis of the arithmetic unit")
    found = import_module("skipopu.bitstream.estimate").estimate("pe-unit", config.name, "xcup", log)
    command = f"skipopu synth --block pe-unit --config {config.name}"
    saved = found["luts_per_product"] / found["baseline_luts_per_product"] - 1
    return Section("Table 1: the arithmetic unit", [
        Row("LUTs of a dot product against conventional FP16", -0.572, saved, "estimated", command),
        Row("mean relative error, dot products of 64", 0.00116, found["error_mean_relative"], "measured", command,
            "{:.3%}"),
        Row("the same, conventional FP16", 0.0049, found["baseline_error_mean_relative"], "measured", command,
            "{:.3%}"),
    ], [
        "The paper compares with 64 cascaded MAC cores of a vendor, after Vivado; here both sides are our own "
        "descriptions, counted by Yosys before placement. The distribution of operands behind its error is not "
        "known; ours is stated in [pe-array.md](pe-array.md).",
    ])


def whole_section(config: OverlayConfig, log: Log, synthesise: bool = True, report: str | None = None) -> Section:
    """Table 2: shares of the device.

    synthesise : False leaves ours open; report : file that ``skipopu synth --config NAME --json`` wrote, read instead
    Raises RequestError for another file.
    """
    module = import_module("skipopu.bitstream.whole")
    command = f"skipopu synth --config {config.name}"
    if not synthesise and report is None:
        return Section("Table 2: resources", [Row(name, share, None, "estimated", command, "{:.2%}")
                                              for name, share in module.PAPER.items()],
                       ["Not synthesised in this run, which takes hours; the command does it, and --resources takes "
                        "its report."])
    if report is None:
        log("synthesis of all blocks")
        found = module.whole(config.name, "xcup", log)
    else:
        found = _whole_report(report, config.name)
    rows = [Row(f"{name} of {found['device']}", module.PAPER.get(name), share, "estimated", command, "{:.2%}")
            for name, share in found["shares"].items()]
    return Section("Table 2: resources", rows, [
        "Ours is a sum of blocks, each synthesised by Yosys, before placement: no timing, nothing shared between "
        "blocks, no two small LUTs in one. The paper's is after implementation, with its platform.",
    ])


def _whole_report(path: str, name: str) -> dict[str, Any]:
    try:
        found = json.loads(Path(path).read_text())
        shares = {key: float(share) for key, share in found["shares"].items()}
        found = {"device": str(found["device"]), "config": found["config"], "shares": shares}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise RequestError(f"{path} holds no report of `skipopu synth --config {name} --json`; give what it "
                           "prints") from None
    if found["config"] != name:
        raise RequestError(f"{path} is of configuration {found['config']}, not {name}")
    return found


@dataclass(frozen=True)
class _Decode:
    """A run of decode that is predicted: options of `Workload`."""

    skip: float = 0.25
    kind: str = _KINDS[0]
    kv_format: str = "fp16"
    buffer: int | None = None

    def text(self, name: str) -> str:
        parts = [name, f"{self.skip:.0%} skipped" if self.skip else "dense", self.kind]
        parts += [f"{self.kv_format}-bit KV"] if self.kv_format != "fp16" else []
        parts += ["no history buffer"] if self.buffer == 0 else []
        return ", ".join(parts)

    def command(self, name: str, config: OverlayConfig) -> str:
        options = [f"--skip {self.skip}"] if self.skip else []
        options += [f"--weights {self.kind}"]
        options += [f"--kv-format {self.kv_format}"] if self.kv_format != "fp16" else []
        options += [f"--buffer {self.buffer}"] if self.buffer is not None else []
        return " ".join([f"skipopu fit --geometry {name} --config {config.name} --prompt 128 -n 1024", *options])


_RUNS = {
    "llama2-7b": (_Decode(), _Decode(buffer=0), _Decode(kv_format="12"), _Decode(kv_format="8"),
                  _Decode(kind=_KINDS[1]), _Decode(skip=0.0), _Decode(skip=0.0, kind=_KINDS[1])),
    "llama2-13b": (_Decode(),),
    "llama3.1-8b": (_Decode(),),
    "smollm2-135m": (_Decode(),),
}
_SIMULATED_AT = "ffcae56"  #: commit of the RTL
_SIMULATED = (  # docs/u280.md: what was run, paper's value, ours, form, options of benchmarks/u280.py
    ("llama2-7b, 25% skipped, q4_g128, all 32 layers, 128 positions: tokens/s", None, 159.6, "{:.1f}",
     "--layers 0 --context 128 --skip 0.25 --weights q4_g128"),
    ("llama2-7b, 25% skipped, q4_g128, all 32 layers, 1152 positions: tokens/s", None, 140.8, "{:.1f}",
     "--layers 0 --context 1152 --skip 0.25 --weights q4_g128"),
    ("llama2-7b, 25% skipped, q4_g128, all 32 layers, 640 positions: tokens/s", 143.4, 150.1, "{:.1f}",
     "--layers 0 --context 640 --skip 0.25 --weights q4_g128"),
    ("the same: bytes moved, share of the ports' peak", 0.884, 0.9048, "{:.1%}",
     "--layers 0 --context 640 --skip 0.25 --weights q4_g128"),
    ("the same: share of what the memory can deliver", None, 0.9817, "{:.1%}",
     "--layers 0 --context 640 --skip 0.25 --weights q4_g128"),
    ("llama2-7b, 25% skipped, q4_g128, 4 layers and the head, 1024 positions, no history buffer: bytes moved, share of "
     "the ports' peak", 0.884, 0.9096, "{:.1%}",
     "--layers 4 --context 128 1024 --skip 0.25 --weights q4_g128 --buffer 0"),
    ("the same: share of what the memory can deliver", None, 0.9869, "{:.1%}",
     "--layers 4 --context 128 1024 --skip 0.25 --weights q4_g128 --buffer 0"),
    ("llama2-13b, 25% skipped, q4_g128, 2 layers and the head, 128 positions: bytes moved, share of the ports' peak",
     0.891, 0.9136, "{:.1%}", "--geometry llama2-13b --layers 2 --context 128 --skip 0.25 --weights q4_g128"),
    ("llama3.1-8b, dense, q4_g128, 2 layers and the head, 128 positions: bytes moved, share of the ports' peak", None,
     0.9156, "{:.1%}", "--geometry llama3.1-8b --layers 2 --context 128 --skip 0 --weights q4_g128"),
    ("smollm2-135m, 25% skipped, q4_0, 128 positions: bytes moved, share of the ports' peak", None, 0.6600, "{:.1%}",
     "--geometry smollm2-135m --layers 0 --context 128 --skip 0.25"),
)


_SIMULATED_NOTE = (
    f"**Simulated** are runs of the whole configuration on the RTL of commit {_SIMULATED_AT} ([u280.md](u280.md)); "
    "weights and records are random, bits equal the functional level's where compared. 640 positions are the middle of "
    "128 tokens of prompt and 1024 generated. The cycle model is off by -0.7 to -0.2%, for SmolLM2 by -2.4%.")


def _decode_rows(name: str, config: OverlayConfig, run: _Decode, paper: tuple[float | None, float | None],
                 log: Log) -> Iterator[Row | str]:
    workload = Workload(prompt=128, count=1024, skip=run.skip, kv="reuse" if run.skip else "", kind=run.kind,
                        kv_format=run.kv_format, buffer=run.buffer)
    text, command = run.text(name), run.command(name, config)
    try:
        found: Fit = fit(find_geometry(name), config, workload,
                         lambda line: log(f"{text}: {line}"), prefill=False)
    except CompileError as error:
        yield Row(f"{text}: tokens/s", paper[0], None, "", command, "{:.1f}")
        yield f"{text}: {str(error).partition(';')[0]}."
        return
    yield Row(f"{text}: tokens/s", paper[0], found.tokens_per_second, "predicted", command, "{:.1f}")
    if paper[0] is not None:
        yield Row(f"{text}: tokens/s if a token moved the {_PAPER_GB} GB of the paper's", paper[0],
                  found.share_of_peak * _PEAK_GB / _PAPER_GB, "predicted", command, "{:.1f}")
    yield Row(f"{text}: bytes moved, share of the ports' peak", paper[1], found.share_of_peak, "predicted", command)
    if found.served:
        yield Row(f"{text}: with bytes from the history buffer, effective", paper[1], found.effective_share,
                  "predicted", command)
    yield Row(f"{text}: share of what the memory can deliver", None, found.share_of_memory, "predicted", command)
    yield Row(f"{text}: GB per token", None, found.bytes_per_token / 1e9, "predicted", command, "{:.3f}")


def decode_section(config: OverlayConfig, log: Log, names: Sequence[str] = tuple(_RUNS)) -> Section:
    """Table 3: decode."""
    rows: list[Row] = []
    notes: list[str] = []
    papers: dict[str, tuple[float | None, float | None]] = {"llama2-7b": (143.4, 0.884), "llama2-13b": (None, 0.891)}
    for name in names:
        for run in _RUNS[name]:
            paper = papers.get(name, (None, None)) if run.skip else (None, None)
            for item in _decode_rows(name, config, run, paper, log):
                (rows if isinstance(item, Row) else notes).append(item)  # type: ignore[arg-type]
    if config.name == "u280":
        rows += [Row(what, paper, ours, f"simulated at {_SIMULATED_AT}", f"python benchmarks/u280.py {options}", form)
                 for what, paper, ours, form, options in _SIMULATED]
        notes.append(_SIMULATED_NOTE)
    return Section("Table 3: decode, 128 tokens of prompt and 1024 generated, timed HBM2", rows, [
        *notes,
        "**What 143.4 tokens/s can mean.** 32 layers of Llama-2-7B are 6.476 G weights. At 4 bits and nothing else "
        "that is 3.24 GB a token; 460.8 GB/s deliver it 142 times a second, without the head, scales or keys. So the "
        "figure already counts what is skipped: 0.884 x 460.8 GB/s / 143.4 = 2.84 GB a token, which is a quarter "
        "less of weights with 3.1% of scales, the head, and a quarter less of keys and values. Read as the speed of "
        "the model itself it is consistent; read as the speed of the dense model it would be above the memory's peak.",
        "**What its comparison cannot mean.** Other systems in the paper's Table 3 are `normalised to 7B, dense "
        "4-bit weights` in one sentence; with skipping on one side only, a ratio of such rates mixes an algorithm "
        "with a machine. The share of the peak is the machine's part. 1.23x and 3.83x in the abstract are ratios of "
        "that column (88.4 to 72 and to 23).",
        "**Bytes.** `q4_g128` has a scale for 128 weights, 4.125 bits each, as the paper's GPTQ; `q4_0` is GGUF's, "
        "with one for 32, 4.5 bits, 12.5% more than the codes. In the share of the peak that makes no difference; one "
        "row divides it by the paper's bytes.",
        "**History buffer.** A fifth of the keys and values comes from it: a token without a record of its own in a "
        "layer has that of the layer before. Ports do not save alike, and run ahead of one another only as far as "
        "FIFOs and KV tiles hold, so that the memory is used a little less well than without, and a token takes less "
        "time. With narrow records attention is bound by the array and the vector unit: the buffer saves bytes there, "
        "no time. Every token skips exactly a quarter of its attentions and of its MLPs.",
        "**Llama-2-13B** is what the preset's softmax states and KV buffer are sized for, 40 heads of 128 "
        "(`state_rows` 1280, `kvbuf_heads` 80). For 7B 64 would do, with 7 block RAMs less in each of 64 memories.",
        "The paper names two values of efficiency, 88.4% and 89.1%, without saying of what; we take 7B and 13B.",
        "Accuracy with 25% skipped, reused keys and 4-bit weights is nowhere in the paper; see "
        "[dynamic-computation.md](dynamic-computation.md) for what it costs here.",
    ])


def _attention_cycles(program: Any, workload: Workload, prompt: int) -> float:
    """Cycles of attention while a prompt is read: first and last chunk, those between on a line."""
    chunk = program.plan.chunk
    total = []
    for position in sorted({0, prompt - chunk}):
        run = run_at(program, workload, position, chunk, 0)
        total.append(sum(block.cycles for block in blocks(program.program, run.spans) if block.module == "attention"))
    return prompt / chunk * sum(total) / len(total)


#: docs/dynamic-computation.md: a prompt in Llama-2's proportions.
_SIMULATED_PREFILL = (("skip", 1.14, 1.19), ("skip, reuse", 1.29, 1.30), ("skip, reuse, fused", 1.40, 1.60))


def prefill_section(config: OverlayConfig, log: Log, name: str = "llama2-7b",
                    prompts: Sequence[int] = _PROMPTS) -> Section:
    """Figure 8: attention while a prompt is read, against dense without fusion; and what fusion gives in decode."""
    shape = replace(find_geometry(name), layers=_LAYERS)
    variants = {"skip": (1.14, "dense", False), "skip, reuse": (1.29, "reuse", False),
                "skip, reuse, fused": (1.40, "reuse", True)}
    programs = {key: outline(shape, config, max(prompts) + 1, kv=kv, fused=fused)
                for key, (_, kv, fused) in {"base": (1, "", False), **variants}.items()}
    command = "python benchmarks/routing.py"
    rows = []
    for prompt in prompts:
        log(f"attention in a prompt of {prompt} tokens")
        base = _attention_cycles(programs["base"], Workload(memory="hbm"), prompt)
        for key, (paper, kv, _) in variants.items():
            cycles = _attention_cycles(programs[key], Workload(skip=0.25, kv=kv, memory="hbm"), prompt)
            rows.append(Row(f"{prompt} tokens: {key}", paper, base / cycles, "predicted", command, "{:.2f}x"))
    plain, fused = (outline(shape, config, max(prompts) + 1, fused=value) for value in (False, True))
    rows += [Row(f"128 tokens at `sim`, ideal memory: {key}", paper, ours, "simulated", command, "{:.2f}x")
             for key, paper, ours in _SIMULATED_PREFILL]
    for position in (prompts[0], prompts[-1]):
        log(f"decode behind {position} tokens")
        both = [run_at(program, Workload(), position, 1, 0).cycles for program in (plain, fused)]
        rows.append(Row(f"decode behind {position} tokens: fused", None, both[0] / both[1], "predicted", command,
                        "{:.2f}x"))
    return Section("Figure 8: attention in prefill, speed-up over dense without fusion", rows, [
        "The paper's factors are read from its text, without lengths. Ours are of the layers' attention, "
        f"projections included, {_LAYERS} layers of {name}; `benchmarks/routing.py` simulates the same steps on the "
        "RTL at `sim`. Reuse alone also saves the key and value projections of a quarter of the tokens. Without "
        "fusion the routers' scores, each sum of squares and each normalisation are a pass of their own.",
        "In decode the paper's gain from fusion shrinks with the context. Ours is small at any: reductions run while "
        "weights are loaded, fused or not, and only those of attention can show, which come with each tile of keys.",
    ])


def kv_section(results: str | Path | None) -> Section:
    """Section 5.4: bandwidth of keys and values, from a results file of ``skipopu bench kv --device rtl -o FOLDER``."""
    command = "skipopu bench kv --device rtl --config kv -o FOLDER"
    wanted = (("dense KV, share of peak", 0.887, "dense", None, "physical_share"),
              ("KV reuse, token-wise, no buffer", 0.782, "random", 0, "effective_share"),
              ("KV reuse and history buffer, effective", 1.015, "random", 1, "effective_share"),
              ("decoding token skips every second layer, effective", 0.831, "alternate", 1, "effective_share"),
              ("KV storage saved at 25% skipped", 0.254, "random", None, "storage_saved"))
    found, where = [], "-"
    if results is not None:
        try:
            report = json.loads(Path(results).read_text())
            found, where = report["rows"], f"{report['config']}, {report['layers']} layers, {report['memory']}"
        except (OSError, ValueError, KeyError, TypeError):
            raise RequestError(f"{results} holds no results of `skipopu bench kv`; give the kv.json that its -o "
                               "writes") from None
    rows = [Row(f"{what} (paper: interleaved addresses 55.8%)" if what.endswith("no buffer") else what, paper,
                _best(found, pattern, buffered, key), "simulated", command)
            for what, paper, pattern, buffered, key in wanted]
    notes = [f"At the largest context that the results file has for each row ({where})."
             if found else f"Not measured in this run: give --kv the kv.json of `{command}`."]
    return Section("Section 5.4: bandwidth of keys and values", rows, [
        *notes,
        "`Effective` counts bytes that came from the buffer as if memory had moved them, as the paper does: it may "
        "pass 100%. Contexts longer than the buffer holds gain less ([kv-memory.md](kv-memory.md)).",
    ])


def _best(rows: Sequence[dict[str, Any]], pattern: str, buffered: int | None, key: str) -> float | None:
    """The value at the largest context; buffered : 0 without the buffer, 1 with the largest one."""
    own = [row for row in rows if row["pattern"] == pattern and row[key] is not None
           and (buffered is None or bool(row["buffer_bytes"]) == buffered)]
    return max(own, key=lambda row: (row["tokens"], row["buffer_bytes"]))[key] if own else None


SYNTHESIS = ("all", "unit", "none")


def sections(config: OverlayConfig, kv_memory: Section, synthesis: str, log: Log,
             resources: str | None = None) -> list[Section]:
    """All tables; synthesis : one of SYNTHESIS; resources : a report for table 2. RequestError for others."""
    if synthesis not in SYNTHESIS:
        raise RequestError(f"--synthesis takes {', '.join(SYNTHESIS)}, not {synthesis!r}")
    first = [unit_section(config, log)] if synthesis != "none" else []
    whole = whole_section(config, log, synthesis == "all", resources)
    return [*first, whole, decode_section(config, log), prefill_section(config, log), kv_memory]


def document(sections: Sequence[Section], config: OverlayConfig, command: str) -> str:
    """The page."""
    lines = [
        "# The paper's tables", "",
        f"Written by `{command}`; do not edit.", "",
        "SkipOPU ([arXiv 2603.14785](https://arxiv.org/abs/2603.14785)) beside this project, configuration "
        f"`{config.name}`. The paper's values are what it reports for a U280; nothing here ran on a card. Labels of "
        "ours: *predicted* by the cycle model ([profiling.md](profiling.md)), within 2% of the RTL at the small "
        "configurations of its test; *simulated* on the RTL; *estimated* by Yosys before placement; *measured* in "
        "software.", ""]
    for section in sections:
        lines += [f"## {section.title}", "", "| | paper | ours | label | gap | command |", "|---|---|---|---|---|---|"]
        lines += [f"| {' | '.join(row.cells())} |" for row in section.rows]
        lines += ["", *(line for note in section.notes for line in (note, ""))]
    return "\n".join(lines).rstrip() + "\n"
