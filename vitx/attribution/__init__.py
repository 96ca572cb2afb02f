"""The methods by name, one module per family; docs/extending.md explains how to add one."""

# The order of these imports is that of `vitx.methods()`.
from vitx.attribution import rollout, evidence, attention  # noqa: F401, I001
from vitx.attribution.registry import DEFAULT, NETWORKS, Method, Methods, find_method, methods, register
from vitx.attribution.registry import telling, title_of, with_options

__all__ = ["DEFAULT", "NETWORKS", "Method", "Methods", "find_method", "methods", "register"]
__all__ += ["telling", "title_of", "with_options"]
