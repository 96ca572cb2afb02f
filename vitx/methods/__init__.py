"""The methods by name, one module for each family; docs/adding_a_method.md says how to add one."""

# The order is that of `vitx.methods()`.
from vitx.methods import rollout, evidence, gae, attention, flow  # noqa: F401, I001
from vitx.methods.registry import DEFAULT as DEFAULT
from vitx.methods.registry import NETWORKS as NETWORKS
from vitx.methods.registry import Method as Method
from vitx.methods.registry import Methods as Methods
from vitx.methods.registry import find_method as find_method
from vitx.methods.registry import methods as methods
from vitx.methods.registry import register as register
from vitx.methods.registry import telling as telling
from vitx.methods.registry import title_of as title_of
from vitx.methods.registry import with_options as with_options
