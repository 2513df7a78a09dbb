"""Resources of a block at a configuration on a device: what `skipopu synth` prints."""

import time
from dataclasses import asdict

from skipopu.hw.config import preset

from .blocks import block
from .dot_error import dot_errors
from .synth import Resources, resources, synthesise, target

__all__ = ["estimate", "lines"]

_TERMS = 64  # of the dot products whose error is measured


def estimate(block_name, config_name, target_name, log=None):
    """One JSON-able dict: counts of the whole block, of its parts, and per product.

    log : called with what is being done, when it begins
    Raises SynthesisError, ConfigError for unknown names, YosysError for a design that Yosys refuses.
    """
    chosen, config, on = block(block_name), preset(config_name), target(target_name)
    begin = time.perf_counter()
    total, parts, labels = _synthesise(chosen, config, on, log)
    report = {"block": block_name, "config": config.name, "target": on.name, **_flat(total), "parts": parts}
    products = chosen.products(config) if chosen.products else None
    report |= {"products_per_cycle": products, "luts_per_product": products and total.luts / products}
    if block_name == "pe-unit":
        report |= _compared(config, on, log)
        labels |= dict.fromkeys(("error_mean_relative", "baseline_error_mean_relative"), "measured")
    return report | {"device_luts": on.luts, "seconds": time.perf_counter() - begin, "labels": labels}


def lines(report):
    """The report for people, line by line."""
    def counts(item):
        rams = "".join(f", {count:,} {name.upper()}" for name, count in item["rams"].items()
                       if count and not name.endswith("luts"))
        return (f"{item['luts']:,} LUT ({item['rams']['lutram_luts']:,} of them memory), {item['ffs']:,} FF, "
                f"{item['carries']:,} CARRY, {item['dsps']:,} DSP{rams}")

    yield f"{report['block']} at {report['config']} for {report['target']}: {counts(report)} (estimated)"
    yield f"{report['luts'] / report['device_luts']:.1%} of the LUTs of the largest device"
    for part in report["parts"]:
        yield f"  {part['count']:g} x {part['name']}: {counts(part)}"
    if report["products_per_cycle"]:
        yield (f"{report['products_per_cycle']:,} products per cycle, "
               f"{report['luts_per_product']:.1f} LUTs per product (estimated)")
    if "errors" in report:
        yield (f"conventional FP16: {report['baseline_luts_per_product']:.1f} LUTs per product (estimated): "
               f"{report['luts_per_product'] / report['baseline_luts_per_product'] - 1:+.1%}")
        yield (f"mean relative error of a dot product of {_TERMS}: {report['error_mean_relative']:.4%}, conventional "
               f"{report['baseline_error_mean_relative']:.4%} (measured)")


def _synthesise(chosen, config, on, log):
    total, parts = Resources(), []
    for part in chosen.parts(config, on.name):
        cost = resources(synthesise(part.make(), on, name=part.name, log=log), on)
        total += cost.times(part.count)
        parts.append({"name": part.name, "count": float(part.count), **_flat(cost)})
    return total, parts, {"luts": f"estimated by yosys for {on.device}, before placement", "seconds": "measured"}


def _flat(cost):
    """Resources with the memories together."""
    counts = asdict(cost)
    return {name: counts.pop(name) for name in ("luts", "ffs", "carries", "dsps")} | {"rams": counts}


def _compared(config, on, log):
    """The conventional dot product of as many lanes, and the errors of both."""
    rival = block("baseline")
    total, _, _ = _synthesise(rival, config, on, log)
    if log:
        log("errors of dot products")
    errors = dot_errors(terms=_TERMS, block=config.block)
    return {"baseline_luts": total.luts, "baseline_luts_per_product": total.luts / rival.products(config),
            "error_mean_relative": errors["ours"].mean_relative,
            "baseline_error_mean_relative": errors["tree"].mean_relative,
            "errors": {name: asdict(found) for name, found in errors.items()}}
