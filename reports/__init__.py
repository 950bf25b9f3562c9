"""Tables and pictures over operating points and run folders."""

from reports.profile_figure import profile_figure

__all__ = ["profile_figure"]
