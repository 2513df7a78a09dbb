"""Simulation of the RTL: native Verilator harness, memory models, interactive stepping."""
