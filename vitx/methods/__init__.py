"""The methods by name, one module for each family; docs/adding_a_method.md says how to add one."""

# The order of these imports is that of `vitx.methods()`.
# isort: off
from vitx.methods import rollout as rollout
from vitx.methods import evidence as evidence
from vitx.methods import gae as gae
from vitx.methods import attention as attention
from vitx.methods import legrad as legrad
from vitx.methods import flow as flow

# isort: on
from vitx.methods.registry import (
    DEFAULT,
    NETWORKS,
    Method,
    Methods,
    find_method,
    methods,
    register,
    title_of,
    with_options,
)

__all__ = [
    "DEFAULT",
    "NETWORKS",
    "Method",
    "Methods",
    "find_method",
    "methods",
    "register",
    "title_of",
    "with_options",
]
