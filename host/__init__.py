"""Host software: importers, compiler, bundle, devices, runtime and command line."""
