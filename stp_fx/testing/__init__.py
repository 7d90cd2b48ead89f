"""Parts for the library's own tests and for users' tests: random networks, oracles for removal, and the laws.

Needs hypothesis (``pip install "stp-fx[test]"``).
"""

from stp_fx.testing.absent import OracleError, run_absent
from stp_fx.testing.oracle import columns_suffice, run_silenced
from stp_fx.testing.recipe import Network, Recipe, Shape, Spec, spec
from stp_fx.testing.strategies import Request, networks, networks_with, requests, residual_networks, token_networks

__all__ = [
    "Network",
    "OracleError",
    "Recipe",
    "Request",
    "Shape",
    "Spec",
    "columns_suffice",
    "networks",
    "networks_with",
    "requests",
    "residual_networks",
    "run_absent",
    "run_silenced",
    "spec",
    "token_networks",
]
