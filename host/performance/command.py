"""The commands about performance: ``profile``, ``fit``, ``explore`` and ``bench paper``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from skipopu.hw.config import PRESETS, preset

from ..console import note, print_json, progress

if TYPE_CHECKING:
    from ..model import ModelConfig
    from .outline import Kind

__all__ = ["explore", "fit", "paper", "profile"]

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


def profile(model: Annotated[str, typer.Option("-m", "--model", help="GGUF file, Hugging Face folder, bundle, or a "
                                                                     "name that `skipopu models` lists.")],
            output: Annotated[str, typer.Option("-o", "--output", help="Folder to write.")],
            prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="Text to continue.")] = None,
            prompt_tokens: Annotated[str | None, typer.Option("--prompt-tokens", metavar="5,17,9", help="Token ids to "
                                                              "continue, for models without a tokenizer.")] = None,
            count: Annotated[int, typer.Option("-n", "--tokens", help="Tokens to generate behind the prompt.")] = 4,
            device: Annotated[str, typer.Option("--device", help="rtl records every cycle; other devices compute, and "
                                                                 "the cycle model says when.")] = "functional",
            config: Annotated[str | None, typer.Option("--config", help=f"Overlay configuration: {', '.join(PRESETS)}. "
                                                       "Default: sim, or the bundle's own.")] = None,
            context: Annotated[int | None, typer.Option("--context", help="Positions to provide for.")] = None,
            routers: Annotated[str | None, typer.Option("--routers", help="Router file, or a name such as "
                                                                          "smollm2:reuse.")] = None,
            kv: Annotated[str | None, typer.Option("--kv", help="Keys and values of tokens that skip attention: "
                                                                "reuse or dense.")] = None,
            force_skip: Annotated[float | None, typer.Option("--force-skip", metavar="RATE", help="Skip this share of "
                                                             "the modules at random, 0..1.")] = None,
            kv_format: Annotated[str | None, typer.Option("--kv-format", metavar="fp16|12|8", help="Of KV records.")]
            = None,
            memory: Annotated[str, typer.Option("--memory", help="Simulated or predicted memory: ideal or hbm "
                                                              "(timed).")] = "ideal",
            seed: Annotated[int, typer.Option("--seed", min=0, help="Of the random numbers.")] = 0,
            as_json: JsonOption = False) -> None:
    """Show where the cycles of a generation go: timeline, stalls by cause, roofline, costliest instructions."""
    from ..errors import RequestError
    from ..plan import KvSizes
    from ..session import REFERENCE, Routing, check_device, compile_source, open_source, route_source
    from ..session import prompt_tokens as encode
    from .profile import FILES, open_profiled, write_profile
    check_device(device)
    if device == REFERENCE:
        raise RequestError("the reference has no instructions to profile; use --device functional or rtl")
    if (prompt is None) == (prompt_tokens is None):
        raise typer.BadParameter("give the prompt either with -p or with --prompt-tokens")
    with progress(f"loading {model}"):
        source = open_source(model)
    tokens = encode(source, prompt, prompt_tokens)
    routed, its_routers, force = route_source(source, Routing(routers=routers, kv=kv, force_skip=force_skip, seed=seed))
    with progress("compiling"):
        sizes = None if kv_format is None else KvSizes(format=kv_format)
        compiled = compile_source(routed, config, context, its_routers, sizes)
    with progress(f"opening {device}") as update:
        accelerator = open_profiled(device, compiled, lambda line: update(None, line[:80]), force, memory)
    with accelerator.device, progress(f"generating {count} tokens", count) as update:
        for done, _ in enumerate(accelerator.generate(tokens, count), 1):
            update(done, None)
    recordings = accelerator.recordings
    label = recordings[-1].label
    facts = {"model": compiled.map.model, "configuration": compiled.config.name, "device": device,
             "memory": memory, "prompt": f"{len(tokens)} tokens", "generated": f"{count} tokens",
             "times": {"simulated": "simulated: recorded from the RTL",
                       "predicted": "predicted: by the cycle model, not recorded"}[label]}
    with progress("writing") as update:
        found = write_profile(output, f"{compiled.map.model} on {compiled.config.name}", compiled.config, recordings,
                              facts, lambda line: update(None, f"writing {line}"))
    if as_json:
        print_json(found)
        return
    print(f"{output}: {', '.join(FILES)}")
    print(f"{found['cycles']:,} cycles in {len(recordings)} runs ({label}): "
          + ", ".join(f"{cause} {cycles / found['cycles']:.1%}" for cause, cycles in found["breakdown"].items()))
    for item in found["costliest"][:3]:
        share = item["cycles"] / found["cycles"]
        print(f"  {share:.1%} {item['text'].split()[0]} ({item['note']}), {item['count']} times")


def fit(model: Annotated[str | None, typer.Option("-m", "--model", help="GGUF file, Hugging Face folder, or a name "
                                                                        "that `skipopu models` lists.")] = None,
        geometry: Annotated[str | None, typer.Option("--geometry", help="Shape of a known model in place of a model, "
                                                                        "such as llama2-7b.")] = None,
        config: Annotated[str, typer.Option("--config", help=f"Overlay configuration: {', '.join(PRESETS)}.")] = "u280",
        prompt: Annotated[int, typer.Option("--prompt", help="Tokens of the prompt.")] = 128,
        count: Annotated[int, typer.Option("-n", "--tokens", help="Tokens to generate behind it.")] = 1024,
        skip: Annotated[float, typer.Option("--skip", help="Share of the modules that tokens skip, 0..1.")] = 0.0,
        kv: Annotated[str | None, typer.Option("--kv", help="Keys and values of tokens that skip attention: reuse or "
                                                            "dense.")] = None,
        weights: Annotated[str, typer.Option("--weights", help="Kind of weights for --geometry: q4_0, q4_g64, q4_g128, "
                                                               "with minima q4_1, q4m_g64, q4m_g128, or q8_0.")]
        = "q4_0",
        kv_format: Annotated[str, typer.Option("--kv-format", metavar="fp16|12|8", help="Of KV records.")] = "fp16",
        buffer: Annotated[int | None, typer.Option("--buffer", metavar="BYTES", help="Of the history buffer; 0 for "
                                                   "none. Default: all of it.")] = None,
        sizes: Annotated[list[str] | None, typer.Option("--size", metavar="NAME=NUMBER", help="Another size of the "
                                                        "configuration; may be repeated.")] = None,
        memory: Annotated[str, typer.Option("--memory", help="Model of the memory: hbm (timed) or ideal.")] = "hbm",
        seed: Annotated[int, typer.Option("--seed", min=0, help="Of the modules that are skipped.")] = 1,
        as_json: JsonOption = False) -> None:
    """Predict whether a model fits a configuration, what bounds it, and how fast it is. Needs no weights."""
    from .fit import Workload, resized
    from .fit import fit as run
    chosen = resized(preset(config), sizes or ())
    shape, kind = _shape(model, geometry, weights)
    workload = Workload(prompt=prompt, count=count, skip=skip, kv=kv or ("reuse" if skip else ""), kind=kind,
                        memory=memory, seed=seed, kv_format=kv_format, buffer=buffer)
    with progress(f"predicting {shape.name}") as update:
        found = run(shape, chosen, workload, lambda line: update(None, line))
    if as_json:
        values = found.as_json()
        print_json({"model": shape.name, "config": chosen.name, "prompt": prompt, "tokens": count, "skip": skip,
                    "kv": workload.kv, "kv_format": kv_format, "memory": memory, **values,
                    "labels": dict.fromkeys(values, "predicted")})
    else:
        mib = found.port_bytes / 2**20
        room = f" of {found.port_capacity / 2**20:.0f}" if found.port_capacity else ""
        print(f"{shape.name} {'fits' if found.fits_memory else 'does not fit the memory of'} configuration "
              f"{chosen.name}: chunks of {found.chunk} tokens, {mib:.1f}{room} MiB behind each port (predicted)\n"
              f"decode: {found.tokens_per_second:.1f} tokens/s at {found.core_mhz:g} MHz, "
              f"{found.bytes_per_token / 1e6:,.1f} MB per token (predicted)\n"
              f"bound by {found.bound}: {found.share_of_peak:.1%} of the ports' peak, {found.share_of_memory:.1%} of "
              f"what the memory can deliver (predicted)")
        if found.served:
            print(f"the history buffer serves {found.served * found.bytes_per_token / 1e6:.1f} MB per token more: "
                  f"{found.effective_share:.1%} of the peak with them (predicted)")
        for name, cycles in found.terms.items():
            print(f"  {name}: {cycles:,.0f} cycles per token, {cycles / found.cycles_per_token:.1%} of the time "
                  f"(predicted)")
        print(f"prompt of {prompt} tokens: {found.prefill_cycles / found.core_mhz / 1e3:.1f} ms (predicted)")
        parts = (f"{size / 2**20:,.0f} MiB {name}" for name, size in found.parts.items() if size)
        note(f"memory holds {', '.join(parts)}")
    if not found.fits_memory:
        raise typer.Exit(1)


def explore(output: Annotated[str, typer.Option("-o", "--output", help="Folder for pareto.png, pareto.md, and "
                                                                       "results.jsonl, which a later run continues.")],
            config: Annotated[str, typer.Option("--config", help=f"Configuration to start from: {', '.join(PRESETS)}.")]
            = "u280",
            sweep: Annotated[list[str] | None, typer.Option("--sweep", metavar="SIZE=A,B", help="Size and its values, "
                                                            "such as ports=8,16,32; may be given several times. "
                                                            "Default: lanes=32,64 columns=64,128 ports=16,32.")] = None,
            geometry: Annotated[str, typer.Option("--geometry", help="Shapes, with commas.")]
            = "llama2-7b,smollm2-135m",
            skip: Annotated[str, typer.Option("--skip", help="Shares of skipped modules, with commas.")] = "0,0.25",
            kv_format: Annotated[str, typer.Option("--kv-format", help="Formats of KV records (fp16, 12, 8), with "
                                                                       "commas.")] = "fp16",
            prompt: Annotated[int, typer.Option("--prompt", help="Tokens of the prompt.")] = 128,
            count: Annotated[int, typer.Option("-n", "--tokens", help="Tokens generated behind it.")] = 1024,
            weights: Annotated[str, typer.Option("--weights", help="Kind of weights, as of `skipopu fit`.")] = "q4_0",
            memory: Annotated[str, typer.Option("--memory", help="Model of the memory: hbm (timed) or ideal.")] = "hbm",
            jobs: Annotated[int, typer.Option("--jobs", min=1, help="Processes.")] = 1,
            ray: Annotated[str | None, typer.Option("--ray", metavar="local|ADDRESS", help="Evaluate on a Ray cluster "
                                                    "instead, or on one started here.")] = None,
            as_json: JsonOption = False) -> None:
    """Predict many configurations: speed, resources, and which of them nothing beats."""
    from pathlib import Path

    from ..console import whole_file
    from .explore import Sweep, draw, pareto, table
    from .explore import explore as run
    axes = dict(_axis(text) for text in sweep or ("lanes=32,64", "columns=64,128", "ports=16,32"))
    chosen = Sweep(base=preset(config), axes=axes, geometries=tuple(geometry.split(",")),
                   skips=tuple(_numbers("--skip", skip, float)), prompt=prompt, count=count, weights=weights,
                   memory=memory, kv_formats=tuple(kv_format.split(",")))
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    with progress("exploring", len(list(chosen.points()))) as update:
        results = run(chosen, folder / "results.jsonl", jobs=jobs, ray=ray, tell=lambda done, total: update(done, None))
    title = f"around {config}, {prompt} + {count} tokens, {memory} memory (predicted)"
    with whole_file(folder / "pareto.png") as partial:
        draw(partial, results, title, "png")
    lines = table(results)
    with whole_file(folder / "pareto.md") as partial:
        partial.write_text("\n".join([f"Configurations {title}; resources are estimated.", "", *lines]) + "\n")
    if as_json:
        print_json({"results": results, "pareto": pareto(results),
                    "labels": {"tokens_per_second": "predicted", "resources": "estimated"}})
        return
    for line in lines:
        print(line)
    refused = sum("refused" in item for item in results)
    note(f"{folder}: results.jsonl, pareto.png, pareto.md; {len(results)} points, {refused} of them cannot be built or "
         "do not fit")


def _axis(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, values = text.partition("=")
    return name.strip(), tuple(_numbers(f"--sweep {name.strip()}", values, int))


def _numbers(option: str, text: str, kind: type) -> list[Any]:
    from ..errors import RequestError
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise RequestError(f"{option} takes numbers with commas, not {text!r}") from None


def _shape(model: str | None, geometry: str | None, weights: str) -> tuple[ModelConfig, str | Kind]:
    """The shape, and the kinds of its weights."""
    from ..errors import RequestError
    from ..model import Model
    from .geometries import find_geometry
    if (model is None) == (geometry is None):
        raise typer.BadParameter("give either a model with -m or a shape with --geometry")
    if geometry is not None:
        return find_geometry(geometry), weights
    from ..session import open_source
    from .fit import kinds_of
    assert model is not None
    with progress(f"loading {model}"):
        source = open_source(model)
    if not isinstance(source, Model):
        raise RequestError("a bundle holds only a model's compiled form; give the model itself, or --geometry")
    return source.config, kinds_of(source)


def paper(output: Annotated[str, typer.Option("-o", "--output", help="Page to write.")] = "docs/paper.md",
          config: Annotated[str, typer.Option("--config", help=f"Overlay configuration: {', '.join(PRESETS)}.")]
          = "u280",
          kv: Annotated[str | None, typer.Option("--kv", help="kv.json that `skipopu bench kv --device rtl -o FOLDER` "
                                                              "wrote: the figures of section 5.4.")] = None,
          synthesis: Annotated[str, typer.Option("--synthesis", help="What Yosys synthesises: all (tables 1 and 2, "
                                                                     "hours for u280), unit (table 1), none.")]
          = "unit",
          resources: Annotated[str | None, typer.Option("--resources", help="Table 2 from what `skipopu synth --config "
                                                                            "NAME --json` printed.")] = None,
          as_json: JsonOption = False) -> None:
    """Write the paper's tables beside ours: its value, ours, what kind of figure, the gap, the command."""
    from ..console import whole_file
    from . import paper as tables
    chosen = preset(config)
    options = [f"--config {config}"] if config != "u280" else []
    options += ["--kv kv.json"] if kv else []
    options += [f"--synthesis {synthesis}"] if synthesis != "unit" else []
    options += [f"--resources {Path(resources).name}"] if resources else []
    command = " ".join(["skipopu bench paper", *options])
    kv_memory = tables.kv_section(kv)
    with whole_file(output) as partial, progress("tables") as update:
        sections = tables.sections(chosen, kv_memory, synthesis, lambda line: update(None, line[:80]), resources)
        partial.write_text(tables.document(sections, chosen, command), encoding="utf-8")
    if as_json:
        print_json({"sections": [{"title": item.title, "rows": [vars(row) for row in item.rows]} for item in sections]})
        return
    for section in sections:
        print(section.title)
        for row in section.rows:
            print("  " + "  ".join(row.cells()[:-1]))
    note(f"{output} written")
