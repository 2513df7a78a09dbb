"""The command ``skipopu``. Thin: options in, text, numbers or one line of error out; the work is done elsewhere.

Everything heavy is imported inside the commands, so that help and mistakes are answered at once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from skipopu.hw.config import PRESETS, preset

from . import bench_command, board_commands
from .bitstream_command import bitstream
from .console import note, print_json, progress, whole_file
from .performance import command as performance_commands
from .tuning.command import tune
from .tuning.train_command import train

if TYPE_CHECKING:
    from .compiled import Compiled
    from .generation import Generator
    from .model import Model
    from .plan import KvSizes
    from .routers import Routers
    from .routes import Force
    from .runtime import Accelerator

__all__ = ["app", "main"]

app = typer.Typer(name="skipopu", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Run language models on an open FPGA overlay processor: on its RTL, its bit-exact model, or "
                       "the float reference.")
for _command in (train, tune, board_commands.export, board_commands.devices, board_commands.selftest, bitstream,
                 performance_commands.explore, performance_commands.fit,
                 performance_commands.profile):
    app.command()(_command)
bench_command.app.command()(performance_commands.paper)
app.add_typer(bench_command.app)

ModelOption = Annotated[str, typer.Option("-m", "--model", help="GGUF file, Hugging Face folder, bundle, or a name "
                                                                "that `skipopu models` lists.")]
PromptOption = Annotated[str | None, typer.Option("-p", "--prompt", help="Text to continue.")]
TokensOption = Annotated[str | None, typer.Option("--prompt-tokens", metavar="5,17,9",
                                                  help="Token ids to continue, for models without a tokenizer.")]
ChatOption = Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")]
DeviceOption = Annotated[str, typer.Option("--device", help="Where the model runs: reference, functional, rtl or what "
                                                     "`skipopu devices` lists.")]
ConfigOption = Annotated[str | None, typer.Option("--config", help=f"Overlay configuration: {', '.join(PRESETS)}. "
                                                                   "Default: sim, or the bundle's own.")]
ContextOption = Annotated[int | None, typer.Option("--context", help="Positions to provide for. Default: the model's, "
                                                                     "at most 2048.")]
RoutersOption = Annotated[str | None, typer.Option("--routers", help="Router file, SkipGPT checkpoint (.pth), "
                                                                     "smollm2:reuse, smollm2:dense or story:reuse: "
                                                                     "tokens skip what it decides. @0.1 behind it: "
                                                                     "about a tenth of the weights.")]
LoraOption = Annotated[str | None, typer.Option("--lora", metavar="FILE", help="SkipGPT's LoRA deltas (.pth), added to "
                                                "the model's weights.")]
KvOption = Annotated[str | None, typer.Option("--kv", help="Keys and values of tokens that skip attention: reuse those "
                                                           "of an earlier layer, or dense. Default: the routers'.")]
ForceOption = Annotated[float | None, typer.Option("--force-skip", metavar="RATE", help="Skip this share of the "
                                                   "modules at random in place of the routers' decisions, 0..1.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Of the random numbers.")]
BufferOption = Annotated[int | None, typer.Option("--buffer", metavar="BYTES", help="On-chip history buffer for KV "
                                                  "records that later layers reuse. Default: all there is.")]
ShareOption = Annotated[float | None, typer.Option("--kv-share", metavar="SHARE", help="With KV reuse, provide memory "
                                                   "for this part of all (layer, token) pairs, 0..1. Default: 1.")]
FormatOption = Annotated[str | None, typer.Option("--kv-format", metavar="fp16|12|8", help="How KV records are stored: "
                                                   "FP16, or 12 or 8 bits with one exponent for each head's key and "
                                                   "value. Default: fp16.")]
MemoryOption = Annotated[str | None, typer.Option("--memory", help="Timing of simulated memory: ideal or hbm. Default: "
                                                                   "ideal.")]
WeightsOption = Annotated[str | None, typer.Option("--weights", metavar="KIND", help="Kind of the layers' linear "
                                                   "weights: q4_0, q4_g64, q4_g128, with minima q4_1, q4m_g64, "
                                                   "q4m_g128, or q8_0. A GGUF file's are quantised again. Default: "
                                                   "as they are.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


@app.command()
def generate(model: ModelOption, prompt: PromptOption = None, prompt_tokens: TokensOption = None,
             count: Annotated[int, typer.Option("-n", "--tokens", help="Tokens to generate at most.")] = 64,
             chat: ChatOption = False, device: DeviceOption = "functional", config: ConfigOption = None,
             context: ContextOption = None,
             temp: Annotated[float | None, typer.Option("--temp", help="Sample at this temperature; 0 takes the "
                                                                       "likeliest token.")] = None,
             top_k: Annotated[int | None, typer.Option("--top-k", help="Sample from the k likeliest.")] = None,
             top_p: Annotated[float | None, typer.Option("--top-p", help="Sample from the likeliest that reach this "
                                                                         "probability.")] = None,
             routers: RoutersOption = None, lora: LoraOption = None, kv: KvOption = None,
             force_skip: ForceOption = None, seed: SeedOption = 0, buffer: BufferOption = None,
             kv_share: ShareOption = None, kv_format: FormatOption = None, memory: MemoryOption = None,
             weights: WeightsOption = None, as_json: JsonOption = False) -> None:
    """Continue a prompt; text on stdout as it comes, timings on stderr."""
    from .report import LABELS, Timing, memory_report, skip_report, summary_lines
    from .session import Routing, check_device, route_source
    from .session import prompt_tokens as encode
    check_device(device)
    its_prompt = _prompt(prompt, prompt_tokens)
    source = _open(model, lora, weights)
    tokens = encode(source, *its_prompt, chat)
    sampling = _sampling(temp, top_k, top_p, seed)
    routed = route_source(source, Routing(routers=routers, kv=kv, force_skip=force_skip, seed=seed))
    generator = _open_generator(device, config, context, *routed, _sizes(buffer, kv_share, kv_format), memory)
    decoder = source.tokenizer.stream() if source.tokenizer else None
    text: list[str] = []

    def show(piece: str) -> None:
        text.append(piece)
        if not as_json:
            print(piece, end="", flush=True)

    begin, first, found = time.perf_counter(), 0.0, list[int]()
    answers = generator.generate(tokens, count, sampling)
    with progress(f"reading {len(tokens)} tokens"):
        token = next(answers, None)
        first = time.perf_counter() - begin
    while token is not None:
        found.append(token)
        show(decoder.feed(token) if decoder else f"{' ' if text else ''}{token}")
        token = next(answers, None)
    show(decoder.finish() if decoder else "")
    timing = Timing(first, time.perf_counter() - begin, len(found))
    runs, its_config = getattr(generator, "stats", []), getattr(generator, "config", None)
    report = {"text": "".join(text) if decoder else None, "tokens": found, "prompt_tokens": tokens,
              "device": device, "config": its_config.name if its_config else None, "finish": generator.finish,
              **timing.as_json(), **memory_report(runs, its_config),
              **skip_report(generator.decisions), "labels": LABELS}
    if as_json:
        print_json(report)
        return
    print(flush=True)
    for line in summary_lines(report):
        note(line)


@app.command()
def compare(model: ModelOption, prompt: PromptOption = None, prompt_tokens: TokensOption = None,
            count: Annotated[int, typer.Option("-n", "--tokens", help="Tokens to generate.")] = 16,
            chat: ChatOption = False,
            devices: Annotated[str, typer.Option("--devices", help="Which is right, and which is tested.")]
            = "functional,rtl",
            config: ConfigOption = None, context: ContextOption = None, routers: RoutersOption = None,
            lora: LoraOption = None, kv: KvOption = None, force_skip: ForceOption = None, seed: SeedOption = 0,
            buffer: BufferOption = None, kv_share: ShareOption = None, kv_format: FormatOption = None,
            as_json: JsonOption = False) -> None:
    """Run two devices side by side; name the first instruction whose result differs, and exit with 1."""
    from .compare import compare as run
    from .report import MEMORY, memory_report, skip_report
    from .session import Routing, parse_devices, route_source
    from .session import prompt_tokens as encode
    names = parse_devices(devices)
    its_prompt = _prompt(prompt, prompt_tokens)
    source = _open(model, lora)
    tokens = encode(source, *its_prompt, chat)
    model_of, its_routers, force = route_source(source, Routing(routers=routers, kv=kv, force_skip=force_skip,
                                                               seed=seed))
    compiled = _compile(model_of, config, context, its_routers, _sizes(buffer, kv_share, kv_format))
    first, second = (_open_device(name, compiled, force) for name in names)
    total = len(tokens) + count - 1
    with progress("comparing", total) as update:
        for so_far in run(first, second, tokens, count):
            result = so_far
            update(first.position, None)
    difference = result.difference
    if as_json:
        whole = difference is None  # after a difference parts of runs were repeated
        memory = memory_report(second.stats if whole else (), compiled.config)
        skipped = skip_report(second.decisions if whole else None)
        labels = dict.fromkeys(("logits", "generated", *MEMORY, *skipped), "simulated")
        print_json({"devices": names, "config": compiled.config.name, "prompt_tokens": tokens, **result.as_json(),
                    **{name: memory[name] for name in MEMORY}, **skipped, "labels": labels})
    elif difference is None:
        print(f"{' and '.join(names)} are equal bit for bit: {result.logits:,} logits of {result.runs} runs "
              f"(simulated), {len(result.generated)} tokens generated (simulated)")
        if source.tokenizer:
            print(source.tokenizer.decode(result.generated))
    else:
        print(f"{' and '.join(names)} differ after {len(result.generated)} tokens generated (simulated)\n{difference}")
    if difference is not None:
        raise typer.Exit(1)


@app.command("eval")
def evaluate(model: ModelOption,
             tokens: Annotated[str, typer.Option("--tokens", help=".npz file with `tokens`, integers [n, length].")],
             limit: Annotated[int | None, typer.Option("--limit", help="Sequences to use.")] = None,
             device: DeviceOption = "functional", config: ConfigOption = None,
             context: ContextOption = None, routers: RoutersOption = None, lora: LoraOption = None,
             kv: KvOption = None, force_skip: ForceOption = None, seed: SeedOption = 0, weights: WeightsOption = None,
             kv_format: FormatOption = None,
             as_json: JsonOption = False) -> None:
    """Measure how near a device comes to the float reference: perplexity, KL, top-1 agreement.

    With routers a device is compared with the reference that has the same routers; the reference itself, with the one
    that has none. With other weights both are compared with the reference that has the model's own.
    """
    from .errors import RequestError
    from .evaluate import evaluate as run
    from .evaluate import load_sequences
    from .model import Model
    from .session import REFERENCE, ReferenceGenerator, Routing, check_device, route_source
    check_device(device)
    sequences = load_sequences(tokens, limit)
    source = _open(model, lora)
    if not isinstance(source, Model):
        raise RequestError("eval needs the model itself for the reference; a bundle holds only its compiled form")
    length = sequences.shape[1]
    given = source if weights is None else _open(model, lora, weights)
    model_of, its_routers, force = route_source(given, Routing(routers=routers, kv=kv, force_skip=force_skip,
                                                              seed=seed))
    assert isinstance(model_of, Model)
    routed = ReferenceGenerator(model_of, routers=its_routers, force=force)
    for sequence in sequences:
        routed.check_tokens(sequence)
    reference = routed
    tested: Generator = routed
    if device != REFERENCE:
        tested = _open_generator(device, config, context or length, model_of, its_routers, force,
                                 _sizes(None, None, kv_format))
    elif its_routers is not None:
        reference = ReferenceGenerator(source)
    if weights is not None:
        reference = ReferenceGenerator(source)
    begin = time.perf_counter()
    with progress("evaluating", sequences.size - len(sequences)) as update:
        for total in run(reference, tested, sequences):
            report = total.as_json()
            update(total.tokens, None)
    kind = "measured" if device == REFERENCE else "simulated"
    labels = dict.fromkeys(report, kind) | {"reference_perplexity": "measured", "tokens": "measured"}
    if as_json:
        print_json({**report, "device": device, "seconds": time.perf_counter() - begin,
                    "labels": labels | {"seconds": "measured"}})
        return
    print(f"perplexity {report['perplexity']:.4f} ({kind}), reference {report['reference_perplexity']:.4f} (measured)\n"
          f"KL to the reference {report['kl']:.3e} nats per token ({kind})\n"
          f"top-1 agreement {report['top1']:.2%} ({kind}) over {report['tokens']} tokens (measured)")
    if its_routers is not None:
        alike = report["decision_agreement"]
        print(f"skipped {report['skip_attention']:.1%} of attention, {report['skip_mlp']:.1%} of MLP modules ({kind})"
              + (f"; {alike:.2%} of the decisions are the reference's" if alike is not None else ""))
    note(f"took {time.perf_counter() - begin:.1f} s (measured)")


@app.command()
def routes(model: ModelOption, prompt: PromptOption = None, prompt_tokens: TokensOption = None,
           count: Annotated[int, typer.Option("-n", "--tokens", help="Tokens to generate behind the prompt.")] = 16,
           chat: ChatOption = False, device: DeviceOption = "functional", config: ConfigOption = None,
           context: ContextOption = None, routers: RoutersOption = None, lora: LoraOption = None,
           kv: KvOption = None, force_skip: ForceOption = None, seed: SeedOption = 0,
           output: Annotated[str | None, typer.Option("-o", "--output", help="Picture to write, .png or .svg.")] = None,
           as_json: JsonOption = False) -> None:
    """Show which modules each token skips, layer by layer."""
    from pathlib import Path

    from rich.console import Console

    from .errors import RequestError
    from .session import Routing, check_device, route_source
    from .session import prompt_tokens as encode
    from .skip_map import FORMATS, draw, print_map, rates
    check_device(device)
    its_prompt = _prompt(prompt, prompt_tokens)
    if output is not None and Path(output).suffix not in FORMATS:
        raise RequestError(f"{output}: a skip map is written as {' or '.join(FORMATS)}")
    source = _open(model, lora)
    tokens = encode(source, *its_prompt, chat)
    asked = Routing(routers=routers, kv=kv, force_skip=force_skip, seed=seed)
    generator = _open_generator(device, config, context, *route_source(source, asked))
    with progress(f"generating {count} tokens", count) as update:
        for done, _ in enumerate(generator.generate(tokens, count), 1):
            update(done, None)
    decisions = generator.decisions
    if decisions is None:
        raise RequestError("no routers decide here; give --routers or --force-skip")
    if output is not None:
        with whole_file(output) as partial:
            draw(partial, decisions, len(tokens), _title(source), Path(output).suffix)
    found = rates(decisions)
    if as_json:
        print_json({"device": device, "prompt_tokens": tokens, "layers": decisions.shape[0],
                    "tokens": decisions.shape[2], **found, "executed": decisions.astype(int).tolist(),
                    "labels": dict.fromkeys(("skip_attention", "skip_mlp", "skip_by_layer", "executed"), "simulated")})
        return
    print_map(Console(highlight=False), decisions, len(tokens))
    print(f"skipped {found['skip_attention']:.1%} of attention, {found['skip_mlp']:.1%} of MLP modules (simulated) by "
          f"{decisions.shape[2]} tokens, {len(tokens)} of them prompt")
    if output is not None:
        note(f"{output} written")


@app.command("compile")
def compile_command(model: ModelOption,
                    output: Annotated[str, typer.Option("-o", "--output", help="Bundle to write.")],
                    config: ConfigOption = None, context: ContextOption = None, routers: RoutersOption = None,
                    lora: LoraOption = None, kv: KvOption = None, buffer: BufferOption = None,
                    kv_share: ShareOption = None, kv_format: FormatOption = None, weights: WeightsOption = None,
                    as_json: JsonOption = False) -> None:
    """Compile a model into one bundle file for a configuration."""
    from .bundle import save_bundle
    from .compiled import Compiled
    from .errors import RequestError
    from .session import Routing, route_source
    source = _open(model, lora, weights)
    if isinstance(source, Compiled):
        raise RequestError(f"{model} is already compiled, for configuration {source.config.name}")
    model_of, its_routers, _ = route_source(source, Routing(routers=routers, kv=kv))
    compiled = _compile(model_of, config, context, its_routers, _sizes(buffer, kv_share, kv_format))
    with whole_file(output) as partial, progress(f"writing {output}"):
        save_bundle(partial, compiled)
        size = partial.stat().st_size
    summary = compiled.summary() | {"file_bytes": size}
    if as_json:
        print_json(summary | {"labels": {"file_bytes": "measured", "instructions": "measured", "bytes": "predicted"}})
        return
    print(f"{output}: {summary['model']} for configuration {summary['configuration']}, {size:,} bytes (measured)")
    note(f"{summary['instructions']} instructions (measured), chunks of {summary['chunk']} tokens, context "
         f"{summary['context']}; device memory {sum(summary['bytes'].values()):,} bytes (predicted)")
    for text in summary["notes"]:
        note(f"note: {text}")


@app.command()
def disasm(file: Annotated[str, typer.Argument(help="Bundle.")]) -> None:
    """Print the program of a bundle, one instruction a line with what it is for."""
    from .bundle import load_bundle
    print(load_bundle(file).program.listing(), end="")


@app.command()
def verilog(output: Annotated[str, typer.Option("-o", "--output", help="File to write.")],
            config: Annotated[str, typer.Option("--config", help="Overlay configuration.")] = "sim",
            hierarchy: Annotated[bool, typer.Option("--hierarchy", help="Keep one module per block.")] = False) -> None:
    """Write the overlay's Verilog, top module `skipopu_top`."""
    from importlib import import_module
    chosen = preset(config)
    with whole_file(output) as partial, progress(f"elaborating {config}"):
        if hierarchy:
            text = import_module("skipopu.hw.top").overlay_verilog(chosen, flatten=False)
        else:
            text = import_module("skipopu.sim.device").cached_verilog(chosen)
        partial.write_text(text)
    print(f"{output}: skipopu_top for configuration {chosen.name} ({chosen.config_hash:#010x})")


@app.command()
def synth(block: Annotated[str | None, typer.Option("--block", help="Part of the overlay, such as pe-unit or pe-array. "
                                                                    "Default: all of it, block by block.")] = None,
          config: Annotated[str, typer.Option("--config", help="Overlay configuration.")] = "u280",
          target: Annotated[str | None, typer.Option("--target", help="Device family: xcup (AMD UltraScale+) or ecp5. "
                                                                      "Default: the configuration's.")] = None,
          as_json: JsonOption = False) -> None:
    """Estimate resources with Yosys: LUTs, flip-flops, DSPs, memories, as shares of the device."""
    from importlib import import_module
    family = target or ("ecp5" if preset(config).dsp == "mult18x18d" else "xcup")
    module = import_module(f"skipopu.bitstream.{'whole' if block is None else 'estimate'}")
    with progress(f"synthesising {block or config}") as update:
        def log(stage: str) -> None:
            update(None, stage)

        report = (module.whole(config, family, log) if block is None else module.estimate(block, config, family, log))
    if as_json:
        print_json(report)
        return
    for line in module.lines(report):
        print(line)
    note(f"took {report['seconds']:.1f} s (measured)")


@app.command()
def models(as_json: JsonOption = False) -> None:
    """List the models that have a name."""
    from .load import list_models
    known = list_models()
    if as_json:
        print_json({"models": [{"name": item.name, "installed": item.path is not None, "description": item.description,
                                "install": item.install} for item in known]})
        return
    for item in known:
        print(f"{item.name}  {item.description}  {'installed' if item.path else f'not installed: {item.install}'}")


def _title(source: Model | Compiled) -> str:
    from .model import Model
    return source.config.name if isinstance(source, Model) else source.map.model


def _prompt(text: str | None, ids: str | None) -> tuple[str | None, str | None]:
    if (text is None) == (ids is None):
        raise typer.BadParameter("give the prompt either with -p or with --prompt-tokens")
    return text, ids


def _sampling(temp: float | None, top_k: int | None, top_p: float | None, seed: int) -> Any:
    from .sampling import Sampling
    if temp == 0 or (temp is None and top_k is None and top_p is None):
        return None
    return Sampling(temperature=1.0 if temp is None else temp, top_k=top_k or 0, top_p=1.0 if top_p is None else top_p,
                    seed=seed)


def _open(model: str, lora: str | None = None, weights: str | None = None) -> Model | Compiled:
    from .session import open_source
    with progress(f"loading {model}"):
        return open_source(model, lora, weights)


def _sizes(buffer: int | None, share: float | None, record_format: str | None) -> KvSizes | None:
    """What was asked for KV records; None for nothing."""
    from .plan import KvSizes
    if buffer is None and share is None and record_format is None:
        return None
    return KvSizes(buffer=buffer, share=1.0 if share is None else share, format=record_format or "fp16")


def _compile(source: Model | Compiled, config: str | None, context: int | None, routers: Routers | None,
             sizes: KvSizes | None = None) -> Compiled:
    from .session import compile_source
    with progress("compiling"):
        return compile_source(source, config, context, routers, sizes)


def _open_device(name: str, compiled: Compiled, force: Force | None, memory: str | None = None) -> Accelerator:
    from .session import open_accelerator
    with progress(f"opening {name}") as update:
        return open_accelerator(name, compiled, lambda line: update(None, f"opening {name}: {line[:80]}"), force,
                                memory)


def _open_generator(device: str, config: str | None, context: int | None, source: Model | Compiled,
                    routers: Routers | None, force: Force | None, sizes: KvSizes | None = None,
                    memory: str | None = None) -> Generator:
    from .session import REFERENCE, ReferenceGenerator
    if device != REFERENCE:
        return _open_device(device, _compile(source, config, context, routers, sizes), force, memory)
    from .errors import RequestError
    from .model import Model
    if not isinstance(source, Model):
        raise RequestError("the reference needs the model itself; a bundle holds only its compiled form")
    with progress("preparing the reference"):
        return ReferenceGenerator(source, context, routers, force)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit: 0 if all went well, 1 with one line on stderr for an error, 2 for wrong usage."""
    try:
        app(args=list(arguments) if arguments is not None else None)
    except OSError as error:
        note(f"skipopu: {error.filename or 'input or output'}: {error.strerror or error}")
    except MemoryError:
        note("skipopu: not enough memory on this machine")
    except Exception as error:
        # exceptions of our own classes carry one line made for users; anything else is a fault of the program
        if not type(error).__module__.startswith("skipopu."):
            raise
        note(f"skipopu: {error}")
    sys.exit(1)


if __name__ == "__main__":
    main()
