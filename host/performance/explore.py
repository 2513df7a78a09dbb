"""Sweep configurations against models and skip rates: speed by the cycle model, resources by estimate, resumable.

Results are a text file, one JSON object a line: first what the sweep is (format, version, settings), then a point each.
A sweep that was stopped goes on where it was; a file of another version or of other settings is refused.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from skipopu.hw.config import ConfigError, OverlayConfig

from ..errors import CompileError, RequestError
from ..plan import KV_FORMATS
from .fit import Workload, fit
from .geometries import find_geometry
from .outline import check_kind
from .resources import estimate_resources

__all__ = ["AXES", "ExploreError", "Point", "Sweep", "VERSION", "draw", "evaluate", "explore", "pareto", "table"]

VERSION = 3  # 2: formats of KV records; 3: the history buffer, resources as counted at u280
_FORMAT = "skipopu-explore"
AXES = ("lanes", "columns", "ports", "vector_lanes", "fifo_beats", "kvbuf_heads", "tokens")  #: what may be swept
_BATCH = 4  # points that a worker gets before results are written


class ExploreError(RequestError):
    """A results file or a cluster that cannot be used."""


@dataclass(frozen=True)
class Point:
    """One configuration, model, skip rate and format of KV records. sizes : of `AXES`, in place of the base's"""

    geometry: str
    skip: float
    sizes: tuple[tuple[str, int], ...]
    kv_format: str = "fp16"

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is swept around a base configuration. axes : name of a size -> its values

    Raises RequestError for a size that cannot be swept, or an unknown geometry.
    """

    base: OverlayConfig
    axes: dict[str, tuple[int, ...]]
    geometries: tuple[str, ...]
    skips: tuple[float, ...]
    kv_formats: tuple[str, ...] = ("fp16",)
    prompt: int = 128
    count: int = 1024
    kv: str = "reuse"
    weights: str = "q4_0"
    memory: str = "hbm"

    def __post_init__(self) -> None:
        for name in self.axes:
            if name not in AXES:
                raise RequestError(f"{name} cannot be swept; known: {', '.join(AXES)}")
        for name in self.geometries:
            find_geometry(name)
        check_kind(self.weights)
        for name in self.kv_formats:
            if name not in KV_FORMATS:
                raise RequestError(f"KV format must be {', '.join(KV_FORMATS)}, not {name!r}")

    def points(self) -> Iterator[Point]:
        names = list(self.axes)
        for values in itertools.product(*self.axes.values()):
            for geometry in self.geometries:
                for skip in self.skips:
                    for kv_format in self.kv_formats:
                        yield Point(geometry, skip, tuple(zip(names, values)), kv_format)

    def settings(self) -> dict[str, Any]:
        """What all points have in common: those of a file with other ones do not compare."""
        return {"base": asdict(self.base), "prompt": self.prompt, "count": self.count, "kv": self.kv,
                "weights": self.weights, "memory": self.memory}


def evaluate(sweep: Sweep, point: Point) -> dict[str, Any]:
    """One point as plain values: rates and resources, or under ``refused`` why it cannot be built or does not fit."""
    found: dict[str, Any] = {"geometry": point.geometry, "skip": point.skip, "kv_format": point.kv_format,
                             "sizes": dict(point.sizes)}
    try:
        config = replace(sweep.base, name="explored", **dict(point.sizes))
    except ConfigError as error:
        return found | {"refused": str(error)}
    found |= {"resources": estimate_resources(config)}
    workload = Workload(prompt=sweep.prompt, count=sweep.count, skip=point.skip, kv=sweep.kv if point.skip else "",
                        kind=sweep.weights, memory=sweep.memory, kv_format=point.kv_format)
    try:
        fitted = fit(find_geometry(point.geometry), config, workload, samples=1)
    except CompileError as error:
        return found | {"refused": str(error).partition(";")[0]}
    return found | {
        "tokens_per_second": fitted.tokens_per_second, "bytes_per_token": fitted.bytes_per_token,
        "prefill_ms": fitted.prefill_cycles / fitted.core_mhz / 1e3, "bound": fitted.bound,
        "share_of_peak": fitted.share_of_peak, "port_bytes": fitted.port_bytes}


def explore(sweep: Sweep, path: str | Path, *, jobs: int = 1, ray: str | None = None,
            tell: Callable[[int, int], None] = lambda done, total: None) -> list[dict[str, Any]]:
    """Evaluate every point that the results file does not have yet, and return all results of the sweep.

    jobs : processes; ray : evaluate on a Ray cluster instead, "local" for one on this machine or its address; tell : is
    told of points done and in all
    Raises ExploreError for a file of another version or other settings, or without Ray.
    """
    path = Path(path)
    done = _read(path, sweep)
    points = list(sweep.points())
    missing = [point for point in points if point.key not in done]
    tell(len(points) - len(missing), len(points))
    if missing:
        with _workers(jobs, ray) as (run, width), path.open("a") as file:
            for first in range(0, len(missing), _BATCH * width):
                batch = missing[first:first + _BATCH * width]
                for point, result in zip(batch, run(sweep, batch)):
                    done[point.key] = result
                    file.write(json.dumps({"point": point.key, "result": result}) + "\n")
                file.flush()
                tell(len(points) - len(missing) + first + len(batch), len(points))
    return [done[point.key] for point in points]


def _read(path: Path, sweep: Sweep) -> dict[str, dict[str, Any]]:
    """Results that a file has; a new file gets its first line. A line that was cut off is forgotten."""
    head = {"format": _FORMAT, "version": VERSION, "settings": sweep.settings()}
    if not path.exists() or not path.read_text().strip():
        path.write_text(json.dumps(head) + "\n")
        return {}
    first, *lines = path.read_text().splitlines()
    try:
        found = json.loads(first)
    except json.JSONDecodeError:
        found = {}
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise ExploreError(f"{path} holds no results of a sweep; name another file, or remove it")
    if found.get("version") != VERSION:
        raise ExploreError(f"{path} is of version {found.get('version')}, this program writes version {VERSION}; name "
                           "another file, or remove it")
    for name, value in json.loads(json.dumps(head["settings"])).items():
        if found["settings"].get(name) != value:
            raise ExploreError(f"{path} was made with another {name}; name another file, or remove it")
    results, whole = {}, [first]
    for line in lines:
        try:
            item = json.loads(line)
        except json.JSONDecodeError:
            continue
        results[item["point"]] = item["result"]
        whole.append(line)
    path.write_text("\n".join(whole) + "\n")
    return results


class _workers:
    """Context: (function that evaluates a batch in parallel, how many at once)."""

    def __init__(self, jobs: int, ray: str | None) -> None:
        self.jobs, self.ray, self._stop = jobs, ray, False

    def __enter__(self) -> tuple[Callable[[Sweep, Sequence[Point]], Iterable[dict[str, Any]]], int]:
        from joblib import Parallel, delayed, parallel_config
        if self.ray is None:
            pool = Parallel(n_jobs=self.jobs)
            return lambda sweep, batch: pool(delayed(evaluate)(sweep, point) for point in batch), max(self.jobs, 1)
        if find_spec("ray") is None:
            raise ExploreError("--ray needs the package ray, which is not installed: pip install 'skipopu[cluster]', "
                               "or leave --ray out to use processes of this machine")
        cluster = import_module("ray")
        try:
            cluster.init(address=None if self.ray == "local" else self.ray, include_dashboard=False,
                         log_to_driver=False, logging_level="error",
                         **({"num_cpus": max(self.jobs, 1)} if self.ray == "local" else {}))
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ExploreError(f"no Ray cluster at {self.ray!r} ({str(error).splitlines()[0]}); start one with `ray "
                               "start --head`, or give --ray local") from None
        self._stop = True
        import_module("ray.util.joblib").register_ray()
        width = max(int(cluster.cluster_resources().get("CPU", 1)), 1)

        def run(sweep: Sweep, batch: Sequence[Point]) -> Iterable[dict[str, Any]]:
            with parallel_config("ray", n_jobs=width):
                return Parallel()(delayed(evaluate)(sweep, point) for point in batch)
        return run, width

    def __exit__(self, *_: object) -> None:
        if self._stop:
            import_module("ray").shutdown()


def pareto(results: Sequence[dict[str, Any]], resource: str = "luts") -> list[int]:
    """Indices of the results that no other one beats in both speed and a resource, the cheapest first."""
    order = sorted((index for index, item in enumerate(results) if "tokens_per_second" in item),
                   key=lambda index: (results[index]["resources"][resource], -results[index]["tokens_per_second"]))
    best, found = 0.0, []
    for index in order:
        if results[index]["tokens_per_second"] > best:
            best = results[index]["tokens_per_second"]
            found.append(index)
    return found


def table(results: Sequence[dict[str, Any]]) -> list[str]:
    """What nothing beats, by model and skip rate, as lines of a Markdown table."""
    lines = ["| model | skipped | configuration | tokens/s | bound by | share of peak | LUTs | DSPs |",
             "|---|---|---|---|---|---|---|---|"]
    for geometry, skip in dict.fromkeys((item["geometry"], item["skip"]) for item in results):
        own = [item for item in results if (item["geometry"], item["skip"]) == (geometry, skip)]
        for index in pareto(own):
            item = own[index]
            named = item["sizes"] | ({} if item["kv_format"] == "fp16" else {"KV bits": item["kv_format"]})
            sizes = ", ".join(f"{name} {value}" for name, value in named.items())
            cost = item["resources"]
            lines.append(f"| {geometry} | {skip:.0%} | {sizes} | {item['tokens_per_second']:.1f} | {item['bound']} | "
                         f"{item['share_of_peak']:.1%} | {cost['luts']:,} | {cost['dsps']:,} |")
    return lines


def draw(path: str | Path, results: Sequence[dict[str, Any]], title: str, kind: str) -> None:
    """Speed against LUTs, a panel for each model, a colour for each skip rate, lines through what nothing beats.

    kind : "png" or "svg"
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    names = list(dict.fromkeys(item["geometry"] for item in results))
    figure = Figure(figsize=(5.5 * len(names), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        for number, skip in enumerate(dict.fromkeys(item["skip"] for item in results)):
            own = [item for item in results if item["geometry"] == name and item["skip"] == skip
                   and "tokens_per_second" in item]
            if not own:
                continue
            places = [(item["resources"]["luts"] / 1e3, item["tokens_per_second"]) for item in own]
            axes.plot(*zip(*places), ".", color=f"C{number}", alpha=0.6)
            best = pareto(own)
            axes.plot(*zip(*(places[index] for index in best)), "o-", color=f"C{number}", label=f"{skip:.0%} skipped")
            for index in best:
                text = " ".join(f"{size[0]}{value}" for size, value in own[index]["sizes"].items())
                text += "" if own[index]["kv_format"] == "fp16" else f" KV{own[index]['kv_format']}"
                axes.annotate(text, places[index], fontsize=6, xytext=(4, -8), textcoords="offset points")
        axes.set(title=name, xlabel="thousand LUTs (estimated)", ylabel="tokens/s (predicted)")
        axes.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
