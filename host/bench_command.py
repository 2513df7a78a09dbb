"""The command ``skipopu bench``: measurements of parts of the machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from skipopu.hw.config import PRESETS, preset

from .console import note, print_json, progress, whole_file

if TYPE_CHECKING:
    import numpy as np

    from .model import ModelConfig

__all__ = ["app", "kv"]

app = typer.Typer(name="bench", no_args_is_help=True, help="Measure parts of the machine.")


@app.callback()
def bench() -> None:
    """Measure parts of the machine."""


@app.command()
def kv(tokens: Annotated[str, typer.Option("--tokens", metavar="128,1024", help="Contexts to decode one token "
                                                                               "behind.")] = "128,512,2048",
       skip: Annotated[float, typer.Option("--skip", help="Part of the (layer, token) pairs without attention, 0..1.")]
       = 0.25,
       pattern: Annotated[str, typer.Option("--pattern", help="Which: dense (no routers), random, layerwise, alternate "
                                            "(random, and the decoding token skips every second layer), routers.")]
       = "dense,random,alternate",
       buffer: Annotated[str, typer.Option("--buffer", metavar="0,all", help="Sizes of the history buffer in bytes, or "
                                                                            "all that there is.")] = "0,all",
       layers: Annotated[int, typer.Option("--layers", help="Layers.")] = 16,
       kv_heads: Annotated[int, typer.Option("--kv-heads", help="KV heads.")] = 32,
       head_dim: Annotated[int, typer.Option("--head-dim", help="Features of a head.")] = 64,
       model: Annotated[str | None, typer.Option("-m", "--model", help="Take the sizes, and the decisions of pattern "
                                                                       "routers, from this model.")] = None,
       routers: Annotated[str | None, typer.Option("--routers", help="Its routers.")] = None,
       sequences: Annotated[str | None, typer.Option("--sequences", help=".npz file with the text they read, `tokens`, "
                                                                         "integers [n, length].")] = None,
       kv_format: Annotated[str, typer.Option("--kv-format", metavar="fp16|12|8", help="Of KV records.")] = "fp16",
       device: Annotated[str, typer.Option("--device", help="functional, or rtl for cycles too.")] = "functional",
       memory: Annotated[str | None, typer.Option("--memory", help="Timing of simulated memory: hbm or ideal. Default: "
                                                                   "hbm.")] = None,
       config: Annotated[str, typer.Option("--config", help=f"Overlay configuration: kv (a quarter of u280), "
                                                            f"{', '.join(PRESETS)}.")] = "kv",
       output: Annotated[str | None, typer.Option("-o", "--output", help="Folder for kv.json, kv.md and pictures.")]
       = None,
       seed: Annotated[int, typer.Option("--seed", min=0, help="Of the random patterns.")] = 0,
       as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False) -> None:
    """Move KV records as decoding does, without weights: bytes, hits of the history buffer, shares of the peak."""
    from pathlib import Path

    from .kv_bench import KV_CONFIG, LABELS, geometry, make_pattern, measure
    from .kv_report import draw_cost, draw_shares, table
    chosen = KV_CONFIG if config == KV_CONFIG.name else preset(config)
    contexts = [_number("tokens", text, 1) for text in tokens.split(",")]
    sizes = [None if text.strip() == "all" else _number("buffer", text, 0) for text in buffer.split(",")]
    settings = geometry(layers, kv_heads, head_dim)
    names, decisions = [name.strip() for name in pattern.split(",")], None
    if model is not None:
        settings, decisions = _of_model(model, routers, sequences, max(contexts), "routers" in names)
    patterns = [make_pattern(name, settings.layers, max(contexts), skip, seed, decisions) for name in names]
    options = {} if device == "functional" and memory is None else {"memory": memory or "hbm"}
    if device not in ("functional", "rtl") and memory is None:
        options = {}
    rows = []
    with progress("opening") as update:
        for row in measure(chosen, settings, contexts, patterns, sizes, device, lambda line: update(None, line[:80]),
                           lambda done: update(None, f"{done} tokens stored"), kv_format, **options):
            rows.append(row)
            update(None, f"{row.pattern}, {row.tokens} tokens")
    report = {"config": chosen.name, "device": device, "memory": options.get("memory"), "kv_format": kv_format,
              "layers": settings.layers,
              "kv_heads": settings.kv_heads, "head_dim": settings.head_dim, "skip": skip,
              "rows": [row.as_json() for row in rows], "labels": LABELS}
    if output is not None:
        folder = Path(output)
        folder.mkdir(parents=True, exist_ok=True)
        import json
        with whole_file(folder / "kv.json") as partial:
            partial.write_text(json.dumps(report, indent=1) + "\n")
        with whole_file(folder / "kv.md") as partial:
            partial.write_text("\n".join(table(rows, markdown=True)) + "\n")
        for name, draw in (("cost.png", draw_cost), ("shares.png", draw_shares)):
            with whole_file(folder / name) as partial:
                draw(partial, rows, chosen)
        note(f"{folder}: kv.json, kv.md, cost.png, shares.png written")
    if as_json:
        print_json(report)
        return
    for line in table(rows):
        print(line)


def _number(name: str, text: str, least: int) -> int:
    from .errors import RequestError
    if not text.strip().isdecimal() or int(text) < least:
        raise RequestError(f"--{name} takes whole numbers of at least {least} with commas, not {text.strip()!r}")
    return int(text)


def _of_model(name: str, routers: str | None, sequences: str | None, positions: int,
              decide: bool) -> tuple[ModelConfig, np.ndarray | None]:
    """Sizes of a model; bool [layers, positions], whether its routers execute the attention for joined sequences."""
    import numpy as np

    from .errors import RequestError
    from .evaluate import load_sequences
    from .model import Model
    from .session import ReferenceGenerator, Routing, open_source, route_source
    source = open_source(name)
    if not isinstance(source, Model):
        raise RequestError("the bench needs the model itself; a bundle holds only its compiled form")
    if not decide:
        return source.config, None
    if routers is None or sequences is None:
        raise RequestError("pattern routers needs --routers and the --sequences that they read")
    model, its_routers, _ = route_source(source, Routing(routers=routers))
    assert isinstance(model, Model)
    generator, found = ReferenceGenerator(model, routers=its_routers), list[np.ndarray]()
    for sequence in load_sequences(sequences):
        if sum(part.shape[1] for part in found) >= positions:
            break
        generator.clear()
        generator.prefill(sequence[:generator.context].tolist())
        assert generator.decisions is not None
        found.append(generator.decisions[:, 0])
    joined = np.concatenate(found, 1)
    return source.config, np.tile(joined, -(-positions // joined.shape[1]))[:, :positions]
