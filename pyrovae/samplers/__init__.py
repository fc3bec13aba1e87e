"""Markov chain steps: pure functions on named tuples, batched over leading dims, no processes.

Each sampler is a module with `init(log_density, u) -> State` and `step(state, log_density, ...) -> (State, Info)`;
`log_density` maps `[..., B, D]` to `[..., B]`, and the step's noise is an argument.
"""

from pyrovae.samplers import adaptive, hmc, langevin
from pyrovae.samplers.state import Info, LogDensity, State, init, slope

__all__ = ["Info", "LogDensity", "State", "adaptive", "hmc", "init", "langevin", "slope"]
