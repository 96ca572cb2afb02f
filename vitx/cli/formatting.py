"""How the help looks."""

from argparse import RawDescriptionHelpFormatter

from jsonargparse import DefaultHelpFormatter


class HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the lines of the description."""
