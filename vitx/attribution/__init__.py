"""The methods by name, one module for each family; docs/extending.md says how to add one."""

# The order is that of `vitx.methods()`.
from vitx.attribution import rollout, evidence, gae, attention, flow  # noqa: F401, I001
from vitx.attribution.registry import DEFAULT as DEFAULT
from vitx.attribution.registry import NETWORKS as NETWORKS
from vitx.attribution.registry import Method as Method
from vitx.attribution.registry import Methods as Methods
from vitx.attribution.registry import find_method as find_method
from vitx.attribution.registry import methods as methods
from vitx.attribution.registry import register as register
from vitx.attribution.registry import telling as telling
from vitx.attribution.registry import title_of as title_of
from vitx.attribution.registry import with_options as with_options
