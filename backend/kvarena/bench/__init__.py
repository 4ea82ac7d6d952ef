"""Measuring contenders: workloads, clients, figures, plots. Every figure comes from a run, every plot from a file."""
