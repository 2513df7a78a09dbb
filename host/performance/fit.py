"""Does a model fit a configuration, what bounds it, and how fast would it be? Predictions by the cycle model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np
from skipopu.hw.config import OverlayConfig

from ..errors import CapacityError, RequestError
from ..model import Model, ModelConfig
from ..passes.walk import Arguments
from ..passes.weights import pair_kind
from ..plan import KvSizes, shortages
from ..routes import RandomRoutes, words_of_routes
from .cycles import Predicted, predict
from .history import KvHistory
from .memory import Channel, memory_model
from .outline import Kind, Outline, outline

__all__ = ["Fit", "Workload", "bound", "fit", "kinds_of", "resized", "route_words", "run_at", "spread", "terms"]

CORE_MHZ = 225  #: of the overlay on the cards, as of the memory model


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is asked of a model: ``prompt`` tokens read, then ``count`` generated.

    skip : share of the modules that every token skips; kv : mode for those that skip attention, "" without routers
    kind : of the weights, see `outline`; memory : model of it, see `memory.MODELS`; seed : of the skipped modules
    kv_format : of KV records, one of `plan.KV_FORMATS`; buffer : bytes of the history buffer, by default all of it
    """

    prompt: int = 128
    count: int = 1024
    skip: float = 0.0
    kv: str = ""
    kind: str | Kind = "q4_0"
    memory: str = "hbm"
    seed: int = 1
    kv_format: str = "fp16"
    buffer: int | None = None

    def __post_init__(self) -> None:
        if self.prompt < 1 or self.count < 1:
            raise RequestError(f"prompt and count must be at least 1 token, not {self.prompt} and {self.count}")
        if self.skip and not self.kv:
            raise RequestError("tokens that skip modules need a KV mode; give --kv reuse or --kv dense")


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What a model needs and reaches. All figures are predicted.

    chunk : rows processed together; port_bytes : memory needed behind each port; port_capacity : what the card has,
        None for a configuration of no card; parts : bytes of each kind of contents
    cycles_per_token, bytes_per_token : means over the generated tokens; prefill_cycles : of the whole prompt
    terms : cycles per token that each resource needs by itself; bound : the largest of them, see `bound`
    share_of_peak, share_of_memory : bytes moved in decode, of what the ports can carry and of what memory can deliver
    served : bytes per token that came from the history buffer instead, by those moved
    """

    chunk: int
    port_bytes: int
    port_capacity: int | None
    parts: dict[str, int]
    cycles_per_token: float
    bytes_per_token: float
    prefill_cycles: float
    terms: dict[str, float]
    bound: str
    share_of_peak: float
    share_of_memory: float
    served: float
    core_mhz: float = CORE_MHZ

    @property
    def tokens_per_second(self) -> float:
        return self.core_mhz * 1e6 / self.cycles_per_token

    @property
    def effective_share(self) -> float:
        """Share of the ports' peak if bytes from the history buffer count as moved."""
        return self.share_of_peak * (1 + self.served)

    @property
    def fits_memory(self) -> bool:
        return self.port_capacity is None or self.port_bytes <= self.port_capacity

    def as_json(self) -> dict[str, Any]:
        more = ("tokens_per_second", "effective_share", "fits_memory")
        return {name: getattr(self, name) for name in (*self.__dataclass_fields__, *more)}


def kinds_of(model: Model) -> Kind:
    """The kinds of weights that the compiler makes of a model's tensors, by the name of a matmul."""
    def kind(name: str) -> str:
        if name == "head":
            return _kind_of(model, "embedding" if model.config.tied_head else "head")
        if not name.endswith("gate_up"):
            return _kind_of(model, name)
        return pair_kind(*(_kind_of(model, name.replace("gate_up", part)) for part in ("gate", "up")))
    return kind


def _kind_of(model: Model, name: str) -> str:
    tensor = model.tensors[name]
    return "q8_0" if tensor.codes is None else tensor.kind


def route_words(workload: Workload, layers: int, position: int, tokens: int) -> tuple[tuple[int, int], ...]:
    """The rows that execute attention and MLP of each layer, () without routers."""
    if not workload.kv:
        return ()
    words = words_of_routes(RandomRoutes(workload.skip, workload.seed, exact=True).bits(layers, position, tokens))
    return tuple(zip(words[::2], words[1::2]))


def run_at(program: Outline, workload: Workload, position: int, tokens: int, head_rows: int,
           channel: Channel | None = None) -> Predicted:
    """One run of the program under a workload, behind the runs that come before it."""
    return predict(program.config, program.program, _arguments(program, workload, position, tokens, head_rows),
                   channel=channel or memory_model(workload.memory, program.config),
                   program_at=program.regions["program"][0], history=_history(program, workload, position))


def _arguments(program: Outline, workload: Workload, position: int, tokens: int, head_rows: int) -> Arguments:
    routes = route_words(workload, program.plan.model.layers, position, tokens)
    return Arguments(position, tokens, tokens - head_rows, head_rows, routes)


def _history(program: Outline, workload: Workload, position: int) -> KvHistory | None:
    """The sequence up to a position: of runs that ended long ago only what they stored matters."""
    if program.plan.kv != "reuse":
        return None
    history, prompt, chunk = KvHistory(program.config), min(workload.prompt, position), program.plan.chunk
    runs = [*((first, min(chunk, prompt - first)) for first in range(0, prompt, chunk)),
            *((at, 1) for at in range(prompt, position))]
    for at, tokens in runs[:-1]:
        history.store(at, route_words(workload, program.plan.model.layers, at, tokens))
    for at, tokens in runs[-1:]:
        history.replay(program.program, _arguments(program, workload, at, tokens, 0))
    return history


def terms(run: Predicted, channel: Channel, ports: int) -> dict[str, float]:
    """Cycles that each resource needs if nothing else takes time, and the cycles that none of them explains.

    memory : beats of a port, in the mean, at the rate that memory delivers; array : tiles loaded and rows multiplied
    vector : beats
    latency : the run beyond the largest of these: pipelines that fill and empty, and waiting for each other
    """
    found = {"memory": run.beats / ports / channel.share, "array": float(run.tile_cycles),
             "vector": float(run.vector_beats)}
    return found | {"latency": max(run.cycles - max(found.values()), 0.0)}


def bound(found: dict[str, float]) -> str:
    """The term that dominates."""
    return max(found, key=lambda name: found[name])


def fit(model: ModelConfig, config: OverlayConfig, workload: Workload,
        log: Callable[[str], None] = lambda line: None, samples: int = 4,
        prefill: bool = True) -> Fit:
    """Predict a workload. log : is told what is being predicted

    samples : positions of decode that are predicted, see `spread`; 1 takes the prompt's middle chunk for all
    prefill : False leaves the prompt out, with 0 cycles

    Raises CapacityError with everything that is too small, CompileError for a context beyond the model's.
    """
    context, sizes = workload.prompt + workload.count, KvSizes(format=workload.kv_format, buffer=workload.buffer)
    try:
        program = outline(model, config, context, kv=workload.kv, kind=workload.kind, sizes=sizes)
    except CapacityError as error:
        short = shortages(config, model, context, workload.kv, sizes)
        more = "".join(f"; {name} must be at least {needed} but is {there}" for name, needed, there in short[1:])
        raise CapacityError(f"{error}{more}") from None
    positions = spread(workload.prompt, workload.count, samples, config.tile_tokens)
    runs = []
    for position in positions:
        log(f"decode at position {position}")
        runs.append(run_at(program, workload, position, 1, 1))

    def mean(values: list[float]) -> float:
        return float(np.mean(values))

    channel = memory_model(workload.memory, config)
    split = [terms(run, channel, config.ports) for run in runs]
    together = {name: mean([item[name] for item in split]) for name in split[0]}
    cycles = mean([run.cycles for run in runs])
    moved = mean([run.beats + run.beats_written for run in runs]) / config.ports
    return Fit(
        chunk=program.plan.chunk, port_bytes=program.port_bytes(), port_capacity=_capacity(config),
        parts=_parts(program), cycles_per_token=cycles, bytes_per_token=moved * config.superbeat_bytes,
        prefill_cycles=_prefill(program, workload, log, samples > 1) if prefill else 0.0, terms=together,
        bound=bound(together),
        share_of_peak=moved / cycles, share_of_memory=moved / cycles / channel.share,
        served=mean([run.kv_buffered for run in runs]) / config.ports / moved)


def resized(config: OverlayConfig, sizes: Sequence[str]) -> OverlayConfig:
    """A configuration with other sizes, each like ``kvbuf_heads=128``. Raises RequestError, ConfigError."""
    changes = {}
    for size in sizes:
        name, _, value = size.partition("=")
        if not isinstance(getattr(config, name, None), int) or not value.isdecimal():
            raise RequestError(f"a size is like kvbuf_heads=128, not {size!r}")
        changes[name] = int(value)
    return replace(config, name=",".join([config.name, *sizes]), **changes) if sizes else config


def spread(first: int, count: int, samples: int, tile: int) -> list[int]:
    """Positions that stand for ``count`` of them from ``first`` on: evenly spread, and so are their remainders by the
    tokens of a KV tile, since a tile costs the same to the array whatever it holds."""
    found = []
    for number in range(min(samples, count)):
        at = first + int((number + 0.5) * count / min(samples, count))
        if count >= samples * tile:  # remainders in another order: the upper half between the lower one
            other = number // 2 + (number % 2) * ((samples + 1) // 2)
            at += (int((other + 0.5) / samples * tile) - at + tile // 2) % tile - tile // 2
            at = min(max(at, first), first + count - 1)
        found.append(at)
    return found


def _prefill(program: Outline, workload: Workload, log: Callable[[str], None], ends: bool) -> float:
    """Cycles of reading the prompt: the first and the last whole chunk, those between on a line, and the rest.

    ends : False predicts the middle chunk for all
    """
    chunk = program.plan.chunk
    whole, rest = divmod(workload.prompt, chunk)
    total = 0.0
    if not ends and workload.prompt > chunk:
        log("a chunk of the prompt")
        run = run_at(program, workload, (workload.prompt - chunk) // 2, chunk, 1)
        return run.cycles * workload.prompt / chunk
    if whole:
        log("the first chunk of the prompt")
        first = last = run_at(program, workload, 0, chunk, int(not rest and whole == 1)).cycles
        if whole > 1:
            log("the last chunk of the prompt")
            last = run_at(program, workload, (whole - 1) * chunk, chunk, int(not rest)).cycles
        total = whole * (first + last) / 2
    if rest:
        total += run_at(program, workload, whole * chunk, rest, 1).cycles
    return total


def _parts(program: Outline) -> dict[str, int]:
    """Bytes of each kind of contents over all ports."""
    parts = dict.fromkeys(("weights", "kv", "embedding", "other"), 0)
    for name, (_, size) in program.regions.items():
        last = name.rpartition(".")[2]
        kind = ("kv" if name.split(".")[0] == "kv" else "embedding" if name == "embedding" else
                "weights" if last in ("q", "k", "v", "o", "gate_up", "down", "head") else "other")
        parts[kind] += size * program.config.superbeat_bytes
    return parts


def _capacity(config: OverlayConfig) -> int | None:
    """Memory behind a port on the cards that this configuration is made for."""
    boards = import_module("skipopu.bitstream.boards").ALVEO.values()
    return next((board.channel_bytes for board in boards if board.config == config.name.partition(",")[0]), None)

