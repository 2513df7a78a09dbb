"""Errors a user can cause. The command line prints each as one line, without a traceback."""

__all__ = ["SkipopuError", "ModelError", "RouterError", "CompileError", "CapacityError", "BundleError", "DeviceError",
           "RequestError"]


class SkipopuError(ValueError):
    """Base of all errors with a cause outside the program: what was expected, what came, what to do."""


class ModelError(SkipopuError):
    """A model file, its tokenizer or its chat template cannot be used."""


class RouterError(SkipopuError):
    """Routers cannot be used: damaged, made for another model, or routes that are impossible."""


class CompileError(SkipopuError):
    """A sound model does not fit the chosen overlay configuration."""


class CapacityError(CompileError):
    """A buffer or field of the configuration is too small: which one, what is needed, which preset would do."""


class BundleError(SkipopuError):
    """A compiled file is damaged, of another format version, or made for another configuration."""


class DeviceError(SkipopuError):
    """The accelerator is missing, does not answer, or stopped with a fault."""


class RequestError(SkipopuError):
    """A prompt or a setting that the loaded model cannot serve."""
