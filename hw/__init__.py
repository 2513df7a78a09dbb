"""Hardware: the overlay in Amaranth, on a plain-Python ground floor (config, formats, isa, registers)."""
