"""The commands about performance: ``fit``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from skipopu.hw.config import PRESETS, preset

from ..console import note, print_json, progress

if TYPE_CHECKING:
    from ..model import ModelConfig
    from .outline import Kind

__all__ = ["fit"]

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


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
        weights: Annotated[str, typer.Option("--weights", help="Kind of weights for --geometry: q4_0, q4_1 or q8_0.")]
        = "q4_0",
        memory: Annotated[str, typer.Option("--memory", help="Model of the memory: hbm (timed) or ideal.")] = "hbm",
        seed: Annotated[int, typer.Option("--seed", min=0, help="Of the modules that are skipped.")] = 1,
        as_json: JsonOption = False) -> None:
    """Predict whether a model fits a configuration, what bounds it, and how fast it is. Needs no weights."""
    from .fit import Workload
    from .fit import fit as run
    chosen = preset(config)
    shape, kind = _shape(model, geometry, weights)
    workload = Workload(prompt=prompt, count=count, skip=skip, kv=kv or ("reuse" if skip else ""), kind=kind,
                        memory=memory, seed=seed)
    with progress(f"predicting {shape.name}") as update:
        found = run(shape, chosen, workload, lambda line: update(None, line))
    if as_json:
        values = found.as_json()
        print_json({"model": shape.name, "config": chosen.name, "prompt": prompt, "tokens": count, "skip": skip,
                    "kv": workload.kv, "memory": memory, **values, "labels": dict.fromkeys(values, "predicted")})
    else:
        mib = found.port_bytes / 2**20
        room = f" of {found.port_capacity / 2**20:.0f}" if found.port_capacity else ""
        print(f"{shape.name} {'fits' if found.fits_memory else 'does not fit the memory of'} configuration "
              f"{chosen.name}: chunks of {found.chunk} tokens, {mib:.1f}{room} MiB behind each port (predicted)\n"
              f"decode: {found.tokens_per_second:.1f} tokens/s at {found.core_mhz:g} MHz, "
              f"{found.bytes_per_token / 1e6:,.1f} MB per token (predicted)\n"
              f"bound by {found.bound}: {found.share_of_peak:.1%} of the ports' peak, {found.share_of_memory:.1%} of "
              f"what the memory can deliver (predicted)")
        for name, cycles in found.terms.items():
            print(f"  {name}: {cycles:,.0f} cycles per token, {cycles / found.cycles_per_token:.1%} of the time "
                  f"(predicted)")
        print(f"prompt of {prompt} tokens: {found.prefill_cycles / found.core_mhz / 1e3:.1f} ms (predicted)")
        parts = (f"{size / 2**20:,.0f} MiB {name}" for name, size in found.parts.items() if size)
        note(f"memory holds {', '.join(parts)}")
    if not found.fits_memory:
        raise typer.Exit(1)


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
